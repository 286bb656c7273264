"""Stands in for torchao on a GPU: values of 4 bits in weights that stay as large as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from specdec.kernels.model import device_int4


def rounded(weight_NK: Tensor) -> Tensor:
    """Sixteen values, evenly spread, for every group of inputs."""
    groups = weight_NK.detach().float().unflatten(1, (-1, device_int4.GROUP))
    lowest, highest = groups.aminmax(dim=2, keepdim=True)
    step = ((highest - lowest) / 15).clamp(min=1e-6)
    return (((groups - lowest) / step).round() * step + lowest).flatten(1).to(weight_NK.dtype)


def quantise(model: nn.Module, chosen: Collection[nn.Module]) -> None:
    """As torchao does it: in place, in other parameters."""
    for module in chosen:
        module.weight = nn.Parameter(rounded(module.weight), requires_grad=False)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    with device_int4.standing_in(quantise):
        yield
