"""A completions endpoint in a thread, on the standard library: what it says is scripted, and so is how it fails."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.testing import ByteTokenizer
from tests.support.threaded_http import served

TOKENIZER = ByteTokenizer()


@dataclass
class Told:
    """A token, its log-probability, and the likeliest ones in its place."""

    token: int
    log_prob: float = 0.0
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Fault:
    """How an answer fails.

    Args:
        kind: "status", "html", "shape" (JSON, but no completion), or after so many tokens of a stream: "drop" (the
            connection), "end" (the stream, in good order), "garbage", "stall", "error" (an event that says so).
        after: tokens, or the status.
    """

    kind: str
    after: int = 0


class Completions:
    """The server.

    Args:
        answer: token ids of a prompt -> its continuation, token by token.
        score: token ids of a text -> of each token what it would have said.
        form: what it tells of tokens, and takes: "vllm", "llama.cpp", "bare" (text only), or "strict" (refuses what
            OpenAI's API does not have, and tells texts of tokens).
        eos: ends an answer; told, where ids are, but not spelled.
        heeds_limit: whether it stops at max_tokens.

    Attributes:
        faults: of the next streams, in order; None is none.
        lives: requests that it answers before it is gone.
        models: that it lists; None: it has no list.
    """

    def __init__(
        self,
        answer: Callable[[list[int]], Iterator[Told]],
        score: Callable[[list[int]], list[Told]] | None = None,
        *,
        form: str = "vllm",
        eos: int | None = None,
        heeds_limit: bool = True,
    ):
        self.answer, self.score, self.form, self.eos, self.heeds_limit = answer, score, form, eos, heeds_limit
        self.faults: deque[Fault | None] = deque()
        self.lives: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.models: list[str] | None = ["the-model"]
        self.num_sent = 0
        self.shift = 0
        """Of the token ids that it tells: not 0 stands for another tokenizer."""
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Completions]:
        owner = self

        class Handler(_Handler):
            completions = owner

        with served(Handler) as address:
            self.url = f"{address}/v1"
            yield self


class _Handler(BaseHTTPRequestHandler):
    completions: Completions
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        models = self.completions.models
        if models is None:
            return self.send(404, {"error": {"message": "no such page"}})
        return self.send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    def do_POST(self) -> None:
        served = self.completions
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served.requests.append(request)
        served.keys.add(self.headers["Authorization"])
        if served.lives is not None:
            served.lives -= 1
            if served.lives < 0:
                return self.hang_up()
        fault = served.faults.popleft() if request.get("stream") and served.faults else None
        if fault is not None and fault.kind in ("status", "html", "shape"):
            return self.fail(fault)
        if served.form == "strict" and not strictly_valid(request):
            return self.send(400, {"error": {"message": "what is that?"}})
        return self.stream(request, fault) if request.get("stream") else self.one(request)

    def fail(self, fault: Fault) -> None:
        if fault.kind == "status":
            message = f"status {fault.after}, you sent {self.headers['Authorization']}"
            self.send(fault.after, {"error": {"message": message}})
        elif fault.kind == "html":
            self.send(200, "<html>It works!</html>", "text/html")
        else:
            self.send(200, 'data: {"choices": [{"index": 0}]}\n\ndata: [DONE]\n\n', "text/event-stream")

    def one(self, request: dict[str, Any]) -> None:
        prompt = ids_of(request["prompt"])
        told = [next(self.completions.answer(prompt))]
        if request.get("echo") and self.completions.form == "vllm" and self.completions.score is not None:
            told = [*self.completions.score(prompt), *told]
        self.send(200, self.chunk(told, request, "length", TOKENIZER.decode([item.token for item in told])))

    def stream(self, request: dict[str, Any], fault: Fault | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        finish, held = "length", list[int]()
        try:
            for count, told in enumerate(self.completions.answer(ids_of(request["prompt"]))):
                if fault is not None and count == fault.after:
                    return self.break_off(fault)
                if count == request["max_tokens"] and self.completions.heeds_limit:
                    break
                if told.token != self.completions.eos:
                    held.append(told.token)
                text = TOKENIZER.decode(held)
                if text.endswith("\ufffd") and len(held) < 4:
                    text = ""  # within a character, perhaps
                else:
                    held.clear()
                self.event(self.chunk([told], request, None, text))
                self.completions.num_sent += 1
                if told.token == self.completions.eos:
                    finish = "stop"
                    break
            self.event(self.chunk([], request, finish, TOKENIZER.decode(held)))
            self.event({"choices": [], "usage": {"total_tokens": 1}})
            self.part("data: [DONE]\n\n")
            self.part("")
        except (BrokenPipeError, ConnectionResetError):
            return  # whoever asked has heard enough

    def break_off(self, fault: Fault) -> None:
        if fault.kind == "garbage":
            self.part("data: {oops\n\n")
        elif fault.kind == "error":
            self.event({"error": {"message": "out of memory"}})
        elif fault.kind == "stall":
            time.sleep(1.0)
        elif fault.kind == "end":
            self.part("")
        if fault.kind != "end":
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def chunk(self, told: Sequence[Told], request: dict[str, Any], finish: str | None, text: str) -> dict[str, Any]:
        form = self.completions.form
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        if form == "vllm" and request.get("return_token_ids"):
            choice["token_ids"] = [item.token + self.completions.shift for item in told]
        count = request.get("logprobs", 0)
        if count and told and form != "bare":
            choice["logprobs"] = (as_content if form == "llama.cpp" else as_columns)(told, count)
        return {"id": "1", "object": "text_completion", "created": 1, "model": "the-model", "choices": [choice]}

    def event(self, fields: dict[str, Any]) -> None:
        self.part(f"data: {json.dumps(fields)}\n\n")

    def part(self, text: str) -> None:
        """Of an answer in parts; an empty one is the last."""
        body = text.encode()
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")

    def send(self, status: int, body: Any, kind: str = "application/json") -> None:
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text)


def ids_of(prompt: str | list[int]) -> list[int]:
    return prompt if isinstance(prompt, list) else TOKENIZER.encode(prompt, add_special_tokens=False)


def strictly_valid(request: dict[str, Any]) -> bool:
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs", "stream"}
    return set(request) <= known and request.get("logprobs", 0) <= 5 and request.get("top_k", 1) > 0


def as_columns(told: Sequence[Told], count: int) -> dict[str, Any]:
    return {
        "tokens": [TOKENIZER.decode([item.token]) for item in told],
        "token_logprobs": [None if item.log_prob > 0 else item.log_prob for item in told],
        "top_logprobs": [{TOKENIZER.decode([token]): log_p for token, log_p in item.top[:count]} for item in told],
    }


def as_content(told: Sequence[Told], count: int) -> dict[str, Any]:
    def fields(token: int, log_prob: float) -> dict[str, Any]:
        return {"id": token, "token": TOKENIZER.decode([token]), "logprob": log_prob}

    return {
        "content": [
            {**fields(item.token, item.log_prob), "top_logprobs": [fields(*other) for other in item.top[:count]]}
            for item in told
        ]
    }


def saying(text: str, prompt_text: str) -> Callable[[list[int]], Iterator[Told]]:
    """Answers with what is missing of a text, and then ends."""

    def answer(prompt: list[int]) -> Iterator[Told]:
        so_far = bytes(token for token in prompt if token < 256).decode(errors="ignore").removeprefix(prompt_text)
        rest = text.removeprefix(so_far) if text.startswith(so_far) else ""
        for token in [*rest.encode(), TOKENIZER.eos_token_id]:
            yield Told(token, -0.1, [(token, -0.1), (0, -3.0)])

    return answer


class Spoken:
    """Answers and scores of a model, decoding greedily."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.lock = threading.Lock()

    def answer(self, prompt: list[int]) -> Iterator[Told]:
        ids = list(prompt)
        while True:
            log_p_V = self.log_probs(ids)[-1]
            top = [(int(token), float(log_p_V[token])) for token in log_p_V.topk(20).indices]
            yield Told(*top[0], top)
            ids.append(top[0][0])

    def score(self, prompt: list[int]) -> list[Told]:
        log_p_TV = self.log_probs(prompt)
        best = [(int(log_p_V.argmax()), float(log_p_V.max())) for log_p_V in log_p_TV]
        later = [Told(token, float(log_p_TV[place, token]), [best[place]]) for place, token in enumerate(prompt[1:])]
        return [Told(prompt[0], 1.0), *later]  # above 0: there is none

    def log_probs(self, ids: Sequence[int]) -> torch.Tensor:
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
