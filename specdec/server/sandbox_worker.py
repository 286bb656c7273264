"""The processes behind `sandbox.py`: run as a script, with the descriptor of a socket as its argument.

It loads once what is needed, then forks a process for whoever asks: that takes milliseconds, and so does replacing one
that had to be killed. What they are given may loop or allocate without end; the kernel ends them then. Nothing of
specdec is imported here: torch would take seconds and hundreds of megabytes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

CPU_SECONDS = 1.0
"""For one task: a hundred times what large ordinary ones take."""
MEMORY_BYTES = 512 << 20
"""On top of what the process has at its start."""
_GRAMMAR_NICENESS = 5
_LENGTH_BYTES = 4

Answer = dict[str, str]
"""`kind` and `text`; see `sandbox.Answer`."""


def send(connection: socket.socket, message: Any) -> None:
    """One JSON document, after its length in bytes."""
    body = json.dumps(message).encode()
    connection.sendall(len(body).to_bytes(_LENGTH_BYTES) + body)


def receive(connection: socket.socket) -> Any:
    """What the other end has sent. Raises `EOFError` if it has closed."""
    size = int.from_bytes(_read(connection, _LENGTH_BYTES))
    return json.loads(_read(connection, size))


def _read(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve_forks(control: socket.socket, perform: Callable[[Any], Answer]) -> None:
    """Fork for every socket that comes with a 0, kill the process whose number comes; until the other end closes."""
    children: set[int] = set()
    while message := (received := socket.recv_fds(control, _LENGTH_BYTES, 1))[0]:
        number, descriptors = int.from_bytes(message), received[1]
        if descriptors:
            children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}  # those that have ended
            children.add(_fork(control, socket.socket(fileno=descriptors[0]), perform))
        elif number in children:
            children.remove(number)
            _kill(number)
    for number in children:
        _kill(number)


def _fork(control: socket.socket, connection: socket.socket, perform: Callable[[Any], Answer]) -> int:
    with connection:
        number = os.fork()
        if number:
            return number
        try:
            control.close()
            _confine()
            send(connection, os.getpid())
            while True:
                _answer(connection, perform)
        finally:  # also at the end of the connection; nothing of the parent's is to be tidied up here
            os._exit(0)


def _kill(number: int) -> None:
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def _confine() -> None:
    """Bound memory; what libraries and the kernel say about the end of it is of no use to anyone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _size() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _size() -> int:
    """Bytes of address space of this process, or of memory where that is not told."""
    try:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 4 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _answer(connection: socket.socket, perform: Callable[[Any], Answer]) -> None:
    """One task, in bounded computing time: the timer's signal ends the process, whatever it is doing."""
    task = receive(connection)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        answer = perform(task)
    except MemoryError:
        answer = {"kind": "exhausted", "text": ""}
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(connection, answer)


class Tasks:
    """What can be asked for.

    Args:
        tokenizer: the JSON of the `tokenizers` library; None if grammars cannot be compiled.
        eos_ids: tokens that end a reply.
        overrides: how llguidance reads a schema.
    """

    def __init__(self, tokenizer: str | None, eos_ids: list[int], overrides: Any):
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render = render_jinja_template
        self._overrides = overrides
        self._tokenizer: Any = None
        if tokenizer is not None:
            from llguidance import LLTokenizer

            self._tokenizer = LLTokenizer(tokenizer, eos_token=eos_ids)

    def perform(self, task: dict[str, Any]) -> Answer:
        return self.render(**task["render"]) if "render" in task else self.compile(**task["compile"])

    def render(
        self, template: str, messages: Any, tools: Any, variables: dict[str, Any], max_characters: int
    ) -> Answer:
        """A conversation through a chat template, as `tokenizer.apply_chat_template` does it."""
        from jinja2 import TemplateError

        try:
            (text,), _ = self._render(
                [messages], tools=tools, chat_template=template, add_generation_prompt=True, **variables
            )
        except TemplateError as error:
            return {"kind": "refused", "text": str(error)}
        except MemoryError:
            raise
        except Exception as error:
            return {"kind": "failed", "text": f"{type(error).__name__}: {error}"}
        if len(text) > max_characters:
            return {"kind": "too long", "text": str(len(text))}
        return {"kind": "done", "text": text}

    def compile(self, kind: str, text: str) -> Answer:
        """A grammar, once all of it has been tried that happens before the first token."""
        from llguidance import LLMatcher

        os.setpriority(os.PRIO_PROCESS, 0, _GRAMMAR_NICENESS)
        try:
            grammar = (
                LLMatcher.grammar_from_lark(text)
                if kind == "lark"
                else LLMatcher.grammar_from_json_schema(text, overrides=self._overrides)
            )
        except ValueError as error:
            return {"kind": "refused", "text": str(error)}
        matcher = LLMatcher(self._tokenizer, grammar)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            return {"kind": "refused", "text": matcher.get_error()}
        return {"kind": "done", "text": grammar}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the server; this ends when the server does
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        setup = receive(control)
    except EOFError:
        return
    serve_forks(control, Tasks(**setup).perform)


if __name__ == "__main__":
    main()
