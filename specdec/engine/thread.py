"""An engine in a thread of its own, for callers in other threads."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from specdec.engine.engine import Engine
from specdec.engine.request import Generation, Request


class EngineThread:
    """Runs an engine for as long as the `with` block lasts; sleeps when there is nothing to do.

    `submit` and `cancel` may be called from any thread, callbacks included. The engine's own callbacks run in the
    thread: they must return quickly.
    """

    def __init__(self, engine: Engine):
        raise NotImplementedError

    def submit(self, request: Request) -> Generation:
        """As `Engine.submit`; it returns as soon as the request is queued.

        Raises:
            RuntimeError: the thread has been closed.
        """
        raise NotImplementedError

    def cancel(self, generation: Generation) -> None:
        """As `Engine.cancel`, done between two rounds; returns at once."""
        raise NotImplementedError

    def close(self, timeout: float | None = None) -> None:
        """Stop: wait until what is under way is finished, `timeout` seconds at most, then cancel the rest.

        Args:
            timeout: None waits for as long as it takes; 0 cancels at once.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError
