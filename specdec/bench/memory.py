"""Peak memory of one call."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What `clear_refs` takes to set the peak resident size back to the current one; see proc(5)."""


class PeakMemory:
    """The highest memory in use since `reset()`: allocated on a CUDA device, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def mib(self) -> float | None:
        """None where the system does not tell: other accelerators, and CPUs outside Linux."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        if self._device.type == "cpu" and _CLEAR_REFS.exists():
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**10
        return None
