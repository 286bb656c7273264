"""What may be done with an int8-prepared model: it is pickled and copied whole, and stays float32 on the CPU.

The kernels read scales as float32 from the addresses that they are given, so a cast or a move would make them read
something else; and a state dict would come without the linears. Both are refused before anything has changed.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels import native

Convert = Callable[[torch.Tensor], torch.Tensor]


def guard(module: nn.Module) -> None:
    """For a module that holds int8 linears: refuse what they refuse before its other parts have changed."""
    module.__dict__["_apply"] = _Conversion(module)
    module.register_load_state_dict_pre_hook(refuse_loading)
    for name in ("save_pretrained", "push_to_hub"):
        if hasattr(type(module), name):
            module.__dict__[name] = refuse_saving


def check_conversion(convert: Convert) -> None:
    """What `to`, `half`, `cuda`, ... are about to do with every tensor must leave float32 on the CPU as it is.

    Raises:
        UnsupportedOptionError: it does not.
    """
    try:
        converted = convert(torch.zeros(1))
        where = f"{str(converted.dtype).removeprefix('torch.')} on {converted.device.type}"
    except (RuntimeError, AssertionError) as error:  # a device that is not there
        raise UnsupportedOptionError(_stays(f"what was asked for ({error})")) from error
    if where != "float32 on cpu":
        raise UnsupportedOptionError(_stays(where))


def _stays(what: str) -> str:
    return (
        f"an int8-prepared model stays float32 on the CPU, and cannot become {what}: load the checkpoint again, "
        "convert that, and leave prepare(weights='int8') out (or prepare it here, on the CPU)"
    )


class _Conversion:
    """In the place of a module's `_apply`, through which all conversions go, children first."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Convert, recurse: bool = True) -> nn.Module:
        check_conversion(fn)
        return type(self.module)._apply(self.module, fn, recurse)


def refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedOptionError(
        "an int8-prepared model has no float weights to save: save the model before prepare(), and prepare it again "
        "when it is loaded (torch.save(model) and pickle keep it whole, for machines with the same kernels)"
    )


def refuse_loading(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedOptionError(
        "an int8-prepared model takes no state dict, for its float weights are gone: load the weights into the float "
        "model, then call prepare(model, weights='int8')"
    )


@functools.lru_cache(maxsize=4)
def layout(library: native.Library | None) -> str:
    """Names how weights are packed here: a digest of a packed matrix that is always the same."""
    if library is None:
        return "torch"
    packed, _ = library.pack(torch.arange(64.0 * 256).reshape(64, 256).sin())
    return hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]


def check_layout(saved: str) -> None:
    """Refuse weights that this machine's kernels would read as others.

    Raises:
        UnsupportedModelError: they were packed by other kernels.
    """
    if saved != layout(native.library()):
        raise UnsupportedModelError(
            f"the int8 weights were packed by other kernels than those of this machine ({native.describe()}): load "
            "the float checkpoint and call specdec.prepare(model, weights='int8') here"
        )
