"""Processes that can be killed, for what a request can make last for ever: chat templates and grammars.

llguidance's limits do not bound the check for an empty intersection of patterns, which takes time and memory that
grow exponentially with their number; a template is a program. Nobody else's request waits for either.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specdec.server import sandbox_worker
from specdec.server.grammar import OVERRIDES, GrammarSource
from specdec.server.sandbox_worker import CPU_SECONDS, MEMORY_BYTES

_log = logging.getLogger("specdec.server")

_NUM_RENDERING = 4
_NUM_COMPILING = 2
"""Processes: templates never wait for grammars. There are no more than have been needed at once."""
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_MAX_KEPT = 128
"""Outcomes of schemas. A grammar is about as large as its schema, 64 KB at most."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

BOUNDS = f"{CPU_SECONDS:g} s of computing time or {MEMORY_BYTES >> 20} MiB of memory"

Kind = Literal["done", "refused", "failed", "too long", "exhausted", "late", "busy", "broken"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a task.

    Args:
        kind: "done"; "refused" by the template or by llguidance; "failed": the template has an error; "too long": the
            text has more characters than it may; "exhausted": `BOUNDS` were exceeded; "late": the deadline was; "busy":
            too many wait; "broken": the processes cannot be started.
        text: the result, or the reason.
    """

    kind: Kind
    text: str


class Sandbox:
    """Renders and compiles in processes of bounded time and memory. Its methods belong to one event loop.

    Args:
        tokenizer: the JSON of the `tokenizers` library; None if no grammar will be compiled.
        eos_ids: tokens that end a reply.
        seconds: a task may take on the clock; its computing time is bounded besides.
        max_waiting: schemas that may wait for a process.
    """

    def __init__(self, tokenizer: str | None, eos_ids: Sequence[int], *, seconds: float, max_waiting: int):
        self._forks = _Forks({"tokenizer": tokenizer, "eos_ids": list(eos_ids), "overrides": OVERRIDES})
        self._templates = _Lane(self._forks, _NUM_RENDERING, seconds, max_waiting=sys.maxsize)
        self._grammars = _Lane(self._forks, _NUM_COMPILING, seconds, max_waiting=max_waiting)
        self._kept: OrderedDict[bytes, Answer] = OrderedDict()

    async def warm_up(self) -> None:
        """Have a process for each kind of task."""
        await self._templates.warm_up()
        await self._grammars.warm_up()

    async def render(
        self, template: str, messages: Any, tools: Any, variables: Mapping[str, Any], *, max_characters: int
    ) -> Answer:
        """A conversation through a chat template, up to where the reply begins.

        Args:
            tools: that the reply may call, None for none.
            variables: special tokens, and what the request sets.
        """
        task = {
            "template": template,
            "messages": messages,
            "tools": tools,
            "variables": dict(variables),
            "max_characters": max_characters,
        }
        async with self._templates.turn() as is_free:
            return await self._templates.ask({"render": task}) if is_free else _BUSY

    async def compile(self, source: GrammarSource) -> Answer:
        """A grammar; what came of the last ones is known."""
        key = hashlib.sha256(f"{source.kind} {source.text}".encode()).digest()
        if key in self._kept:
            return self._kept[key]
        async with self._grammars.turn() as is_free:
            if not is_free:
                return _BUSY
            if key not in self._kept:  # the same schema may have been in front of this one
                answer = await self._grammars.ask({"compile": {"kind": source.kind, "text": source.text}})
                if answer.kind not in ("done", "refused", "exhausted"):
                    return answer  # of the moment, not of the schema
                self._keep(key, answer)
            return self._kept[key]

    async def close(self) -> None:
        """End all processes. What is under way fails."""
        for lane in (self._templates, self._grammars):
            lane.close()
        await asyncio.to_thread(self._forks.close)

    def _keep(self, key: bytes, answer: Answer) -> None:
        self._kept[key] = answer
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)


_BUSY = Answer(kind="busy", text="")


class _Lane:
    """Processes for one kind of task, and those who wait for them in the order of their arrival."""

    def __init__(self, forks: _Forks, num_processes: int, seconds: float, *, max_waiting: int):
        self._forks = forks
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._free = asyncio.Semaphore(num_processes)
        self._idle: list[_Process] = []

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """Hold a process back for the caller; False at once if too many wait."""
        if self._free.locked() and self._num_waiting >= self._max_waiting:
            yield False
            return
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield True
        finally:
            self._free.release()

    async def warm_up(self) -> None:
        process = await self._process()
        if process is not None:
            self._idle.append(process)

    async def ask(self, task: Any) -> Answer:
        """Have a task done, in the caller's turn. One that is cancelled is killed."""
        process = await self._process()
        if process is None:
            return Answer(kind="broken", text="")
        answer = None
        try:
            answer = await self._outcome(process, task)
        finally:
            if answer is None or answer.kind in ("late", "exhausted"):
                self._forks.kill(process)
            else:
                self._idle.append(process)
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().writer.close()

    async def _process(self) -> _Process | None:
        """An idle one or a new one; None if none can be started."""
        try:
            return self._idle.pop() if self._idle else await self._forks.fork()
        except (OSError, EOFError, TimeoutError):
            _log.exception("the processes for chat templates and grammars cannot be started")
            return None

    async def _outcome(self, process: _Process, task: Any) -> Answer:
        try:
            async with asyncio.timeout(self._seconds):
                return Answer(**await process.ask(task))
        except TimeoutError:
            return Answer(kind="late", text=f"{self._seconds:g} s")
        except (EOFError, ConnectionError):  # the kernel has ended it
            return Answer(kind="exhausted", text="")


class _Process:
    """A forked process, and the connection to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.number = 0
        self.writer = writer
        self._reader = reader

    async def ask(self, message: Any) -> Any:
        body = json.dumps(message).encode()
        self.writer.write(len(body).to_bytes(4) + body)
        await self.writer.drain()
        return await self.receive()

    async def receive(self) -> Any:
        size = int.from_bytes(await self._reader.readexactly(4))
        return json.loads(await self._reader.readexactly(size))


class _Forks:
    """The script that forks."""

    def __init__(self, setup: Mapping[str, Any]):
        self._setup = setup
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        self._control, other = socket.socketpair()
        with other:
            self._script = subprocess.Popen(
                [sys.executable, "-P", str(Path(sandbox_worker.__file__)), str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
        sandbox_worker.send(self._control, self._setup)

    async def fork(self) -> _Process:
        """A new process. Raises `OSError`, `EOFError` or `TimeoutError` if there is none to be had."""
        if self._is_closed:
            raise OSError("the sandbox has been closed")
        if self._script.poll() is not None:  # whatever ended it, for example the kernel, for want of memory
            self._control.close()
            self._start()
        own, other = socket.socketpair()
        with other:
            socket.send_fds(self._control, [bytes(4)], [other.fileno()])
        process = _Process(*await asyncio.open_connection(sock=own))
        try:
            async with asyncio.timeout(_START_SECONDS):
                process.number = await process.receive()
        except BaseException:
            process.writer.close()  # it ends by itself when it reads that
            raise
        return process

    def kill(self, process: _Process) -> None:
        process.writer.close()
        with contextlib.suppress(OSError):  # the script has ended: the timer ends the process
            self._control.sendall(process.number.to_bytes(4))

    def close(self) -> None:
        """The script ends with its connection, and ends its processes."""
        self._is_closed = True
        self._control.close()
        try:
            self._script.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._script.kill()
            self._script.wait()
