"""Linears of packed weights, 8 bits or 4. They are *exact*: a row's result is bit-identical whatever else is in the
batch, because each row is taken on its own and summed in a fixed order.

Shape letters: M rows, K inputs, N outputs, G groups of inputs.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from specdec.errors import UnsupportedOptionError
from specdec.kernels import naive, native
from specdec.kernels.model import persistence
from specdec.kernels.native import structs
from specdec.model_options import QuantizedWeights


class QuantizedLinear(nn.Module):
    """An `nn.Linear` with packed weights. Inference only.

    Attributes:
        bits: of a weight.
        weights: what `prepare` calls a model of these.

    Natively, rows are quantised as they come (8 bits with a scale per 64 inputs, or per 32 where groups of weights have
    scales too), or stay float32 where `weight_only`.
    A quantised row jumps by a whole step when a rounding before it moves a value over the edge of one, so rows may be
    quantised only where nothing before them rounds differently in another company: `prepare` decides.
    """

    bits: int
    weights: ClassVar[str]
    weight_only = False

    packed: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, packed: Mapping[str, torch.Tensor] | None = None) -> None:
        """Copies nothing but the bias: the float weights can go as soon as `linear` does.

        Args:
            packed: what `pack` has made of the weight, for this machine's library.
        """
        n, k = linear.weight.shape
        self._begin(n, k, None if linear.bias is None else linear.bias.detach().float().clone())
        if self.library:
            packed = self.pack(linear) if packed is None else packed
            self.register_buffer("packed", packed["packed"], persistent=False)
            self.register_buffer("scale", packed.get("scale"), persistent=False)
        else:
            self._pack_in_torch(linear.weight.detach().float().contiguous())

    @classmethod
    def pack(cls, linear: nn.Linear) -> dict[str, torch.Tensor]:
        """The weight of a linear in the native library's layout, and its scales where they are apart."""
        library = native.library()
        assert library is not None
        packed, scale_N = library.pack(linear.weight.detach().float().contiguous(), cls.bits)
        return {"packed": packed} if scale_N is None else {"packed": packed, "scale": scale_N}

    @classmethod
    def packed_shapes(cls, linear: nn.Linear) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of what `pack` makes."""
        library = native.library()
        assert library is not None
        num_outputs, num_inputs = linear.weight.shape
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        shapes = {"packed": (torch.int8, (library.packed_bytes(num_outputs, num_inputs, cls.bits),))}
        return shapes | ({"scale": (torch.float32, (num_outputs,))} if cls.bits == 8 else {})

    def _begin(self, out_features: int, in_features: int, bias_N: torch.Tensor | None) -> None:
        """All but the weights."""
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", bias_N, persistent=False)
        self.library = native.library()

    def matrix(self) -> structs.Matrix:
        sizes = self.out_features, self.in_features
        return native.matrix(self.packed, *sizes, bits=self.bits, scale=self.scale, bias=self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_MK = x.detach().reshape(-1, self.in_features).float().contiguous()
        if self.library:
            out_MN = self.library.linear(self.matrix(), x_MK, weight_only=self.weight_only)
        else:
            out_MN = self._torch_product(x_MK)
            out_MN = out_MN if self.bias is None else out_MN + self.bias
        return out_MN.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _pack_in_torch(self, weight_NK: torch.Tensor) -> None:
        raise NotImplementedError

    def _torch_product(self, x_MK: torch.Tensor) -> torch.Tensor:
        """Without the bias."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        kind = "torch" if not self.library else "native, weight-only" if self.weight_only else "native"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantizedLinear":
        return self  # immutable, and possibly large: copies of a model share it

    # what a module is converted, saved and loaded by: see persistence.py

    def _apply(self, fn: persistence.Convert, recurse: bool = True) -> "QuantizedLinear":
        persistence.check_conversion(fn, self.weights)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *_: Any) -> None:
        persistence.refuse_saving(self.weights)

    def _load_from_state_dict(self, *_: Any) -> None:
        persistence.refuse_loading(self.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "library": None, "layout": persistence.layout(self.library, self.bits)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        persistence.check_layout(state.pop("layout"), state.get("bits", getattr(type(self), "bits", 0)), self.weights)
        super().__setstate__(state)
        self.library = native.library()

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"an {self.weights}-prepared linear has no float weight: load the model again for that"
            )
        return super().__getattr__(name)


class Int8Linear(QuantizedLinear):
    """8 bits a weight, one scale per output.

    In torch, whose int8 product takes 7 bits and one scale, each row goes in as three 7-bit parts (weights are read
    once for all) and is 20 bits exact: a jump is then as small as a rounding.
    """

    bits = 8
    weights = "int8"
    prepacked: torch.ScriptObject | torch.Tensor | None = None

    def _pack_in_torch(self, weight_NK: torch.Tensor) -> None:
        self.prepacked = _torch_pack(weight_NK)

    def _torch_product(self, x_MK: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.prepacked, torch.ScriptObject)
        return _torch_int8_linear(x_MK, self.prepacked)

    def __getstate__(self) -> dict[str, Any]:
        weight = None if self.prepacked is None else torch.ops.quantized.linear_unpack(self.prepacked)[0]
        return {**super().__getstate__(), "prepacked": weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.prepacked is not None:
            self.prepacked = torch.ops.quantized.linear_prepack(self.prepacked, None)


class Int4Linear(QuantizedLinear):
    """4 bits a weight, and for every 32 inputs of an output a scale and an offset in float16: 5 bits in all.

    That is how GGUF's Q4_1 keeps weights: they come through as they are. Torch makes float weights of them for every
    product, and its rows stay float32.
    """

    bits = 4
    weights = "int4"
    codes: torch.Tensor
    offset: torch.Tensor

    def _pack_in_torch(self, weight_NK: torch.Tensor) -> None:
        codes_NGK, scale_NG1, offset_NG1 = naive.quantize_weight4(weight_NK)
        self.register_buffer("codes", codes_NGK[..., :16] + 16 * codes_NGK[..., 16:], persistent=False)
        self.register_buffer("scale", scale_NG1, persistent=False)
        self.register_buffer("offset", offset_NG1, persistent=False)

    def _torch_product(self, x_MK: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None
        codes_NGK = torch.cat([self.codes % 16, self.codes // 16], 2).float()
        weight_NGK = torch.addcmul(self.offset.float(), codes_NGK, self.scale.float())
        return F.linear(x_MK, weight_NGK.flatten(1)[:, : self.in_features])


LINEARS: Mapping[str, type[QuantizedLinear]] = {kind.weights: kind for kind in (Int8Linear, Int4Linear)}


def _torch_pack(weight_NK: torch.Tensor) -> torch.ScriptObject:
    scale_N = (weight_NK.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny).double()
    zero_N = torch.zeros(weight_NK.shape[0], dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch 2.13 without a replacement for CPUs
        quantized = torch.quantize_per_channel(weight_NK, scale_N, zero_N, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _torch_int8_linear(x_MK: torch.Tensor, prepacked: torch.ScriptObject) -> torch.Tensor:
    """x ~ scale * (4096 * high + 64 * middle + low), each within the 7 bits that AVX2's 16-bit pair sums can take."""
    scale_M1 = (x_MK.abs().amax(dim=1, keepdim=True) / 256_000).clamp_min(torch.finfo(torch.float32).tiny)
    steps_MK = (x_MK / scale_M1).round()
    high_MK = (steps_MK / 4096).round()
    rest_MK = steps_MK - 4096 * high_MK
    middle_MK = (rest_MK / 64).round()
    parts_3MK = torch.cat([high_MK, middle_MK, rest_MK - 64 * middle_MK])
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(parts_3MK, 1.0, 64, prepacked)
    high_MN, middle_MN, low_MN = product.chunk(3)
    return (4096 * high_MN + (64 * middle_MN + low_MN)) * scale_M1


@functools.cache
def check_product(weights: QuantizedWeights) -> None:
    """Raises UnsupportedOptionError where neither the native library nor torch has an int8 product: of int4 models it
    is the LM head's."""
    if native.library():
        return
    try:
        _torch_int8_linear(torch.ones(1, 64), _torch_pack(torch.ones(16, 64)))
    except (RuntimeError, AttributeError) as error:
        trouble = str(error).strip().partition("\n")[0]
        raise UnsupportedOptionError(
            f"weights={weights!r} has no product on this machine: leave it out. Torch has none (its trial: {trouble}), "
            f"and the native kernels are missing: {native.describe()}"
        ) from error
