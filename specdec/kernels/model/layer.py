"""A decoder layer in two native calls, with the cache's `update` between them.

It takes the place of `layer.forward` for the layout that Llama, Mistral, Qwen2, Qwen3, SmolLM and many others share,
recognised by structure and then checked against the layer's own forward on random input. What it does not cover (a
float32 prefill, training, attention weights asked for ...) goes to the layer's own forward. Hooks on a layer run, hooks
on its parts do not.

Rows are independent to the last bit: a token verified in a tree gets the hidden state that decoding it alone gives, and
so, with packed weights, does a token of a prompt, however long and in whatever chunks it is read.
Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim, C channels.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from specdec.hf import CACHE
from specdec.kernels import native
from specdec.kernels.model.blocks import Attended
from specdec.kernels.model.linear import NATIVE, float_linear, float_matrix, is_plain
from specdec.kernels.model.native_model import NativeModel, Once
from specdec.kernels.model.quantized_linear import QuantizedLinear
from specdec.kernels.native import structs

DecoderLayer: TypeAlias = Any  # a transformers decoder layer: attributes as in `_LAYER`, `_ATTENTION`, `_MLP`
Rotation: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [B or 1, T, D]

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_HARMLESS = {"cache_position", "output_hidden_states", "return_dict", "logits_to_keep"}


def is_supported(layer: DecoderLayer) -> bool:
    """Whether the layer has the structure that the native calls compute, and sizes that they can take."""
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attn = layer.self_attn
    if _children(attn) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or not hasattr(attn, "layer_idx"):
        return False
    linears = _linears(layer)
    if not all(map(is_native, linears)):
        return False
    bits = set(map(weight_bits, linears))
    if len(bits) > 1 and bits & {8, 16, 32}:  # they want rows of their own kind
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attn)]
    has_silu = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
    multiples_of_16 = (attn.q_proj.in_features, layer.mlp.gate_proj.out_features)
    has_sizes = attn.head_dim % 32 == 0 and attn.head_dim <= 256 and not any(n % 16 for n in multiples_of_16)
    has_norms = all(hasattr(norm, "variance_epsilon") and is_plain(norm.weight) for norm in norms)
    has_norms = has_norms and len({norm.weight.dtype for norm in norms}) == 1
    return has_silu and has_sizes and has_norms


class _TensorAddresses:
    """The modules and tensors whose addresses a layer's calls are given, to see whether they are still those.

    A cast and back, `share_memory`, `weight.data = ...` or an adapter around a linear would leave the addresses behind.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        norms = [(layer, "input_layernorm"), (layer, "post_attention_layernorm")]
        norms += [(attn, name) for name in sorted(_HEAD_NORMS) if hasattr(attn, name)]
        linears = [(attn, name) for name in sorted(_ATTENTION)] + [(mlp, name) for name in sorted(_MLP - {"act_fn"})]
        links = [(layer, "self_attn"), (layer, "mlp"), *norms, *linears]
        # apart, so that `map` looks them all up without a step of Python's: they are looked at in every forward
        self._parents, self._children = [parent._modules for parent, _ in links], [name for _, name in links]
        stores = [store for parent, name in (*norms, *linears) for store in _stores(getattr(parent, name))]
        self._stores, self._names = [store for store, _ in stores], [name for _, name in stores]
        self._found = self._parts()
        self._addresses = self._now()
        # whoever moves a weight in the middle of a run gets the next run right; here the old one has to stay readable
        parts = [getattr(parent, name) for parent, name in (*norms, *linears)]
        self._alive = [each.detach() for part in parts for each in (*part.parameters(), *part.buffers())]

    def _parts(self) -> list[Any]:
        return list(map(dict.get, self._parents, self._children))

    def _now(self) -> list[int | None]:
        tensors: list[Any] = list(map(dict.get, self._stores, self._names))
        try:
            return list(map(torch.Tensor.data_ptr, tensors))
        except TypeError:  # a tensor has gone
            return [native.address(tensor) for tensor in tensors]

    @property
    def links(self) -> list[tuple[dict[str, Any], str]]:
        """Where these modules are held."""
        return list(zip(self._parents, self._children, strict=True))

    def hold_the_same(self) -> bool:
        """Whether the modules are still those that were compared with the layer's own forward."""
        return self._parts() == self._found

    def have_moved(self) -> bool:
        return self._now() != self._addresses


def _stores(module: Any) -> list[tuple[dict[str, Any], str]]:
    """Where a module holds its tensors. A quantised linear's are moved together or not at all."""
    if isinstance(module, QuantizedLinear):
        return [(module._buffers, "packed")]
    names = ["weight", *["bias"] * (module._parameters.get("bias") is not None)]
    return [(module._parameters, name) for name in names]


class _Constants(NamedTuple):
    """What a layer's calls need and no call changes."""

    addresses: _TensorAddresses
    layer: structs.Layer
    layer_idx: int
    scale: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotates: bool
    copies: list[tuple[torch.Tensor, torch.Tensor]]  # norms and biases that are no float32, and what the calls read

    @property
    def attends_as(self) -> tuple[float, int, int, int, bool]:
        """What layers have in common that one call may run."""
        return self.scale, self.num_heads, self.num_kv_heads, self.head_dim, self.rotates


def contiguous(rotation: Rotation) -> Rotation:
    cos, sin = rotation
    return native.plain(cos).contiguous(), native.plain(sin).contiguous()


class FusedLayer:
    """The forward of a recognised layer. Holds no tensors of its own but the last rotation and mask."""

    def __init__(
        self,
        layer: DecoderLayer,
        rotation: Once[Rotation, Rotation] | None = None,
        model: NativeModel | None = None,
    ) -> None:
        self.layer = layer
        self._model = model
        self._rotation = rotation or Once(contiguous)
        # torch has no better product for packed or bfloat16 weights, and what it rounds otherwise shows in the tokens
        self._max_rows = None if weight_bits(layer.self_attn.q_proj) < 32 else native.MAX_ROWS
        self.dtype = layer.input_layernorm.weight.dtype  # of the states between layers; inside they are float32
        self._constants: _Constants | None = None  # pointers into the layer's weights, made at the first call
        self._checked: _Constants | None = None  # the same, after the last check; None if that failed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": None, "_checked": None}  # a copy's weights lie elsewhere

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Rotation | None = None,
        past_key_values: Any = None,
        is_checked: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the layer's own forward, and besides:

        Args:
            is_checked: nobody has changed the layer since the last call of this run.
        """
        cache = past_key_values if cache is None else cache
        constants = None
        if position_embeddings is not None and self.covers(hidden_states, attention_mask, position_embeddings, kwargs):
            constants = (is_checked and self._checked) or self._prepare(position_embeddings)
        if constants is None or position_embeddings is None:
            kwargs |= {"position_ids": position_ids, CACHE: cache, "use_cache": use_cache}
            kwargs |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return type(self.layer).forward(self.layer, hidden_states, **kwargs)
        x_BTC = hidden_states.float().contiguous()
        query_BTHD, key_BTKD, value_BTKD = self._attention_inputs(constants, x_BTC, position_embeddings)
        key_BKSD, value_BKSD = key_BTKD.transpose(1, 2), value_BTKD.transpose(1, 2)
        if cache is not None:
            if (watch := getattr(cache, "watch", None)) is not None:  # see `tree_model/selection.py`
                watch(constants.layer_idx, query_BTHD.transpose(1, 2), constants.scale)
            key_BKSD, value_BKSD = cache.update(key_BKSD, value_BKSD, constants.layer_idx)
        T = x_BTC.shape[1]
        if attention_mask is None and 1 < T < key_BKSD.shape[2]:  # transformers' sign for a prefill of a static cache
            key_BKSD, value_BKSD = key_BKSD[:, :, :T], value_BKSD[:, :, :T]
        attended = Attended(query_BTHD, key_BKSD, value_BKSD, attention_mask)
        return self._attention_and_mlp(constants, x_BTC, attended).to(self.dtype)

    def _attention_inputs(
        self, constants: _Constants, x_BTC: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [B, T, H, D] and keys, and values, both [B, T, K, D]."""
        library, num_threads = native.library(), torch.get_num_threads()
        assert library is not None
        B, T, _ = x_BTC.shape
        query_BTHD = torch.empty(B, T, constants.num_heads, constants.head_dim)
        key_BTKD = torch.empty(B, T, constants.num_kv_heads, constants.head_dim)
        by_row = [x_BTC, query_BTHD, key_BTKD, torch.empty_like(key_BTKD)]
        if constants.rotates:
            by_row += self.angles(rotation, B)
        for first in range(0, B * T, native.BLOCK_ROWS):
            count = min(native.BLOCK_ROWS, B * T - first)
            x, query, key, value, *angles = [_address(part, first) for part in by_row]
            library.attention_inputs(constants.layer, x, count, *(angles or (0, 0)), query, key, value, num_threads)
        return query_BTHD, key_BTKD, by_row[3]

    def angles(self, rotation: Rotation, num_rows: int) -> Rotation:
        """cos and sin, each [B, T, D], contiguous."""
        cos, sin = self._rotation(rotation)
        if cos.shape[0] != num_rows:
            cos, sin = cos.expand(num_rows, -1, -1).contiguous(), sin.expand(num_rows, -1, -1).contiguous()
        return cos, sin

    def _attention_and_mlp(self, constants: _Constants, x_BTC: torch.Tensor, attended: Attended) -> torch.Tensor:
        library, num_threads = native.library(), torch.get_num_threads()
        assert library is not None
        out_BTC = torch.empty_like(x_BTC)
        for first, part in attended.blocks():
            attention = native.attention(*part, constants.scale)
            x, out = _address(x_BTC, first), _address(out_BTC, first)
            library.attention_and_mlp(constants.layer, attention, x, out, num_threads)
        return out_BTC

    def constants(self, rotation: Rotation | None = None) -> _Constants | None:
        """What native calls of this layer need, now; None where the layer has to be the model's own.

        Args:
            rotation: of the forward that asks: the model is looked at once for all of its layers.
        """
        return self._prepare(rotation)

    @property
    def checked(self) -> _Constants | None:
        """What `constants` said last, unless the layer is distrusted since."""
        return self._checked

    @property
    def any_rows(self) -> bool:
        """Whether forwards of any number of rows are native."""
        return self._max_rows is None

    @property
    def model_is_native(self) -> bool:
        """Whether the model's layers are native now."""
        return self._model is None or self._model.is_native(None)

    def covers(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, rotation: Rotation, kwargs: dict[str, Any]
    ) -> bool:
        shape = hidden.shape
        return (
            (self._max_rows is None or shape[0] * shape[1] <= self._max_rows)
            and hidden.dtype is self.dtype
            and not hidden.is_cuda
            and not (hidden.requires_grad and torch.is_grad_enabled())
            and (mask is None or mask.dim() == 4)
            and rotation[0].shape[-1] == self.layer.self_attn.head_dim
            and not any(value and name not in _HARMLESS for name, value in kwargs.items())
        )

    def is_unchanged(self) -> bool:
        """Whether the layer is what it was when it was recognised, and the kernels are here."""
        constants = self._constants
        if constants is None:
            return native.library() is not None and is_supported(self.layer)
        return constants.addresses.hold_the_same()

    def _prepare(self, rotation: object) -> _Constants | None:
        """None where the layer has to be the model's own. `rotation` tells one forward from another."""
        self._checked = None
        if not (self.is_unchanged() if self._model is None else self._model.is_native(rotation)):
            return None
        if self._constants is None or self._constants.addresses.have_moved():
            self._constants = self._find()
        for tensor, copy in self._constants.copies:
            copy.copy_(tensor)
        self._checked = self._constants
        return self._checked

    def distrust(self) -> None:
        """Check at the next call, whatever its caller says."""
        self._checked = None

    def _find(self) -> _Constants:
        attn, first, second = self.layer.self_attn, self.layer.input_layernorm, self.layer.post_attention_layernorm
        q_norm, k_norm = _head_norms(attn) or (None, None)
        num_heads = attn.q_proj.out_features // attn.head_dim
        num_kv_heads = attn.k_proj.out_features // attn.head_dim
        linears = _linears(self.layer)
        matrices = list(map(matrix_of, linears))
        norms = [norm and norm.weight.detach().float() for norm in (first, second, q_norm, k_norm)]
        pairs = [(norm.weight, copy) for norm, copy in zip((first, second, q_norm, k_norm), norms, strict=True) if norm]
        pairs += [(linear.bias, matrix.alive[2]) for linear, matrix in zip(linears, matrices, strict=True)]
        layer = structs.Layer(
            *matrices,
            **dict(zip(("input_norm", "post_norm", "q_norm", "k_norm"), map(native.address, norms), strict=True)),
            input_eps=first.variance_epsilon,
            post_eps=second.variance_epsilon,
            head_eps=q_norm.variance_epsilon if q_norm else 0,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=attn.head_dim,
        )
        rotates = bool(getattr(attn, "use_rope", True))  # SmolLM3 has layers without positions
        sizes = num_heads, num_kv_heads, attn.head_dim
        copies = [
            (own.detach(), copy)
            for own, copy in pairs
            if own is not None and copy is not None and own.dtype is not torch.float32
        ]
        return _Constants(_TensorAddresses(self.layer), layer, attn.layer_idx, attn.scaling, *sizes, rotates, copies)


def _address(tensor: torch.Tensor, first: int) -> int:
    """Of a row of a contiguous float32 tensor [B, T, ...], counted over B and T."""
    return tensor.data_ptr() + 4 * first * tensor.shape[2:].numel() if first else tensor.data_ptr()


def _children(module: DecoderLayer) -> set[str]:
    return {name for name, _ in module.named_children()}


def _head_norms(attn: Any) -> list[Any]:
    return [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []


def _linears(layer: DecoderLayer) -> list[Any]:
    attn, mlp = layer.self_attn, layer.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_native(linear: nn.Module) -> bool:
    """Whether the products of a linear are native, whatever the number of rows."""
    if isinstance(linear, QuantizedLinear):
        return linear.library is not None
    forward: Any = linear.__dict__.get("forward")  # of a float linear whose calibration chose the native product
    if getattr(forward, "func", None) is not float_linear:
        return False
    return set(forward.args[1].values()) == {NATIVE} and is_plain(forward.args[0].weight)


def weight_bits(linear: Any) -> int:
    """Of a weight."""
    return linear.bits if isinstance(linear, QuantizedLinear) else 8 * linear.weight.element_size()


def matrix_of(linear: Any) -> structs.Matrix:
    """Of a linear for which `is_native` holds."""
    return linear.matrix() if isinstance(linear, QuantizedLinear) else float_matrix(linear)
