"""A decoder layer in two native calls, with the cache's `update` between them.

It takes the place of `layer.forward` for the layout that Llama, Mistral, Qwen2, Qwen3, SmolLM and many others share,
recognised by structure and then checked against the layer's own forward on random input. What it does not cover (a
prefill, training, attention weights asked for, a foreign cache dtype ...) goes to the layer's own forward.

Rows are independent to the last bit: a token verified in a tree gets the very hidden state that decoding it alone gives.
Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim, C channels.
"""

import ctypes
from typing import Any

import torch
from torch import nn

from specdec.kernels import native
from specdec.kernels.linear import NATIVE, Int8Linear, float_matrix, is_plain

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_HARMLESS = {"cache_position", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}


def fits(layer: nn.Module) -> bool:
    """Whether the layer has the structure that the native calls compute, and sizes that they can take."""
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attn, mlp = layer.self_attn, layer.mlp
    if _children(attn) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or not hasattr(attn, "layer_idx"):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attn)]
    channels = attn.q_proj.in_features
    return (
        isinstance(mlp.act_fn, nn.SiLU)
        or type(mlp.act_fn).__name__ == "SiLUActivation"
    ) and (
        attn.head_dim % 32 == 0
        and attn.head_dim <= 256
        and channels % 16 == 0
        and all(hasattr(norm, "variance_epsilon") and is_plain(norm.weight) for norm in norms)
        and all(_supported(linear) for linear in _linears(layer))
    )


class LeanForward:
    """The forward of a recognised layer. Holds no tensors: those stay the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._native: native.Layer | None = None  # pointers into the layer's weights, made at the first call

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_native": None}  # a copy's weights lie elsewhere

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not self._covers(hidden_states, attention_mask, position_embeddings, kwargs):
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        library = native.library()
        assert library is not None
        layer, attn, num_threads = self._pointers(), self.layer.self_attn, torch.get_num_threads()
        B, T, _ = hidden_states.shape
        x_BTC = hidden_states.contiguous()
        query_BTHD = torch.empty(B, T, layer.num_heads, layer.head_dim)
        key_BTKD = torch.empty(B, T, layer.num_kv_heads, layer.head_dim)
        value_BTKD = torch.empty(B, T, layer.num_kv_heads, layer.head_dim)
        cos, sin = self._rotation(position_embeddings, B, T)
        library.attention_inputs(
            layer,
            x_BTC.data_ptr(),
            B * T,
            native.address(cos),
            native.address(sin),
            query_BTHD.data_ptr(),
            key_BTKD.data_ptr(),
            value_BTKD.data_ptr(),
            num_threads,
        )
        key_BKSD, value_BKSD = key_BTKD.transpose(1, 2), value_BTKD.transpose(1, 2)
        if past_key_values is not None:
            key_BKSD, value_BKSD = past_key_values.update(key_BKSD, value_BKSD, attn.layer_idx)
        attention, _alive = native.attention(query_BTHD, key_BKSD, value_BKSD, attention_mask, attn.scaling)
        out_BTC = torch.empty_like(x_BTC)
        library.attention_and_mlp(layer, attention, x_BTC.data_ptr(), out_BTC.data_ptr(), num_threads)
        return out_BTC

    def _covers(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, position_embeddings: Any, kwargs: dict[str, Any]
    ) -> bool:
        return (
            hidden.shape[0] * hidden.shape[1] <= native.MAX_ROWS
            and hidden.dtype is torch.float32
            and hidden.device.type == "cpu"
            and not (hidden.requires_grad and torch.is_grad_enabled())
            and (mask is None or mask.dim() == 4)
            and position_embeddings is not None
            and position_embeddings[0].shape[-1] == self.layer.self_attn.head_dim
            and not kwargs.get("output_attentions")
            and all(value is None or name in _HARMLESS for name, value in kwargs.items())
        )

    def _rotation(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor], B: int, T: int
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """cos and sin as contiguous [B, T, D]; none for a layer without rotary positions (SmolLM3 has such)."""
        if not getattr(self.layer.self_attn, "use_rope", True):
            return None, None
        cos, sin = position_embeddings
        if cos.shape[0] != B:
            cos, sin = cos.expand(B, T, -1), sin.expand(B, T, -1)
        return native.plain(cos).contiguous(), native.plain(sin).contiguous()

    def _pointers(self) -> native.Layer:
        if self._native is None:
            attn, first, second = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
            q_norm, k_norm = _head_norms(attn) or (None, None)
            self._native = native.Layer(
                *map(_matrix, _linears(self.layer)),
                input_norm=first.weight.data_ptr(),
                post_norm=second.weight.data_ptr(),
                q_norm=native.address(q_norm.weight if q_norm else None),
                k_norm=native.address(k_norm.weight if k_norm else None),
                input_eps=first.variance_epsilon,
                post_eps=second.variance_epsilon,
                head_eps=q_norm.variance_epsilon if q_norm else 0,
                num_heads=attn.q_proj.out_features // attn.head_dim,
                num_kv_heads=attn.k_proj.out_features // attn.head_dim,
                head_dim=attn.head_dim,
            )
        return self._native


@torch.no_grad()
def agrees(layer: nn.Module) -> bool:
    """Whether the lean forward computes what the layer's own does, on a random masked batch with a past.

    The bound is loose for int8 (a rounding may tip) and still far below what a wrong formula would show.
    """
    attn = layer.self_attn
    B, past, T, channels = 2, 3, 5, attn.q_proj.in_features
    random = torch.Generator().manual_seed(0)
    angles_BTD = torch.rand(B, past + T, attn.head_dim // 2, generator=random).mul(6).repeat(1, 1, 2)
    x_BTC = torch.randn(B, past + T, channels, generator=random)
    visible = torch.rand(B, 1, T, past + T, generator=random) < 0.7
    visible[..., 0] = True
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)  # additive: what eager and sdpa both take
    lean = LeanForward(layer)
    outputs = []
    for forward in (lambda *a, **k: type(layer).forward(layer, *a, **k), lean):
        cache = _OneLayerCache()
        for part, part_mask in ((slice(0, past), None if forward is lean else _causal(past)), (slice(past, None), mask)):
            rotation = angles_BTD[:, part].cos(), angles_BTD[:, part].sin()
            out = forward(
                x_BTC[:, part], attention_mask=part_mask, past_key_values=cache, position_embeddings=rotation
            )
        outputs.append(out)
    expected, actual = outputs
    bound = 0.02 if isinstance(attn.q_proj, Int8Linear) else 1e-4
    return torch.dist(expected, actual).item() <= bound * (expected - x_BTC[:, past:]).norm().item()


class _OneLayerCache:
    """The part of a cache that one layer sees."""

    def __init__(self) -> None:
        self.states: tuple[torch.Tensor, ...] = ()

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        new = (key, value)
        self.states = tuple(map(torch.cat, zip(self.states, new, strict=True), (2, 2))) if self.states else new
        return self.states


def _causal(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _head_norms(attn: nn.Module) -> list[nn.Module]:
    return [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []


def _linears(layer: nn.Module) -> list[nn.Module]:
    attn, mlp = layer.self_attn, layer.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _supported(linear: nn.Module) -> bool:
    if isinstance(linear, Int8Linear):
        return linear.library is not None
    forward = linear.__dict__.get("forward")  # a float32 linear whose calibration chose the native product
    return forward is not None and set(forward.args[1].values()) == {NATIVE}


def _matrix(linear: nn.Module) -> native.Matrix:
    return linear.matrix() if isinstance(linear, Int8Linear) else float_matrix(linear)


assert ctypes.sizeof(native.Matrix) == 40  # the layout that common.h has on every 64-bit system
