"""Which linears of a model get packed weights, and where these come from: the cache, or the float ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from specdec.kernels import native
from specdec.kernels.model.linear import is_dense
from specdec.kernels.model.packed_file import Entry, PackedFile, as_float32, release
from specdec.kernels.model.persistence import layout
from specdec.kernels.model.quantized_linear import Int8Linear, QuantizedLinear
from specdec.kernels.model.weight_readers import read_by_others

_FLOAT = "float32."
"""Begins the names of tensors that are no linear's weights."""
_SMALL_BYTES = 1 << 20
"""What is smaller is not worth a place in the file."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The linears of a model that are to be replaced, and what with.

    Args:
        kinds: by linear.
        names: of the linears and of other tensors.
        tensors: mapped from the cache; empty where nothing is kept.
    """

    kinds: Mapping[nn.Linear, type[QuantizedLinear]]
    names: Mapping[nn.Module | torch.Tensor, str] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, kind: type[QuantizedLinear], files: str | None, *, keeps_weights: bool
    ) -> PackedWeights:
        """
        Args:
            files: that the model was loaded from, None if it was not, or has changed since.
            keeps_weights: whether the float weights will still be needed.
        """
        if files is None or native.library() is None:
            return cls(_kinds(model, kind))
        names = _names(model)
        file = PackedFile(files, str(_dtypes(model)), *(layout(native.library(), bits) for bits in (kind.bits, 8)))
        tensors = file.open()
        if tensors is not None:
            kinds = {
                linear: _kind(model, linear, kind)
                for linear, name in names.items()
                if isinstance(linear, nn.Linear) and f"{name}.packed" in tensors
            }
        else:
            kinds = _kinds(model, kind)
            entries = _entries(model, names, kinds, done=_do_nothing if keeps_weights else release)
            tensors = file.write(dict(entries)) if kinds else None
        return cls(kinds, names, tensors or {})

    def make(self, linear: nn.Linear) -> QuantizedLinear:
        """What replaces a linear."""
        name = self.names.get(linear)
        own = ((part, self.tensors.get(f"{name}.{part}")) for part in ("packed", "scale"))
        packed = {part: tensor for part, tensor in own if tensor is not None}
        return self.kinds[linear](linear, packed or None)

    def float32(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor that is no linear's weight, in another one."""
        kept = self.tensors.get(f"{_FLOAT}{self.names.get(tensor)}")
        return tensor.detach().float() if kept is None else kept


def _kinds(model: nn.Module, kind: type[QuantizedLinear]) -> dict[nn.Linear, type[QuantizedLinear]]:
    read = read_by_others(model)
    linears = (module for module in model.modules() if type(module) is nn.Linear)
    return {linear: _kind(model, linear, kind) for linear in linears if is_dense(linear.weight) and linear not in read}


def _kind(model: nn.Module, linear: nn.Linear, kind: type[QuantizedLinear]) -> type[QuantizedLinear]:
    return Int8Linear if linear is head_of(model) else kind


def head_of(model: nn.Module) -> nn.Module | None:
    """The LM head, if the model has one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _names(model: nn.Module) -> dict[nn.Module | torch.Tensor, str]:
    named: dict[nn.Module | torch.Tensor, str] = {}
    named.update((module, name) for name, module in model.named_modules())
    named.update((tensor, name) for name, tensor in (*model.named_parameters(), *model.named_buffers()))
    return named


def _dtypes(model: nn.Module) -> list[str]:
    return sorted({str(tensor.dtype) for tensor in model.parameters()})


def _entries(
    model: nn.Module,
    names: Mapping[nn.Module | torch.Tensor, str],
    kinds: Mapping[nn.Linear, type[QuantizedLinear]],
    done: Callable[[torch.Tensor], None],
) -> Iterator[tuple[str, Entry]]:
    """
    Args:
        done: is told of what will not be read again soon.
    """
    for linear, kind in kinds.items():
        once = _Once(linear, kind, done)
        for part, (dtype, shape) in kind.packed_shapes(linear).items():
            yield f"{names[linear]}.{part}", Entry(dtype, shape, partial(once.take, part))
    for module in model.modules():
        if module in kinds:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and _is_converted(tensor) and tensor.nbytes >= _SMALL_BYTES:
                yield f"{_FLOAT}{names[tensor]}", as_float32(tensor, done)


def _is_converted(tensor: torch.Tensor) -> bool:
    return is_dense(tensor) and tensor.is_floating_point() and tensor.dtype != torch.float32


class _Once:
    """Packs a linear when the first of its tensors is asked for, and forgets them as they are taken."""

    def __init__(self, linear: nn.Linear, kind: type[QuantizedLinear], done: Callable[[torch.Tensor], None]):
        self._linear, self._kind, self._done = linear, kind, done
        self._packed: dict[str, torch.Tensor] = {}

    def take(self, part: str) -> list[torch.Tensor]:
        if not self._packed:
            self._packed = self._kind.pack(self._linear)
            self._done(self._linear.weight)
        return [self._packed.pop(part)]


def _do_nothing(_: torch.Tensor) -> None:
    pass
