"""Numbers of the host on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_WITHOUT_PINNED_MEMORY = ("cpu", "mps", "meta")


def upload(numbers: Any, device: torch.device | str) -> Tensor:
    """int64 or bool numbers as a tensor of the device, without waiting for what the device is still at.

    A copy from ordinary memory blocks the host until the device has come to it. From pinned memory it is queued; the
    allocator gives the memory to nobody else before it is done.

    Args:
        numbers: an array (on a CPU the tensor is a view of it), or integers in nested sequences of equal lengths.
    """
    device = torch.device(device)
    tensor = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else torch.tensor(numbers, dtype=torch.long)
    if device.type in _WITHOUT_PINNED_MEMORY or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
