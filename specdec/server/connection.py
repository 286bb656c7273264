"""A connection that does not wait for ever: for the head of a request, or for its client to read."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdec.server.options import ServerOptions

LEAST_READ_BYTES = 1 << 16
"""What a client must read in `write_timeout`, or all that is there."""


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
        self._watch_writing()

    def resume_writing(self) -> None:
        self._stop_write_timer()
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

    def _watch_writing(self) -> None:
        waiting = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() > waiting - LEAST_READ_BYTES:
                self.transport.abort()
            else:
                self._watch_writing()

        self._write_timer = self.loop.call_later(self._options.write_timeout, check)

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
