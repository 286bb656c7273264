"""Settings of tiny models whose layers keep states, for each kind of recurrence and each place that it can stand."""

from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel

from specdec.testing import tiny_model

_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA_NET = {
    **_LAYERS,
    "head_dim": 8,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
}

RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "granitemoehybrid": {**_MAMBA2, **_LAYERS, "num_local_experts": 0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8, "num_experts": 2},
    "kimi_linear": {
        **_LATENT,
        **_LAYERS,
        **_EXPERTS,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "head_dim": 8,
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    },
    "olmo_hybrid": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": {**_DELTA_NET, **_EXPERTS},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        **{"n_mamba_heads": 2, "mamba_dt_rank": 4, "mamba_d_state": 8},
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        **{"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "chunk_size": 16, "num_mem_blocks": 1},
        "adapter_rank": 8,
    },
}

KINDS = ("falcon_h1", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2", "qwen3_next")
"""One of each: states and keys in one layer, Mamba 1 among attention, KDA, convolution, alone, Mamba 2, delta net."""


@lru_cache(maxsize=4)
def recurrent_model(family: str, **settings: Any) -> PreTrainedModel:
    return tiny_model(family, **{**RECURRENT[family], **settings})
