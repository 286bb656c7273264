"""A server with speculative decoding whose faults are known, in a thread, on the standard library.

Its model copies: after two tokens that stood together before, it prefers what followed them there; otherwise the hash
of the last two tokens decides among the words of the text. So it needs no weights, and prompt lookup drafts it well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.threaded_http import served

DROPS, MIXES, IGNORES = "drops a drafted token at depth 5", "mixes two rows", "ignores a penalty"
_MOST_DRAFTED = 8
_CONTEXT = 2000
_PAUSE = 0.002
"""Seconds of a round: long enough that requests at the same time meet."""


def tokens_of(text: str) -> list[str]:
    return re.findall(r" ?\w+|\n|[^\w\n]", text)


class CopyingModel:
    """Log-probabilities of the next token."""

    def __init__(self, prompt: list[str]):
        self.words = sorted(set(prompt))
        self.text = list(prompt)
        self.after: dict[tuple[str, ...], list[str]] = {}
        for place in range(2, len(prompt)):
            self._learn(place)

    def _learn(self, place: int) -> None:
        self.after.setdefault(tuple(self.text[place - 2 : place]), []).append(self.text[place])

    def add(self, token: str) -> None:
        self.text.append(token)
        self._learn(len(self.text) - 1)

    def draft(self) -> list[str]:
        """What followed the last two tokens before, and so on."""
        last, drafted = tuple(self.text[-2:]), list[str]()
        while len(drafted) < _MOST_DRAFTED and last in self.after:
            drafted.append(self.after[last][-1])
            last = (last[-1], drafted[-1])
        return drafted

    def log_probs(self, counts: dict[str, int], frequency: float, presence: float) -> tuple[dict[str, float], str]:
        """Of all words, before penalties, and the best one with them."""
        last = tuple(self.text[-2:])
        scores = {word: _noise(*last, word) for word in self.words}
        for followed in self.after.get(last, ())[-3:]:
            scores[followed] += 2.5
        total = math.log(sum(math.exp(score) for score in scores.values()))
        log_p = {word: score - total for word, score in scores.items()}
        best = max(
            self.words, key=lambda word: log_p[word] - frequency * counts.get(word, 0) - presence * (word in counts)
        )
        return log_p, best


def _noise(*words: str) -> float:
    return 3 * int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=4).digest()) / 2**32


class AuditedServer:
    """The server.

    Args:
        fault: DROPS, MIXES or IGNORES; None: it has none.
        speculates: whether it drafts at all.
        has_switch: whether it heeds `"speculation"`: false, or how many tokens are drafted at most.
    """

    def __init__(self, fault: str | None = None, *, speculates: bool = True, has_switch: bool = False):
        self.fault, self.speculates, self.has_switch = fault, speculates, has_switch
        self.lock = threading.Lock()
        self.last_words: dict[int, list[str]] = {}
        """request -> what its last round committed, while it is decoded."""
        self.num_left = 0
        self.url = ""

    def decode(self, prompt: str, options: dict[str, Any], counts: dict[str, int]) -> Iterator[list[tuple[str, Any]]]:
        """Rounds, each with its tokens and their log-probabilities; `counts` gets those of drafts."""
        model = CopyingModel(tokens_of(prompt))
        said: dict[str, int] = {}
        mine = threading.get_ident()
        speculates = self.speculates and not (self.has_switch and options.get("speculation") is False)
        limit = options.get("speculation")
        most = limit["num_speculative_tokens"] if isinstance(limit, dict) else _MOST_DRAFTED
        left = options["max_tokens"]
        penalties = [options.get(f"{name}_penalty", 0.0) for name in ("frequency", "presence")]
        try:
            while left > 0:
                time.sleep(_PAUSE if speculates else 0)
                drafted = model.draft()[: min(left - 1, most)] if speculates else []
                kept: list[tuple[str, Any]] = []
                for place in range(len(drafted) + 1):
                    is_ignored = self.fault == IGNORES and drafted
                    log_p, best = model.log_probs(said, *([0.0, 0.0] if is_ignored else penalties))
                    kept.append((best, log_p))
                    model.add(best)
                    said[best] = said.get(best, 0) + 1
                    if place == len(drafted) or best != drafted[place]:
                        break
                counts["drafted"] += len(drafted)
                counts["accepted"] += len(kept) - 1
                left -= len(kept)
                yield self.spoilt(kept, mine)
        finally:
            self.last_words.pop(mine, None)

    def spoilt(self, kept: list[tuple[str, Any]], mine: int) -> list[tuple[str, Any]]:
        """What a round says, after the fault."""
        num_accepted = len(kept) - 1
        if self.fault == DROPS and num_accepted >= 5:
            return kept[:4] + kept[5:]
        if self.fault == MIXES:
            with self.lock:
                others = [words for row, words in self.last_words.items() if row != mine]
                self.last_words[mine] = [word for word, _ in kept]
            if others and num_accepted >= 3 and len(others[0]) >= 4:
                return [(word, {}) for word in others[0]]
        return kept

    @contextmanager
    def running(self) -> Iterator[AuditedServer]:
        owner = self

        class Handler(_Handler):
            audited = owner

        with served(Handler) as address:
            self.url = address
            yield self


class _Handler(BaseHTTPRequestHandler):
    audited: AuditedServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": "copier", "max_model_len": _CONTEXT}]})
        elif self.path == "/version":
            self.send(200, {"version": "1.2.3"})
        else:
            self.send(404, {"error": {"message": "nothing here"}})

    def do_POST(self) -> None:
        options = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.send(404, {"error": {"message": "no | conversations `here`"}})
        if self.audited.has_switch and isinstance(options.get("speculation"), str):
            return self.send(400, {"error": {"message": "speculation is false or left out"}})
        num_prompt = len(tokens_of(options["prompt"]))
        if num_prompt + options["max_tokens"] > _CONTEXT:
            return self.send(400, {"error": {"message": "the context is full"}})
        if options.get("logprobs", 0) > 5:
            return self.send(400, {"error": {"message": "at most 5 log-probabilities"}})
        return self.stream(options) if options.get("stream") else self.whole(options, num_prompt)

    def whole(self, options: dict[str, Any], num_prompt: int) -> None:
        counts = {"drafted": 0, "accepted": 0}
        told = [each for kept in self.audited.decode(options["prompt"], options, counts) for each in kept]
        text, is_cut = _until(_spelled(told), options.get("stop", ()))
        choice = {"index": 0, "text": text, "finish_reason": "stop" if is_cut else "length"}
        if options.get("logprobs"):
            choice["logprobs"] = {
                "tokens": [word for word, _ in told],
                "token_logprobs": [log_p[word] for word, log_p in told],
                "top_logprobs": [
                    dict(sorted(p.items(), key=lambda one: -one[1])[: options["logprobs"]]) for _, p in told
                ],
            }
        predicted = {"accepted": counts["accepted"], "rejected": counts["drafted"] - counts["accepted"]}
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": len(told),
            "completion_tokens_details": {f"{name}_prediction_tokens": count for name, count in predicted.items()},
        }
        self.send(200, {"choices": [choice], "usage": usage})

    def stream(self, options: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        text, sent = "", 0
        try:
            for kept in self.audited.decode(options["prompt"], options, {"drafted": 0, "accepted": 0}):
                text, is_cut = _until(text + _spelled(kept), options.get("stop", ()))
                piece, sent = text[sent:], len(text)
                self.event({"choices": [{"index": 0, "text": piece, "finish_reason": "stop" if is_cut else None}]})
                if is_cut:
                    break
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.audited.num_left += 1

    def event(self, fields: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(fields)}\n\n".encode())

    def send(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _spelled(told: list[tuple[str, Any]]) -> str:
    return "".join(word for word, _ in told)


def _until(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
