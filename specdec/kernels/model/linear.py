"""The two linears: exact int8, and float32 for a handful of rows.

*Exact* means that a row's result is bit-identical whatever else is in the batch: each row is taken on its own and
summed in a fixed order. Shape letters: M rows, K inputs, N outputs.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from specdec.errors import UnsupportedOptionError
from specdec.kernels import native
from specdec.kernels.model import persistence
from specdec.kernels.native import structs


class Int8Linear(nn.Module):
    """An `nn.Linear` with int8 weights (one scale per output). Inference only.

    Natively, rows are quantised as they come (8 bits with a scale per 64 inputs), or stay float32 where `weight_only`.
    A quantised row jumps by a whole step when a rounding before it moves a value over the edge of one, so rows may be
    quantised only where nothing before them rounds differently in another company: `prepare` decides. In torch, whose
    int8 product takes 7 bits and one scale, each row goes in as three 7-bit parts (weights are read once for all) and
    is 20 bits exact: a jump is then as small as a rounding.
    """

    weight_only = False

    packed: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Copies nothing but the bias: the float weights can go as soon as `linear` does."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight_NK = linear.weight.detach().float().contiguous()
        bias_N = None if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("bias", bias_N, persistent=False)
        self.library = native.library()
        self.prepacked = None
        if self.library:
            packed, scale_N = self.library.pack(weight_NK)
            self.register_buffer("packed", packed, persistent=False)
            self.register_buffer("scale", scale_N, persistent=False)
        else:
            self.prepacked = _torch_pack(weight_NK)

    def matrix(self) -> structs.Matrix:
        return native.matrix(self.packed, self.out_features, self.in_features, self.scale, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_MK = x.detach().reshape(-1, self.in_features).float().contiguous()
        if self.library:
            out_MN = self.library.linear(self.matrix(), x_MK, weight_only=self.weight_only)
        else:
            assert self.prepacked is not None
            out_MN = _torch_int8_linear(x_MK, self.prepacked)
            out_MN = out_MN if self.bias is None else out_MN + self.bias
        return out_MN.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        kind = "torch" if not self.library else "native, weight-only" if self.weight_only else "native"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"

    def __deepcopy__(self, memo: dict[int, object]) -> "Int8Linear":
        return self  # immutable, and possibly large: copies of a model share it

    # what a module is converted, saved and loaded by: see persistence.py

    def _apply(self, fn: persistence.Convert, recurse: bool = True) -> "Int8Linear":
        persistence.check_conversion(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *_: Any) -> None:
        persistence.refuse_saving()

    def _load_from_state_dict(self, *_: Any) -> None:
        persistence.refuse_loading()

    def __getstate__(self) -> dict[str, Any]:
        weight = None if self.prepacked is None else torch.ops.quantized.linear_unpack(self.prepacked)[0]
        return {**self.__dict__, "library": None, "prepacked": weight, "layout": persistence.layout(self.library)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        persistence.check_layout(state.pop("layout"))
        super().__setstate__(state)
        self.library = native.library()
        if self.prepacked is not None:
            self.prepacked = torch.ops.quantized.linear_prepack(self.prepacked, None)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError("an int8-prepared linear has no float weight: load the model again for that")
        return super().__getattr__(name)


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
def check_int8() -> None:
    """Raises UnsupportedOptionError where neither the native library nor torch has an int8 product."""
    if native.library():
        return
    try:
        _torch_int8_linear(torch.ones(1, 64), _torch_pack(torch.ones(16, 64)))
    except (RuntimeError, AttributeError) as error:
        trouble = str(error).strip().partition("\n")[0]
        raise UnsupportedOptionError(
            f"weights='int8' has no product on this machine: leave it out. Torch has none (its trial: {trouble}), "
            f"and the native kernels are missing: {native.describe()}"
        ) from error


# ---- float32 ----

BANDS = (2, 4, 8, 16, 32)  # a batch of M rows uses the choice made for the first band >= M
STOCK, TURNED, NATIVE = "stock", "turned", "native"
_NATIVE_TOLERANCE = 2  # bit-identical rows and fused layers are worth that, and timings on a busy machine are no better
_CALIBRATION_SECONDS = 0.3  # per shape; a machine too busy to finish in that keeps the default
_CALIBRATION_BYTES = 100 << 20  # of weights: more than the caches hold, as in a real forward


def turned(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` with the weights as the left operand: for a few rows, BLAS then streams them once."""
    out_MN = (weight_NK @ x_MK.T).T
    return out_MN if bias_N is None else out_MN + bias_N


def float_linear(linear: nn.Linear, choices: dict[int, str], x: torch.Tensor) -> torch.Tensor:
    """The forward of a prepared `nn.Linear`: the product that calibration found best for this number of rows.

    Within 1e-5 (relative) of `F.linear`. With native kernels, rows are also bit-identical for every M from 1 to 32.
    """
    weight = linear.weight
    num_rows = x.numel() // max(x.shape[-1], 1)
    grows_graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not 0 < num_rows <= BANDS[-1] or grows_graph or x.dtype is not torch.float32 or not is_plain(weight):
        return F.linear(x, weight, linear.bias)
    choice = choices[next(band for band in BANDS if num_rows <= band)]
    if choice == STOCK or (choice == TURNED and num_rows == 1):
        return F.linear(x, weight, linear.bias)
    out_MN = _product(choice, linear, x.reshape(num_rows, -1).contiguous())
    return out_MN.reshape(*x.shape[:-1], linear.out_features)


def float_matrix(linear: nn.Linear) -> structs.Matrix:
    return native.matrix(linear.weight, linear.out_features, linear.in_features, None, linear.bias)


def is_dense(weight: torch.Tensor) -> bool:
    """Whether a tensor is torch's own: another library's, such as a quantised weight, has no values at its address."""
    return type(weight) in (torch.Tensor, nn.Parameter)


def is_plain(weight: torch.Tensor) -> bool:
    is_float = weight.dtype is torch.float32 and weight.device.type == "cpu"
    return is_float and is_dense(weight) and weight.is_contiguous()


def _product(choice: str, linear: nn.Linear, x_MK: torch.Tensor) -> torch.Tensor:
    library = native.library()
    if choice == NATIVE and library:  # a pickled model may come to a machine without
        return library.linear(float_matrix(linear), x_MK)
    return turned(x_MK, linear.weight, linear.bias) if choice == TURNED else F.linear(x_MK, linear.weight, linear.bias)


_calibrated: dict[tuple[int, int, int], dict[int, str]] = {}  # by (N, K, threads): a property of this machine


@torch.no_grad()
def calibrate(linears: Sequence[nn.Linear]) -> dict[int, str]:
    """Times the candidates on linears of one shape; remembers the choices for the process."""
    n, k = linears[0].weight.shape
    key = (n, k, torch.get_num_threads())
    if key not in _calibrated:
        _calibrated[key] = _choose(_time_candidates(_sample(linears)))
    return _calibrated[key]


def _sample(linears: Sequence[nn.Linear]) -> list[nn.Linear]:
    """Enough linears to overflow the caches, and of a giant one (an LM head) only the first outputs."""
    n, k = linears[0].weight.shape
    rows = min(n, max(_CALIBRATION_BYTES // (4 * k), 64))
    sample = []
    for linear in linears[: 1 + _CALIBRATION_BYTES // (4 * n * k)]:
        part = nn.Linear(1, 1, bias=False)
        part.weight, part.in_features, part.out_features = nn.Parameter(linear.weight[:rows]), k, rows
        sample.append(part)
    return sample


def _time_candidates(sample: Sequence[nn.Linear]) -> dict[int, dict[str, float]]:
    """Seconds by band and candidate: the best of two interleaved passes over the sample, as far as time allows."""
    candidates = [NATIVE] * (native.library() is not None) + [TURNED, STOCK]
    times: dict[int, dict[str, float]] = {band: dict.fromkeys(candidates, float("inf")) for band in BANDS}
    deadline = time.perf_counter() + _CALIBRATION_SECONDS
    for _, band, candidate in itertools.product(range(2), BANDS, candidates):
        x_MK = torch.randn(band, sample[0].in_features)
        start = time.perf_counter()
        if start > deadline:
            break
        for linear in sample:
            _product(candidate, linear, x_MK)
        times[band][candidate] = min(times[band][candidate], time.perf_counter() - start)
    return times


def _choose(times: dict[int, dict[str, float]]) -> dict[int, str]:
    """The fastest per band; the native product everywhere if that costs little, since its rows are bit-identical."""
    fastest = {band: min(by_name, key=by_name.__getitem__) for band, by_name in times.items()}
    best_s = sum(min(by_name.values()) for by_name in times.values())
    if sum(by_name.get(NATIVE, float("inf")) for by_name in times.values()) <= _NATIVE_TOLERANCE * best_s:
        return dict.fromkeys(BANDS, NATIVE if NATIVE in times[BANDS[0]] else TURNED)
    return fastest


def small_batch_forward(linear: nn.Linear, choices: dict[int, str]) -> functools.partial[torch.Tensor]:
    return functools.partial(float_linear, linear, choices)
