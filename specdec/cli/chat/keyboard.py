"""The keys while a reply is written: Ctrl-C stops it, what is typed ahead is kept for the next line, not shown."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

try:
    import termios
except ImportError:  # Windows, where a terminal that is not read does not show keys
    termios = None  # type: ignore[assignment]


@contextlib.contextmanager
def stoppable(has_begun: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed; a second one, or one before there is anything, is a `KeyboardInterrupt`."""
    is_stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped or not has_begun():
            raise KeyboardInterrupt
        is_stopped = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as a background process is started
        signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: is_stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def unseen_keys() -> Iterator[None]:
    """Let the terminal not show keys as they are typed: they would mix with the reply."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    local_modes = before[3]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:3], local_modes & ~termios.ECHO, *before[4:]])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
