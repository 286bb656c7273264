"""What stands before the application: who may come in, how large and how slow a body may be, what is counted."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Iterable
from http import HTTPStatus
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.server.body import Body, announced_too_large, two_lengths
from specdec.server.errors import ApiError
from specdec.server.options import ServerOptions, is_loopback
from specdec.server.pages import PAGE_PATHS

OPEN_PATHS = frozenset({"/health"}) | PAGE_PATHS
"""What needs no key."""


class AccessMiddleware:
    """An ASGI application around another one.

    Without a key, a server on the loopback answers only requests that name this machine as their host: otherwise a
    web page could reach it through a name that it lets point here (DNS rebinding).

    Args:
        record: told the path and the status of every answer.
        log: told of every answer that has ended: the request, the status, and the seconds since it came.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        record: Callable[[str, int], None],
        log: Callable[[Scope, int, float], None],
    ):
        self._app = app
        self._key = None if options.api_key is None else options.api_key.encode()
        self._checks_host = options.api_key is None and is_loopback(options.host)
        self._body_timeout = options.body_timeout
        self._max_body_bytes = options.max_body_bytes
        self._record = record
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started, status = perf_counter(), 0
        body = Body(receive, max_bytes=self._max_body_bytes, timeout=self._body_timeout)

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._record(scope["path"], message["status"])
            elif not message.get("more_body", False) and not body.is_complete:
                await send({**message, "more_body": True})  # the whole answer, but not its end
                await body.discard()
                message = {"type": "http.response.body"}
            await send(message)

        refusal = self._bad_length(scope) or self._refusal(scope)
        app = self._app if refusal is None else refusal.response()
        try:
            await app(scope, body.receive, send_and_record)
        finally:
            self._log(scope, status, perf_counter() - started)

    def _bad_length(self, scope: Scope) -> ApiError | None:
        lengths = _values(scope, b"content-length")
        if lengths and _values(scope, b"transfer-encoding"):
            return two_lengths()
        return announced_too_large(lengths, self._max_body_bytes)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._checks_host and not is_loopback(_host_of(_values(scope, b"host"))):
            return ApiError(
                HTTPStatus.FORBIDDEN,
                "the Host header does not name this machine: reach the server as 127.0.0.1 or localhost, or start it "
                "with an API key",
                code="wrong_host",
            )
        if self._key is None or scope["path"] in OPEN_PATHS:
            return None
        given = b"".join(_values(scope, b"authorization"))
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return ApiError(
            HTTPStatus.UNAUTHORIZED,
            "this server asks for its API key: send `Authorization: Bearer KEY`"
            if not given
            else "the API key is wrong",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def client_of(scope: Scope) -> str:
    """Who asks, where clients take turns: an address, of IPv6 a network of /64, whose addresses one host can all have.

    It is never what a client says of itself (a header, `user` of a body): that would be as many turns as it likes.
    """
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))


def _values(scope: Scope, name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]


def _host_of(values: list[bytes]) -> str:
    """The name in a Host header, without its port and the brackets of IPv6; "" if there is not exactly one."""
    if len(values) != 1:
        return ""
    host = values[0].decode("latin-1")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
