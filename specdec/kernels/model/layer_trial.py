"""Whether a layer's native calls compute what its own forward does: tried once, on random input.

Shape letters: B batch, T query tokens, S keys, K key/value heads, D head_dim, C channels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from specdec.hf import CACHE
from specdec.kernels.model.layer import DecoderLayer, FusedLayer, Rotation, weight_bits


class _Trial(NamedTuple):
    """A random masked batch with a past."""

    x_BTC: torch.Tensor
    rotation: Rotation
    mask_B1TS: torch.Tensor
    past: tuple[torch.Tensor, torch.Tensor]  # keys and values, each [B, K, S - T, D]


@lru_cache(maxsize=4)  # made once for all layers of a model
def _trial(channels: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> _Trial:
    B, past, T = 2, 3, 5
    random = torch.Generator().manual_seed(0)
    angles_BTD = torch.rand(B, T, head_dim // 2, generator=random).mul(6).repeat(1, 1, 2)
    visible = torch.rand(B, 1, T, past + T, generator=random) < 0.7
    visible[..., 0] = True
    x_BTC = torch.randn(B, T, channels, generator=random)
    keys, values = torch.randn(2, B, num_kv_heads, past, head_dim, generator=random).to(dtype).unbind()
    lowest = torch.finfo(torch.float32).min  # additive masks: what eager and sdpa both take
    return _Trial(
        x_BTC.to(dtype),
        (angles_BTD.cos().to(dtype), angles_BTD.sin().to(dtype)),
        torch.where(visible, 0.0, lowest).to(dtype),
        (keys, values),
    )


@torch.no_grad()
def matches_reference(layer: DecoderLayer) -> bool:
    """Whether the fused forward computes what the layer's own does, on a random masked batch with a past.

    The bound is loose for packed weights (a rounding may tip) and bfloat16 (the layer's own rounds every step), and
    still far below what a wrong formula would show.
    """
    attn = layer.self_attn
    num_kv_heads, dtype = attn.k_proj.out_features // attn.head_dim, layer.input_layernorm.weight.dtype
    x_BTC, rotation, mask, past = _trial(attn.q_proj.in_features, num_kv_heads, attn.head_dim, dtype)

    def run(forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        cache = {CACHE: _OneLayerCache(past)}
        return forward(x_BTC, attention_mask=mask, position_embeddings=rotation, **cache).float()

    expected_BTC, actual_BTC = run(layer.forward), run(FusedLayer(layer))
    bound = 0.02 if weight_bits(attn.q_proj) < 32 else 1e-4
    return torch.dist(expected_BTC, actual_BTC).item() <= bound * (expected_BTC - x_BTC.float()).norm().item()


class _OneLayerCache:
    """The part of a cache that one layer sees."""

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.states = past

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.states
        self.states = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        return self.states
