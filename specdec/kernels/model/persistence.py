"""What may be done with an int8 or int4 model: it is pickled and copied whole, and stays float32 on the CPU (bfloat16
on its device, if that is a GPU).

The kernels read scales as float32 from the addresses that they are given, so a cast or a move would make them read
something else; and a state dict would come without the linears. Both are refused before anything has changed.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels import native

_BLOCKS = {5: (6, 8 * 22), 6: (14, 210), 9: (8, 8 * 34)}
"""GGUF's types by what common.h calls the bits of their packed weights, where `pack` makes none such; with the bytes
of 256 weights."""

Convert = Callable[[torch.Tensor], torch.Tensor]


def guard(module: nn.Module, weights: str, like: torch.Tensor | None = None) -> None:
    """For a module that holds quantised linears: refuse what they refuse before its other parts have changed.

    Args:
        like: a tensor of the dtype and on the device where they stay; None for float32 on the CPU.
    """
    module.__dict__["_apply"] = _Conversion(module, weights, torch.zeros(1) if like is None else like)
    module.register_load_state_dict_pre_hook(functools.partial(refuse_loading, weights))
    for name in ("save_pretrained", "push_to_hub"):
        if hasattr(type(module), name):
            module.__dict__[name] = functools.partial(refuse_saving, weights)


def check_conversion(convert: Convert, weights: str, like: torch.Tensor | None = None) -> None:
    """What `to`, `half`, `cuda`, ... are about to do with every tensor must leave such a one as it is.

    Args:
        like: float32 on the CPU, if it is not given.

    Raises:
        UnsupportedOptionError: it does not.
    """
    like = torch.zeros(1) if like is None else like
    try:
        converted = convert(like)
    except (RuntimeError, AssertionError) as error:  # a device that is not there
        raise UnsupportedOptionError(_stays(weights, like, f"what was asked for ({error})")) from error
    if (converted.dtype, converted.device) != (like.dtype, like.device):
        raise UnsupportedOptionError(_stays(weights, like, _place(converted)))


def _stays(weights: str, like: torch.Tensor, what: str) -> str:
    return (
        f"an {weights}-prepared model stays {_place(like)}, and cannot become {what}: load the checkpoint again, "
        f"convert that, and leave prepare(weights={weights!r}) out (or prepare it as it is now)"
    )


def _place(tensor: torch.Tensor) -> str:
    where = "the CPU" if tensor.is_cpu else str(tensor.device)
    return f"{str(tensor.dtype).removeprefix('torch.')} on {where}"


class _Conversion:
    """In the place of a module's `_apply`, through which all conversions go, children first."""

    def __init__(self, module: nn.Module, weights: str, stays: torch.Tensor) -> None:
        self.module, self.weights, self.stays = module, weights, stays

    def __call__(self, fn: Convert, recurse: bool = True) -> nn.Module:
        check_conversion(fn, self.weights, self.stays)
        return type(self.module)._apply(self.module, fn, recurse)


def refuse_saving(weights: str, *_: Any, **__: Any) -> NoReturn:
    raise UnsupportedOptionError(
        f"an {weights}-prepared model has no float weights to save: save the model before prepare(), and prepare it "
        "again when it is loaded (torch.save(model) and pickle keep it whole, for machines with the same kernels)"
    )


def refuse_loading(weights: str, *_: Any, **__: Any) -> NoReturn:
    raise UnsupportedOptionError(
        f"an {weights}-prepared model takes no state dict, for its float weights are gone: load the weights into the "
        f"float model, then call prepare(model, weights={weights!r})"
    )


@functools.lru_cache(maxsize=4)
def layout(library: native.Library | None, bits: int) -> str:
    """Names how weights are packed here: a digest of a packed matrix that is always the same."""
    if library is None:
        return "torch"
    if bits in _BLOCKS:
        block_type, row_bytes = _BLOCKS[bits]
        packed, _ = library.repack(block_type, np.arange(64 * row_bytes, dtype=np.uint8) % 59, None, 64, 256)
    else:
        numbers = torch.arange(64.0 * 256).reshape(64, 256).sin()
        packed, _ = library.pack(15.0 * (numbers > 0), bits)  # numbers that no search for a scale rounds
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]


def check_layout(saved: str, bits: int, weights: str) -> None:
    """Refuse weights that this machine's kernels would read as others.

    Raises:
        UnsupportedModelError: they were packed by other kernels.
    """
    if saved != layout(native.library(), bits):
        raise UnsupportedModelError(
            f"the {weights} weights were packed by other kernels than those of this machine ({native.describe()}): "
            f"load the float checkpoint and call specdec.prepare(model, weights={weights!r}) here"
        )
