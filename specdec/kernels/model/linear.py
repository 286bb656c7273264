"""Float linears for a handful of rows, and bfloat16 ones for any number. quantized_linear.py has those of packed
weights.

Shape letters: M rows, K inputs, N outputs.
"""

import functools
import itertools
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from specdec.disk_cache.measurements import keep, recall
from specdec.kernels import native
from specdec.kernels.native import structs

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

    Within 1e-5 (relative) of `F.linear`. With native kernels, rows are also bit-identical for every M from 1 to 32. A
    bfloat16 linear's are for every M: products are summed in float32, then rounded to bfloat16.
    """
    weight = linear.weight
    num_rows = x.numel() // max(x.shape[-1], 1)
    grows_graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not num_rows or grows_graph or x.dtype is not weight.dtype or not is_plain(weight):
        return F.linear(x, weight, linear.bias)
    if weight.dtype is torch.bfloat16:
        library = native.library()
        if library is None:  # a pickled model may come to a machine without
            return F.linear(x, weight, linear.bias)
        out_MN = library.linear(float_matrix(linear), x.reshape(num_rows, -1).float())
        return out_MN.reshape(*x.shape[:-1], linear.out_features).bfloat16()
    if num_rows > BANDS[-1]:
        return F.linear(x, weight, linear.bias)
    choice = choices[next(band for band in BANDS if num_rows <= band)]
    if choice == STOCK or (choice == TURNED and num_rows == 1):
        return F.linear(x, weight, linear.bias)
    out_MN = _product(choice, linear, x.reshape(num_rows, -1).contiguous())
    return out_MN.reshape(*x.shape[:-1], linear.out_features)


def float_matrix(linear: nn.Linear) -> structs.Matrix:
    """The weights as they lie in memory; of a bfloat16 bias a copy in float32."""
    sizes = linear.out_features, linear.in_features
    bias_N = None if linear.bias is None else linear.bias.detach().float()
    return native.matrix(linear.weight, *sizes, bits=8 * linear.weight.element_size(), scale=None, bias=bias_N)


def is_dense(weight: torch.Tensor) -> bool:
    """Whether a tensor is torch's own: another library's, such as a quantised weight, has no values at its address."""
    return type(weight) in (torch.Tensor, nn.Parameter)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor where it lies: float32 or bfloat16."""
    is_float = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return is_float and is_dense(weight) and weight.is_contiguous()


def _product(choice: str, linear: nn.Linear, x_MK: torch.Tensor) -> torch.Tensor:
    library = native.library()
    if choice == NATIVE and library:  # a pickled model may come to a machine without
        return library.linear(float_matrix(linear), x_MK)
    return turned(x_MK, linear.weight, linear.bias) if choice == TURNED else F.linear(x_MK, linear.weight, linear.bias)


_calibrated: dict[tuple[int, int, int], dict[int, str]] = {}  # by (N, K, threads): a property of this machine


@torch.no_grad()
def calibrate(linears: Sequence[nn.Linear]) -> dict[int, str]:
    """Times the candidates on linears of one shape; remembers the choices, for later processes too."""
    n, k = linears[0].weight.shape
    key = (n, k, torch.get_num_threads())
    if key not in _calibrated:
        on_disk = "products", *key, native.identity()
        choices = _as_choices(recall(on_disk))
        if choices is None:
            choices = _choose(_time_candidates(_sample(linears)))
            keep(on_disk, list(choices.values()))
        _calibrated[key] = choices
    return _calibrated[key]


def _as_choices(kept: object) -> dict[int, str] | None:
    if not isinstance(kept, list) or len(kept) != len(BANDS) or not set(kept) <= {STOCK, TURNED, NATIVE}:
        return None
    return dict(zip(BANDS, kept, strict=True))


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
