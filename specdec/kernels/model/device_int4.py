"""Linears of 4 bits on a CUDA device, by torchao: the weights that PyTorch's own 4-bit product reads.

That product sums up every row in tiles of 16 and in one order, whatever is beside it, and asks the host nothing: so
verified tokens get what they get alone, and a forward can be captured in a CUDA graph. It reads weights once for 16
rows, so that reading a prompt is slower than with bfloat16 weights. Not measured on a GPU yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import nn

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels.model.linear import is_dense
from specdec.kernels.model.packing import head_of
from specdec.kernels.model.weight_readers import read_by_others

WEIGHTS = "int4"
GROUP = 32
"""Inputs that share a scale and an offset in bfloat16: with them a weight has 5 bits, as on a CPU."""
DTYPE = torch.bfloat16
_LEAST_CAPABILITY = (8, 0)
_INSTALL = "pip install 'specdec-runtime[int4]'"

Quantise = Callable[[nn.Module, Collection[nn.Module]], None]
"""Gives some linears of a model, which are in it, weights of 4 bits in the place of their own."""
_stand_in: ContextVar[Quantise | None] = ContextVar("int4_stand_in", default=None)


@contextmanager
def standing_in(quantise: Quantise) -> Iterator[None]:
    """For tests: within, models on any device get 4-bit linears as on a CUDA device, by this."""
    token = _stand_in.set(quantise)
    try:
        yield
    finally:
        _stand_in.reset(token)


def serves(model: nn.Module) -> bool:
    """Whether the linears of a model are quantised here, and not by the kernels for a CPU."""
    return _stand_in.get() is not None or any(parameter.is_cuda for parameter in model.parameters())


def quantise(model: nn.Module, weights: str) -> tuple[list[nn.Linear], list[str]]:
    """Give the linears of a model 4 bits, in place: all but the LM head, and those that cannot have them.

    Args:
        weights: what is asked for.

    Returns:
        the linears; the names of the others but the head, an asterisk standing for the number of a layer.

    Raises:
        UnsupportedModelError: there is no such product for the model or the device.
        UnsupportedOptionError: torchao is not installed.
    """
    if weights != WEIGHTS:
        raise UnsupportedModelError(
            f"weights={weights!r} is for models on the CPU; on a CUDA device there is weights={WEIGHTS!r}"
        )
    chosen, left = _divide(model)
    if (reason := _why_not(model, chosen)) is not None:
        raise UnsupportedModelError(
            f"weights={WEIGHTS!r} on a CUDA device is not possible with {type(model).__name__}: {reason}"
        )
    stand_in = _stand_in.get()
    if stand_in is None and not is_installed():
        raise UnsupportedOptionError(f"weights={WEIGHTS!r} on a CUDA device needs torchao: {_INSTALL}")
    (stand_in or _quantise_by_torchao)(model, chosen)
    return chosen, left


def is_installed() -> bool:
    """Without importing it, which takes seconds."""
    return find_spec("torchao") is not None


def describe(model: nn.Module | None = None) -> str:
    """A line for people: of this machine, or of what a model would have on a GPU in bfloat16."""
    if model is None:
        return "by torchao, for bfloat16 models (not measured)" if is_installed() else f"needs torchao: {_INSTALL}"
    chosen, left = _divide(model, dtype=None)
    number = f"{len(chosen)} linears of 4 bits" if chosen else "no linear can have 4 bits"
    return f"{number}{'; stay as they are: ' * bool(left)}{', '.join(left)}"


def _divide(model: nn.Module, dtype: torch.dtype | None = DTYPE) -> tuple[list[nn.Linear], list[str]]:
    """
    Args:
        dtype: that weights need; None if any will do.
    """
    head, read = head_of(model), read_by_others(model)
    chosen: list[nn.Linear] = []
    left: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        fits = is_dense(module.weight) and dtype in (None, module.weight.dtype) and module.in_features % GROUP == 0
        if type(module) is nn.Linear and module not in read and fits:
            chosen.append(module)
        else:
            left.add(re.sub(r"\.\d+\.", ".*.", name))
    return chosen, sorted(left)


def _why_not(model: nn.Module, chosen: Collection[nn.Linear]) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "it is split over devices, or accelerate moves its weights"
    if not chosen:
        dtypes = {str(module.weight.dtype) for module in model.modules() if isinstance(module, nn.Linear)}
        return (
            f"the product is for weights in bfloat16, for a multiple of {GROUP} inputs, and its linears are "
            f"{' and '.join(sorted(dtypes))}: load it with dtype=torch.bfloat16"
        )
    device = devices.pop()
    if device.type != "cuda":  # something stands in
        return None
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm, where it has not been tried"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None


def _quantise_by_torchao(model: nn.Module, chosen: Collection[nn.Module]) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    # the settings of PyTorch's compiler, which it would change, are the user's
    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    taken = set(chosen)
    quantize_(model, config, filter_fn=lambda module, _: module in taken)
