"""Tiny models that read images, and prompts with different pictures in every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
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
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
        "vision_feature_layer": -1,
    },
    "qwen2_5_vl": {
        "text_config": PLANES,
        "vision_config": {"fullatt_block_indexes": [1], "window_size": 32, "tokens_per_second": 2},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": PLANES,
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    },
    "smolvlm": {"text_config": {"model_type": "llama"}, "scale_factor": 2},
}
"""Of one kind of positions and of three, with images that see both ways and with pictures of several sizes."""


@cache
def model_of(family: str) -> PreTrainedModel:
    given = SEEING[family]
    name = "image_token_index" if family in ("gemma3", "llava") else "image_token_id"
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


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def of_grids(heights: Sequence[int]) -> dict[str, Tensor]:
    """Rows with one picture each, of different heights."""
    grids = torch.tensor([[1, height, 4] for height in heights])
    rows = [[5, 6, 7][: 1 + row] + [252] + [IMAGE] * height + [253, 1, 2, 3] for row, height in enumerate(heights)]
    text = padded(rows)
    return {
        **text,
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
        "pixel_values": picture(4 * sum(heights), 3 * 2 * 8 * 8),
        "image_grid_thw": grids,
    }


def of_squares(num_tokens: int, *, has_types: bool) -> dict[str, Tensor]:
    text = padded([[5] + [IMAGE] * num_tokens + [1, 2, 3], [6, 7, 5, 4] + [IMAGE] * num_tokens + [2, 1]])
    types = {"token_type_ids": (text["input_ids"] == IMAGE).long()} if has_types else {}
    return {**text, **types, "pixel_values": picture(2, 3, 32, 32)}


def of_several() -> dict[str, Tensor]:
    """One picture, and two of which one is narrower."""
    pixels, mask = picture(2, 2, 3, 32, 32), torch.ones(2, 2, 32, 32, dtype=torch.bool)
    pixels[0, 1], mask[0, 1] = 0, False
    mask[1, 1, :, 16:] = False
    text = padded([[5] + [IMAGE] * 4 + [1, 2, 3], [6] + [IMAGE] * 4 + [7] + [IMAGE] * 4 + [2, 1]])
    return {**text, "pixel_values": pixels, "pixel_attention_mask": mask}


PROMPTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "gemma3": lambda: of_squares(4, has_types=True),
    "llava": lambda: of_squares(16, has_types=False),
    "qwen2_5_vl": lambda: of_grids((4, 8)),
    "qwen3_vl": lambda: of_grids((8, 4)),
    "smolvlm": of_several,
}
