"""Whether a model has changed since something was made of it: weights edited or replaced, adapters put in or switched.

Cheap enough for the start of every call: well under a millisecond for 200 weights.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from specdec.kernels.model.prepared import prepared

_NUM_SAMPLES = 8
"""Values of each weight that are looked at, for edits (under `.data`) that torch does not count."""
_STOCK = ("torch", "transformers")
"""Packages whose modules have no switches: what an adapter library adds to a model does."""

State = tuple[object, ...]


def structure_of(model: nn.Module) -> int:
    """Changes when modules of other classes come into the model or leave it, or it is prepared."""
    return hash((prepared(model), *map(type, model.modules())))


def structure_name(model: nn.Module) -> str:
    """The same as `structure_of`, in every process."""
    kinds = "\n".join(f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules())
    return f"{prepared(model)} {hashlib.sha256(kinds.encode()).hexdigest()}"


@torch.no_grad()
def state_of(model: nn.Module) -> State:
    """Equal as long as the model computes the same.

    Covers weights and persistent buffers (which they are, where they lie, torch's count of edits, a few values), the
    classes of all modules and the switches of those that adapter libraries bring. Not covered: hooks; and an edit under
    `.data` of a few values that are not looked at.
    """
    seen: list[object] = []
    samples: defaultdict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for module in model.modules():
        seen.append(type(module))
        if type(module).__module__.partition(".")[0] not in _STOCK:
            seen.extend(_switches(module))
        for tensor in _tensors(module):
            edits = None if tensor.is_inference() else tensor._version
            seen.append((id(tensor), tensor.data_ptr(), edits))
            if tensor.is_cpu and (size := tensor.numel()):
                samples[tensor.dtype].append(_sample(tensor, size))
    values = [torch.cat(few).view(torch.uint8).numpy().tobytes() for few in samples.values()]
    return hash(tuple(seen)), *values


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = [tensor for tensor in module._parameters.values() if tensor is not None]
    if module._buffers:
        temporary = module._non_persistent_buffers_set
        tensors += [own for name, own in module._buffers.items() if own is not None and name not in temporary]
    return [part for tensor in tensors for part in parts_of(tensor)]


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor of another library is made of, such as the integers and scales of a quantised weight."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def _sample(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Values from the first to the last, in all columns."""
    if not tensor.is_contiguous():
        return tensor[(slice(1),) * tensor.dim()].flatten()
    return tensor.as_strided((min(_NUM_SAMPLES, size),), (max((size - 1) // (_NUM_SAMPLES - 1), 1),))


def _switches(module: nn.Module) -> Iterator[str]:
    """Names and settings that say which adapter is active, and how strongly; counters are none."""
    for name, value in vars(module).items():
        parts = value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if name != "training" and all(map(_is_setting, parts)):
            yield f"{name}={value!r}"


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, bool | float | str)
