"""A connection that does not wait for ever: for the head of a request, or for its client to read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdec.server.options import ServerOptions

LEAST_READ_BYTES = 1 << 16
"""What a client that is behind must read in `write_timeout`."""


class Lag:
    """Seconds for which a client was behind, since it has read the last `LEAST_READ_BYTES` of what waited for it.

    One that reads a little now and then is not in time: it would hold its connection for hours.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self.seconds = 0.0
        self._clock = clock
        self._num_read = 0
        self._since, self._num_waiting = 0.0, 0

    def begin(self, num_waiting: int) -> None:
        """So many bytes wait."""
        self._since, self._num_waiting = self._clock(), num_waiting

    def update(self, num_waiting: int) -> None:
        """So many still do."""
        self.seconds += self._clock() - self._since
        self._num_read += self._num_waiting - num_waiting
        if self._num_read >= LEAST_READ_BYTES:
            self.seconds, self._num_read = 0.0, 0
        self.begin(num_waiting)


class Connection(H11Protocol):
    """Uvicorn's protocol with `header_timeout` and `write_timeout`.

    Neither ends an answer that takes long: the first runs only while no request is there, the second only while bytes
    wait that the client's socket does not take.
    """

    def __init__(self, *, options: ServerOptions, **uvicorn: Any):
        super().__init__(**uvicorn)
        self._options = options
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._lag = Lag(self.loop.time)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)  # told of all that the socket does not take at once
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._lag.begin(self.transport.get_write_buffer_size())
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        self._lag.update(0)
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # a body that nobody waits for
            self._close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun
            self.transport.close()

    def _watch_head(self) -> None:
        """The clock runs while a request is awaited; between two of them uvicorn's own does, until a byte comes."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._options.header_timeout, self._close)

    def _watch_reader(self) -> None:
        left = max(0.0, self._options.write_timeout - self._lag.seconds)
        self._write_timer = self.loop.call_later(left, self._check_reader)

    def _check_reader(self) -> None:
        self._lag.update(self.transport.get_write_buffer_size())
        if self._lag.seconds < self._options.write_timeout:
            self._watch_reader()
        else:
            self.transport.abort()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.conn.send(h11.ConnectionClosed())
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
