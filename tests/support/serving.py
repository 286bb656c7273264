"""A server in a thread of this process, on tiny models."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import torch
from transformers import PreTrainedModel

from specdec.drafters import PromptLookup
from specdec.engine import Engine, EngineThread, LoraEngine
from specdec.models import LoadedModel
from specdec.server.options import ServerOptions
from specdec.server.running import Server, make_service
from specdec.testing import ByteTokenizer, tiny_model

NAME = "tiny"
TOKENIZER = ByteTokenizer()
EOS, PAD = 257, 256


def served_model(**settings: Any) -> PreTrainedModel:
    return tiny_model("llama", **{"eos_token_id": EOS, "pad_token_id": PAD, **settings})


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server, and a client of it."""

    url: str
    http: httpx2.Client
    engine: Engine | LoraEngine
    server: Server
    thread: threading.Thread

    def chat(self, **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hello"}]
        return self.http.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body})

    def stop(self) -> None:
        """What a signal does."""
        self.server.should_exit = True


@contextmanager
def running(
    model: PreTrainedModel,
    *,
    name: str = NAME,
    tokenizer: ByteTokenizer = TOKENIZER,
    engine_options: dict[str, Any] | None = None,
    send_buffer: int | None = None,
    adapters: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server.

    Args:
        send_buffer: bytes that the kernel keeps for a client that does not read, a few megabytes if absent.
        adapters: of `load_adapters`.
    """

    def make(slots: int | None) -> Engine:
        return Engine(model, **{"drafter": PromptLookup(), "max_cached_tokens": slots, **(engine_options or {})})

    engine = LoraEngine(model, adapters, make) if adapters else make(None)
    runner = EngineThread(engine)
    service = make_service(LoadedModel(model, tokenizer, name), engine, runner, ServerOptions(**options))
    server = Server(service, on_stop=lambda: runner.close(timeout=0))
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    key = options.get("api_key")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=120) as http:
            yield Running(url=url, http=http, engine=engine, server=server, thread=thread)
    finally:
        server.should_exit = True
        thread.join(timeout=120)
    assert not thread.is_alive()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, f"120 s have passed, and still not: {what}"
        time.sleep(0.01)


def plain_ids(model: PreTrainedModel, prompt: str, num_tokens: int, **options: Any) -> list[int]:
    """What transformers says, without the prompt."""
    input_ids = TOKENIZER(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": num_tokens, **options}
    out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    return out[0, input_ids.shape[1] :].tolist()


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def chat_prompt(*messages: str) -> str:
    """Of the user and the assistant by turns, as the template writes it."""
    roles = ("user", "assistant")
    lines = [f"{roles[index % 2]}: {message}\n" for index, message in enumerate(messages)]
    return "".join(lines) + "assistant: "
