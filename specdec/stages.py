"""Work that a caller waits for once: loading, packing, building kernels, timing forwards. It is logged, and timed.

The logger `specdec.stages` says at level INFO what begins and what it took; commands show it as a status line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OneOff:
    """What stages have taken: work that the next call will not do again."""

    seconds: float = 0.0


_counting: ContextVar[OneOff | None] = ContextVar("counting", default=None)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Tell that something begins that may take seconds, and how long it took.

    Args:
        what: "loading the demo model": the records begin with it, and have it as their attribute `stage`. Their
            `seconds` are None at the beginning.
    """
    logger.info("%s", what, extra={"stage": what, "seconds": None})
    outer = _counting.set(None)  # of stages within stages the outermost counts
    started = perf_counter()
    try:
        yield
    finally:
        seconds = perf_counter() - started
        _counting.reset(outer)
        if (one_off := _counting.get()) is not None:
            one_off.seconds += seconds
        logger.info("%s: %.1f s", what, seconds, extra={"stage": what, "seconds": seconds})


@contextmanager
def counted(one_off: OneOff) -> Iterator[None]:
    """Add the seconds of the stages of this thread to something."""
    before = _counting.set(one_off)
    try:
        yield
    finally:
        _counting.reset(before)
