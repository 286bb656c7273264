"""The body of a request: how large it may be, how long it may take, and what becomes of one that nobody reads."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus

from fastapi import HTTPException
from starlette.types import Message, Receive

from specdec.server.errors import ApiError

DISCARDED_BYTES = 1 << 25
DISCARD_SECONDS = 5.0
"""What is read of a body after its request has been answered: a client that sends everything before it reads gets the
answer, which a socket closed with unread data would take away again."""

_CLOSE = {"Connection": "close"}


class Body:
    """What a request sends after its head. The clock runs from the making of this object.

    Args:
        receive: of the ASGI server.
        max_bytes: of the whole body.
        timeout: seconds until the whole body must have arrived. What comes after it may take for ever.
    """

    def __init__(self, receive: Receive, *, max_bytes: int, timeout: float):
        self.is_complete = False
        self._receive = receive
        self._max_bytes, self._timeout = max_bytes, timeout
        self._num_bytes = 0
        self._deadline = asyncio.get_running_loop().time() + timeout

    async def receive(self) -> Message:
        """The next message, as of ASGI.

        Raises:
            HTTPException: the body is too large (413), or late (408).
        """
        if self.is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next()
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {self._timeout:g} s", headers=_CLOSE
            ) from None
        if self._num_bytes > self._max_bytes:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(self._max_bytes), headers=_CLOSE)
        return message

    async def discard(self) -> None:
        """Read on after the answer, for a while."""
        most = self._num_bytes + DISCARDED_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self.is_complete and self._num_bytes < most:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.is_complete = not message.get("more_body", False)  # a client that has left sends nothing more either
        self._num_bytes += len(message.get("body", b""))
        return message


def announced_too_large(lengths: list[bytes], max_bytes: int) -> ApiError | None:
    """413 if a Content-Length, of which the parser has let one pass at most, is too large."""
    if not lengths or int(lengths[0]) <= max_bytes:
        return None
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large(max_bytes), headers=_CLOSE)


def two_lengths() -> ApiError:
    """400 for a body whose end can be told in two ways, of which a proxy may have taken the other one."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        "the request has both Transfer-Encoding and Content-Length: send one of them",
        code="two_lengths",
        headers=_CLOSE,
    )


def _too_large(max_bytes: int) -> str:
    return f"the body is too large: at most {max_bytes} bytes are allowed"
