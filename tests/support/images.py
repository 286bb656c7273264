"""Tiny models that read images, built in code: one of each kind of positions and of picture."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from specdec.testing import BYTE_VOCAB_SIZE

IMAGE = 250
"""Stands for a part of an image."""
TEXT = {
    "vocab_size": BYTE_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
TOWER = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size", "image_size"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "depth"), 2),
    "patch_size": 8,
    "initializer_range": 0.3,
}
PLANES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN_TOKENS = {"video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_feature_layer": -1,
    },
    "paligemma": {"text_config": {"model_type": "gemma"}, "projection_dim": 32},
    "qwen2_5_vl": {
        "text_config": PLANES,
        "vision_config": {"fullatt_block_indexes": [1], "window_size": 32, "tokens_per_second": 2},
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": {
            "layer_types": ["linear_attention", "full_attention"],
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            "rope_parameters": {**PLANES["rope_parameters"], "partial_rotary_factor": 1.0},
        },
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": []},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": PLANES,
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    },
    "smolvlm": {"text_config": {"model_type": "llama"}, "scale_factor": 2},
}
"""Of one kind of positions and of three, with images that see both ways and with pictures of several sizes; one has
layers that keep states."""


@cache
def model_of(family: str) -> PreTrainedModel:
    given = SETTINGS[family]
    name = "image_token_index" if family in ("gemma3", "llava", "paligemma") else "image_token_id"
    parts = {
        "text_config": {**TEXT, **given["text_config"]},
        "vision_config": {**TOWER, **given.get("vision_config", {})},
    }
    config = AutoConfig.for_model(family, **{**given, name: IMAGE, **parts})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for weights in model.parameters():
            if not bool(weights.any()):  # Gemma 3 starts without seeing
                torch.nn.init.normal_(weights, std=0.3)
    return model
