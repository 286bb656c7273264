"""A decoder layer in two native calls, with the cache's `update` between them.

It takes the place of `layer.forward` for the layout that Llama, Mistral, Qwen2, Qwen3, SmolLM and many others share,
recognised by structure and then checked against the layer's own forward on random input. What it does not cover (a
prefill, training, attention weights asked for ...) goes to the layer's own forward. Hooks on a layer run, hooks on its
parts do not.

Rows are independent to the last bit: a token verified in a tree gets the hidden state that decoding it alone gives.
Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim, C channels.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn

from specdec.hf import CACHE
from specdec.kernels import native
from specdec.kernels.linear import NATIVE, Int8Linear, float_matrix, is_plain

DecoderLayer: TypeAlias = Any  # a transformers decoder layer: attributes as in `_LAYER`, `_ATTENTION`, `_MLP`
Rotation: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [B or 1, T, D]

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_HARMLESS = {"cache_position", "output_hidden_states", "return_dict", "logits_to_keep"}


def fits(layer: DecoderLayer) -> bool:
    """Whether the layer has the structure that the native calls compute, and sizes that they can take."""
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attn = layer.self_attn
    if _children(attn) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or not hasattr(attn, "layer_idx"):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attn)]
    has_silu = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
    multiples_of_16 = (attn.q_proj.in_features, layer.mlp.gate_proj.out_features)
    has_sizes = attn.head_dim % 32 == 0 and attn.head_dim <= 256 and not any(n % 16 for n in multiples_of_16)
    has_norms = all(hasattr(norm, "variance_epsilon") and is_plain(norm.weight) for norm in norms)
    return has_silu and has_sizes and has_norms and all(map(_is_native, _linears(layer)))


class _Constants(NamedTuple):
    """What a layer's calls need and no call changes."""

    layer: native.Layer
    layer_idx: int
    scale: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotates: bool


Key = TypeVar("Key")
Value = TypeVar("Value")


class Once(Generic[Key, Value]):
    """A function of an object that all layers of one forward share (mask, rotation): computed by the first layer."""

    def __init__(self, function: Callable[[Key], Value]) -> None:
        self._function = function
        self._last: tuple[Key, Value] | None = None

    def __call__(self, key: Key) -> Value:
        last = self._last
        if last is None or last[0] is not key:
            self._last = last = key, self._function(key)
        return last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function, "_last": None}


def contiguous(rotation: Rotation) -> Rotation:
    cos, sin = rotation
    return native.plain(cos).contiguous(), native.plain(sin).contiguous()


class LeanForward:
    """The forward of a recognised layer. Holds no tensors of its own but the last rotation and mask."""

    def __init__(self, layer: DecoderLayer, rotation: Once[Rotation, Rotation] | None = None) -> None:
        self.layer = layer
        self._rotation = rotation or Once(contiguous)
        self._max_rows = native.MAX_INT8_ROWS if isinstance(layer.self_attn.q_proj, Int8Linear) else native.MAX_ROWS
        self._constants: _Constants | None = None  # pointers into the layer's weights, made at the first call

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": None}  # a copy's weights lie elsewhere

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Rotation | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = past_key_values if cache is None else cache
        if position_embeddings is None or not self._covers(hidden_states, attention_mask, position_embeddings, kwargs):
            kwargs |= {"position_ids": position_ids, CACHE: cache, "use_cache": use_cache}
            kwargs |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        library = native.library()
        assert library is not None
        constants, num_threads = self._constants or self._prepare(), torch.get_num_threads()
        x_BTC = hidden_states.contiguous()
        B, T, _ = x_BTC.shape
        query_BTHD = torch.empty(B, T, constants.num_heads, constants.head_dim)
        key_BTKD = torch.empty(B, T, constants.num_kv_heads, constants.head_dim)
        value_BTKD = torch.empty_like(key_BTKD)
        inputs = [query_BTHD.data_ptr(), key_BTKD.data_ptr(), value_BTKD.data_ptr()]
        if constants.rotates:
            cos, sin = self._rotation(position_embeddings)
            if cos.shape[0] != B:
                cos, sin = cos.expand(B, -1, -1).contiguous(), sin.expand(B, -1, -1).contiguous()
            inputs = [cos.data_ptr(), sin.data_ptr(), *inputs]
        else:
            inputs = [0, 0, *inputs]
        library.attention_inputs(constants.layer, x_BTC.data_ptr(), B * T, *inputs, num_threads)

        key_BKSD, value_BKSD = key_BTKD.transpose(1, 2), value_BTKD.transpose(1, 2)
        if cache is not None:
            key_BKSD, value_BKSD = cache.update(key_BKSD, value_BKSD, constants.layer_idx)
        if attention_mask is None and 1 < T < key_BKSD.shape[2]:  # transformers' sign for a prefill of a static cache
            key_BKSD, value_BKSD = key_BKSD[:, :, :T], value_BKSD[:, :, :T]
        attention = native.attention(query_BTHD, key_BKSD, value_BKSD, attention_mask, constants.scale)
        out_BTC = torch.empty_like(x_BTC)
        library.attention_and_mlp(constants.layer, attention, x_BTC.data_ptr(), out_BTC.data_ptr(), num_threads)
        return out_BTC

    def _covers(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, rotation: Rotation, kwargs: dict[str, Any]
    ) -> bool:
        shape = hidden.shape
        return (
            shape[0] * shape[1] <= self._max_rows
            and hidden.dtype is torch.float32
            and not hidden.is_cuda
            and not (hidden.requires_grad and torch.is_grad_enabled())
            and (mask is None or mask.dim() == 4)
            and rotation[0].shape[-1] == self.layer.self_attn.head_dim
            and not any(value and name not in _HARMLESS for name, value in kwargs.items())
        )

    def _prepare(self) -> _Constants:
        attn, first, second = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
        q_norm, k_norm = _head_norms(attn) or (None, None)
        num_heads = attn.q_proj.out_features // attn.head_dim
        num_kv_heads = attn.k_proj.out_features // attn.head_dim
        layer = native.Layer(
            *map(_matrix, _linears(self.layer)),
            input_norm=first.weight.data_ptr(),
            post_norm=second.weight.data_ptr(),
            q_norm=q_norm and q_norm.weight.data_ptr(),
            k_norm=k_norm and k_norm.weight.data_ptr(),
            input_eps=first.variance_epsilon,
            post_eps=second.variance_epsilon,
            head_eps=q_norm.variance_epsilon if q_norm else 0,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=attn.head_dim,
        )
        rotates = bool(getattr(attn, "use_rope", True))  # SmolLM3 has layers without positions
        sizes = num_heads, num_kv_heads, attn.head_dim
        self._constants = _Constants(layer, attn.layer_idx, attn.scaling, *sizes, rotates)
        return self._constants


@torch.no_grad()
def agrees(layer: DecoderLayer) -> bool:
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
    lowest = torch.finfo(torch.float32).min  # additive masks: what eager and sdpa both take
    masks = torch.full((1, 1, past, past), lowest).triu(1), torch.where(visible, 0.0, lowest)

    def run(forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        cache = _OneLayerCache()
        for part, mask in zip((slice(0, past), slice(past, None)), masks, strict=True):
            rotation = angles_BTD[:, part].cos(), angles_BTD[:, part].sin()
            out_BTC = forward(x_BTC[:, part], attention_mask=mask, **{CACHE: cache}, position_embeddings=rotation)
        return out_BTC

    expected_BTC, actual_BTC = run(layer.forward), run(LeanForward(layer))
    bound = 0.02 if isinstance(attn.q_proj, Int8Linear) else 1e-4
    return torch.dist(expected_BTC, actual_BTC).item() <= bound * (expected_BTC - x_BTC[:, past:]).norm().item()


class _OneLayerCache:
    """The part of a cache that one layer sees."""

    def __init__(self) -> None:
        self.states: tuple[torch.Tensor, ...] = ()

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        new = key, value
        self.states = tuple(torch.cat(pair, 2) for pair in zip(self.states, new, strict=True)) if self.states else new
        return self.states


def _children(module: DecoderLayer) -> set[str]:
    return {name for name, _ in module.named_children()}


def _head_norms(attn: Any) -> list[Any]:
    return [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []


def _linears(layer: DecoderLayer) -> list[Any]:
    attn, mlp = layer.self_attn, layer.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_native(linear: nn.Module) -> bool:
    if isinstance(linear, Int8Linear):
        return linear.library is not None
    forward = linear.__dict__.get("forward")  # a float32 linear whose calibration chose the native product
    return forward is not None and set(forward.args[1].values()) == {NATIVE}


def _matrix(linear: Any) -> native.Matrix:
    return linear.matrix() if isinstance(linear, Int8Linear) else float_matrix(linear)
