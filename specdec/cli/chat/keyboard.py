"""The keys while a reply is written: Ctrl-C stops it, what is typed ahead is kept for the next line, not shown."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

try:
    import termios
except ImportError:  # Windows, where a terminal that is not read does not show keys
    termios = None  # type: ignore[assignment]


class Interrupt:
    """Ctrl-C during a reply: the first one asks to stop, any further one raises `KeyboardInterrupt`.

    Args:
        can_stop: whether there is something that would notice; if not, the first one raises too.
    """

    def __init__(self, can_stop: Callable[[], bool]):
        self.asked = False
        self._can_stop = can_stop

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.asked or not self._can_stop():
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def handling(interrupt: Interrupt) -> Iterator[None]:
    """Let `interrupt` answer to Ctrl-C, unless this process was started to ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def unseen_keys() -> Iterator[None]:
    """Let the terminal not show keys as they are typed: they would mix with the reply."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
