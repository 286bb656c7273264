"""What a device took, where the host runs ahead of it: the host's clock would tell how long launches take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch


class Event(Protocol):
    """As `torch.cuda.Event`: a moment in what a device has been given to do."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds until another one."""
        ...


_stand_in: ContextVar[Callable[[], Event] | None] = ContextVar("events_stand_in", default=None)


@contextmanager
def standing_in(make: Callable[[], Event]) -> Iterator[None]:
    """For tests: within, all devices have such events."""
    token = _stand_in.set(make)
    try:
        yield
    finally:
        _stand_in.reset(token)


def _event_on(device: torch.device) -> Event | None:
    """One that is recorded now; None on a device that the host never runs ahead of."""
    make = _stand_in.get()
    if make is None:
        if device.type != "cuda":
            return None
        with torch.cuda.device(device):
            event = cast(Event, torch.cuda.Event(enable_timing=True))
            event.record()
        return event
    event = make()
    event.record()
    return event


class DeviceSpan:
    """From now until `end`, on a device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._first = _event_on(device)
        self._last: Event | None = None

    def end(self) -> None:
        self._last = None if self._first is None else _event_on(self._device)

    def seconds(self, on_host: float) -> float:
        """What the device took; `on_host` where the host does not run ahead of it.

        To be asked once the host has waited for something that was launched later: then nothing is waited for here.
        """
        if self._first is None or self._last is None:
            return on_host
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1000
