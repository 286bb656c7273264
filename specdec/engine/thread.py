"""An engine in a thread of its own, for callers in other threads."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import Self

import torch

from specdec.engine.adapters import LoraEngine
from specdec.engine.engine import Engine
from specdec.engine.request import Generation, Request


class EngineThread:
    """Runs an engine from its making until it is closed; sleeps when there is nothing to do.

    `submit` and `cancel` may be called from any thread, callbacks included. The requests' own callbacks run in the
    engine's thread: they must return quickly.
    """

    def __init__(self, engine: Engine | LoraEngine):
        self.engine = engine
        self._submitting = threading.Lock()
        self._cancelled: deque[Generation] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._aborting = False
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="specdec-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        """As `Engine.submit`; it returns as soon as the request is queued.

        Raises:
            RuntimeError: the thread has been closed.
        """
        with self._submitting:
            if self._closing:
                raise RuntimeError("the engine has been closed: it takes no more requests")
            generation = self.engine.submit(request)
        self._wake.set()
        return generation

    def cancel(self, generation: Generation) -> None:
        """As `Engine.cancel`, done between two rounds; returns at once."""
        self._cancelled.append(generation)
        self._wake.set()

    def close(self, timeout: float | None = None) -> None:
        """Stop: wait until what is under way is finished, `timeout` seconds at most, then cancel the rest.

        Args:
            timeout: None waits for as long as it takes; 0 cancels at once.
        """
        with self._submitting:
            self._closing = True
        self._wake.set()
        if self._thread is threading.current_thread():  # a callback cannot wait for itself
            self._aborting = self._aborting or timeout == 0
            return
        self._thread.join(timeout)
        self._aborting = True
        self._wake.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else 0)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # a new thread would take as many as there are cores
        try:
            while not self._aborting:
                self._wake.clear()
                while self._cancelled:
                    self.engine.cancel(self._cancelled.popleft())
                if self.engine.step():
                    continue
                if self._closing and not self.engine.num_waiting:
                    break
                self._wake.wait()
        finally:
            self._closing = True
            self.engine.close()
