"""Families beside the verified ones: what their tiny models need, and why some are refused."""

SHARED = {
    "head_dim": 8,
    "sliding_window": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 259,
}
"""Layers 2 and 3 take the keys and values of 0 and 1."""


INDEXED = {
    "num_key_value_heads": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "index_head_dim", "index_n_heads"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_topk"), 8),
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
"""An indexer selects 8 earlier tokens."""


CHUNKED = {
    "attention_chunk_size": 16,
    "intermediate_size_mlp": 32,
    "num_local_experts": 2,
    "head_dim": 8,
    "layer_types": ["chunked_attention", "full_attention"],
}


UNLISTED = {
    "cohere2": {"sliding_window": 16},
    "deepseek_v32": INDEXED,
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "activation_sparsity_pattern": None},
    "gemma4_text": {**SHARED, "global_head_dim": 8},
    "gpt_oss": {"sliding_window": 16},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["full_attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4},
    "llama4_text": CHUNKED,
    "mixtral": {},
}


REFUSED = {
    "bloom": ({}, "ALiBi"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]]}, "local attention"),
    "deepseek_v4": ({"head_dim": 8}, "keeps a DeepseekV4HCACache"),
    "rwkv": ({"attention_hidden_size": 32}, "recurrent state"),
}
