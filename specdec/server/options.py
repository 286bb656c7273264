"""What a server allows, checked before any model is loaded."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

_LEAST_KEY_LENGTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens, who may use it, and how much.

    Args:
        api_key: asked of every client; None asks nobody.
        allows_no_key: whether to listen beyond this machine without a key.
        proxy: the address of a reverse proxy whose X-Forwarded-For is believed: clients take turns by address. None
            believes nobody's.
        cors: origins whose pages may use the server from a browser, "*" for all; none if empty.
        logs: whether each request is told in one line, without anything that was asked or answered.
        max_body_bytes: of a request.
        max_new_tokens: of a reply.
        max_choices: of an answer: `n`, times the number of prompts.
        timeout: seconds in which an answer must be complete, the time in the queue included.
        header_timeout: seconds in which the head of a request must have arrived, from the beginning of a connection or,
            on one that has been used, from its first byte.
        body_timeout: seconds in which the whole body of a request must have arrived.
        write_timeout: seconds in which a client must read 64 KiB, or all that there is, once the buffers are full.
        planning_timeout: seconds in which its chat template must have been rendered, and its grammar compiled.
        grace: seconds that answers get to finish once the server is told to stop.

    Raises:
        ValueError: a value that makes no sense, or an address that is open to everyone.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allows_no_key: bool = False
    proxy: str | None = None
    cors: tuple[str, ...] = ()
    logs: bool = True
    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 4096
    max_choices: int = 8
    timeout: float = 600.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    planning_timeout: float = 30.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_new_tokens", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a positive number, got {getattr(self, name)}")
        for name in ("timeout", "header_timeout", "body_timeout", "write_timeout", "planning_timeout", "grace"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "grace"):
                raise ValueError(f"{name} is a positive number of seconds, got {value}")
        if self.proxy is not None:
            _check_address(self.proxy)
        for origin in self.cors:
            _check_origin(origin)
        if self.api_key is not None:
            _check_key(self.api_key)
        elif not self.allows_no_key and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no API key: give one with "
                "--api-key or SPECDEC_API_KEY, listen on 127.0.0.1, or let everyone in with --no-api-key"
            )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(proxy: str) -> None:
    try:
        ipaddress.ip_address(proxy)
    except ValueError:
        raise ValueError(
            f"proxy is the address that a reverse proxy connects from, 127.0.0.1 for example, got {proxy!r}"
        ) from None


def _check_origin(origin: str) -> None:
    scheme, _, rest = origin.partition("://")
    if origin != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
        raise ValueError(f"an origin is like https://example.org, or http://localhost:3000, got {origin!r}")


def _check_key(key: str) -> None:
    if len(key) < _LEAST_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"an API key has at least {_LEAST_KEY_LENGTH} printable ASCII characters and no space; "
            '`python -c "import secrets; print(secrets.token_urlsafe())"` makes one'
        )
