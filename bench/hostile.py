"""What a server must bear: each function does one thing that no honest client does, and says what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

CHAT = "/v1/chat/completions"
LEFT = "left"
"""The outcome where the hostile client went first."""
CLOSED = "closed"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server under attack.

    Args:
        url: without a path.
        patience: seconds until a hostile client leaves, if the server has not ended it before.
    """

    url: str
    model: str
    http: httpx2.AsyncClient
    patience: float

    def body(self, content: str = "Count to a thousand.", **options: Any) -> dict[str, Any]:
        message = {"role": "user", "content": content}
        return {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 16, **options}


async def schema_bomb(target: Target) -> str:
    """Compiling this takes exponential time unless somebody stops it."""
    patterns = [{"type": "string", "pattern": f".*{number}.*"} for number in range(40)]
    schema = {"name": "a", "schema": {"allOf": patterns}}
    return await _posted(target, target.body(response_format={"type": "json_schema", "json_schema": schema}))


async def huge_prompt(target: Target) -> str:
    return await _posted(target, target.body("word " * 100_000))


async def leave(target: Target) -> str:
    """Go away in the middle of a stream."""
    async with target.http.stream("POST", CHAT, json=target.body(stream=True, max_tokens=64)) as answer:
        num_events = 0
        async for line in answer.aiter_lines():
            num_events += bool(line)
            if num_events == 4:
                return LEFT
        return str(answer.status_code)


async def slow_body(target: Target) -> str:
    """A byte every half second."""
    async with _connected(target) as (reader, writer):
        writer.write(_head("Content-Length: 5000"))
        answer = asyncio.ensure_future(_status(reader))
        while not answer.done():
            writer.write(b" ")
            await asyncio.wait([answer], timeout=0.5)
        return answer.result()


async def half_header(target: Target) -> str:
    async with _connected(target) as (reader, writer):
        writer.write(_head("X: y")[:-2])
        return await _status(reader)


async def large_body(target: Target) -> str:
    """Send everything before reading."""
    size = 3 << 20
    async with _connected(target) as (reader, writer):
        writer.write(_head(f"Content-Length: {size}") + b"x" * size)
        await writer.drain()
        return await _status(reader)


async def two_lengths(target: Target) -> str:
    async with _connected(target) as (reader, writer):
        writer.write(_head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n")
        return await _status(reader)


async def no_reader(target: Target) -> str:
    """Ask again and again, and never read."""
    async with _connected(target) as (_, writer):
        body = json.dumps(target.body(stream=True)).encode()
        request = _head("Content-Type: application/json", f"Content-Length: {len(body)}") + body
        while not writer.is_closing():
            writer.write(request)
            await writer.drain()
            await asyncio.sleep(1)
        return CLOSED


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Something hostile, and the outcomes that are right: statuses, `CLOSED`, `LEFT`."""

    act: Callable[[Target], Awaitable[str]]
    allowed: frozenset[str]


KINDS = {
    "schema-bomb": Kind(act=schema_bomb, allowed=frozenset({"400", "429", "504", LEFT})),
    "slow-body": Kind(act=slow_body, allowed=frozenset({"408", LEFT})),
    "leave": Kind(act=leave, allowed=frozenset({"200", "429", LEFT})),
    "huge-prompt": Kind(act=huge_prompt, allowed=frozenset({"400", "429", LEFT})),
    "large-body": Kind(act=large_body, allowed=frozenset({"413"})),
    "half-header": Kind(act=half_header, allowed=frozenset({CLOSED, LEFT})),
    "two-lengths": Kind(act=two_lengths, allowed=frozenset({"400"})),
    "no-reader": Kind(act=no_reader, allowed=frozenset({CLOSED, LEFT})),
}


async def attack(target: Target, kind: str) -> str:
    """Do it once; the outcome, or the error that it ended with."""
    try:
        async with asyncio.timeout(target.patience):
            return await KINDS[kind].act(target)
    except TimeoutError:
        return LEFT
    except (httpx2.HTTPError, OSError) as error:
        return repr(error)


async def _posted(target: Target, body: dict[str, Any]) -> str:
    return str((await target.http.post(CHAT, json=body)).status_code)


@asynccontextmanager
async def _connected(target: Target) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    server = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(server.hostname, server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _status(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()
    return line.split()[1].decode() if line else CLOSED


def _head(*headers: str) -> bytes:
    return "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", *headers, "\r\n"]).encode()
