"""A model behind OpenAI's API, as `specdec serve` offers it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import httpx2
import torch

from specdec.cli.chat.dialogue import Dialogue
from specdec.cli.chat.reply import Piece, Reply
from specdec.prompting import Message
from specdec.stats import DecodingStats

_CONNECT_SECONDS = 10.0
_TOO_LONG = "context_length_exceeded"


class ServerError(ValueError):
    """What a server refused, in its own words.

    Args:
        code: as the server names it.
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class Server:
    """A server, by the address of its API.

    Args:
        url: with or without the `/v1` at its end.
        api_key: sent if it is given.
        transport: for tests; None opens connections.
    """

    def __init__(self, url: str, api_key: str | None = None, *, transport: httpx2.BaseTransport | None = None):
        address = url.rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"--url takes an address that starts with http:// or https://, got {url!r}")
        self.url = address if address.endswith("/v1") else f"{address}/v1"
        # how long a reply may take is the server's decision
        self._client = httpx2.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx2.Timeout(_CONNECT_SECONDS, read=None),
            transport=transport,
        )

    def models(self) -> list[str]:
        """Names of the models that are served. Raises `ServerError`, or `OSError` if the server is not there."""
        try:
            response = self._client.get(f"{self.url}/models", timeout=_CONNECT_SECONDS)
            _check(response)
            return [str(card["id"]) for card in response.json()["data"]]
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConnectionError(f"cannot reach {self.url}: {error}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ServerError(f"{self.url} does not answer as OpenAI's API does") from error

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed reply; closing the iterator ends the reply at the server. Raises as `models`."""
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    _check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise _error_of(event)
                    yield event
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConnectionError(f"the connection to {self.url} broke: {error}") from error


def _check(response: httpx2.Response) -> None:
    if response.is_error:
        try:
            document = response.json()
        except json.JSONDecodeError:
            document = {}
        raise _error_of(document, f"the server answers with status {response.status_code}")


def _error_of(document: Any, otherwise: str = "the server says that something went wrong") -> ServerError:
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ServerError(otherwise)
    return ServerError(error["message"], error.get("code"))


class RemoteDialogue(Dialogue):
    """A dialogue with a model of a server. The server keeps no conversation: each turn sends the whole of it.

    A sampled reply gets its seed from torch's randomness, so that a seeded chat says the same again.
    """

    def __init__(self, server: Server, model: str, **state: Any):
        super().__init__(**state)
        self._server = server
        self._model = model

    def describe_states(self) -> str:
        return "the server decides what is kept"

    def _reply(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int,
        generation_kwargs: dict[str, Any],
        show: Callable[[Sequence[Piece]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        options = _options(max_new_tokens, generation_kwargs)
        collected = _Collected(show)
        kept = messages
        while True:
            try:
                collected.read(self._chunks(kept, options), stop)
                break
            except ServerError as error:
                if error.code != _TOO_LONG or len(kept) == 1:
                    raise
                kept = kept[2:]
        reply = collected.reply(num_forgotten=len(messages) - len(kept))
        self.messages = [*kept, {"role": "assistant", "content": reply.text}]
        return reply

    def _chunks(self, messages: list[Message], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked = {"model": self._model, "messages": self._with_system(messages), "stream": True}
        return self._server.chunks({**asked, "stream_options": {"include_usage": True}, **options})


def _options(max_new_tokens: int, generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `generate()` takes, in the words of the API."""
    options = {"max_tokens": max_new_tokens, **generation_kwargs}
    if options.pop("do_sample"):
        return {"seed": int(torch.randint(2**31, ())), **options}
    return {"temperature": 0, **options}


class _Collected:
    """A reply while it comes."""

    def __init__(self, show: Callable[[Sequence[Piece]], None]):
        self._show = show
        self._pieces: list[Piece] = []
        self._usage: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._started = perf_counter()
        self._first_at: float | None = None
        self._is_stopped = False

    def read(self, chunks: Iterator[dict[str, Any]], stop: Callable[[], bool]) -> None:
        """Show what comes until the end, or until it is stopped.

        Raises:
            KeyboardInterrupt: before the first token; later it stops the reply.
        """
        try:
            for chunk in chunks:
                self._take(chunk)
                if stop():
                    self._is_stopped = True
                    break
        except KeyboardInterrupt:
            if not self._pieces:
                raise
            self._is_stopped = True
        finally:
            chunks.close()  # type: ignore[attr-defined]

    def _take(self, chunk: dict[str, Any]) -> None:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            text = choice.get("delta", {}).get("content")
            if text:
                self._first_at = self._first_at or perf_counter()
                self._pieces.append(Piece(text, False))
                self._show(self._pieces[-1:])

    def reply(self, *, num_forgotten: int) -> Reply:
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Reply(
            pieces=tuple(self._pieces),
            stats=self._stats() if self._usage else None,
            num_read=self._usage.get("prompt_tokens", 0) - cached,
            num_kept=cached,
            num_forgotten=num_forgotten,
            stopped=self._is_stopped,
            cut=self._finish_reason == "length",
        )

    def _stats(self) -> DecodingStats:
        """What the usage tells. A round commits what was accepted and one token more: so many rounds there were."""
        num_tokens = self._usage["completion_tokens"]
        details = self._usage.get("completion_tokens_details") or {}
        accepted = details.get("accepted_prediction_tokens") or 0
        return DecodingStats(
            num_new_tokens=num_tokens,
            num_committed=num_tokens - 1,
            num_rounds=max(0, num_tokens - 1 - accepted),
            num_accepted=accepted,
            num_drafted=accepted + (details.get("rejected_prediction_tokens") or 0),
            total_seconds=perf_counter() - self._started,
            ttft_seconds=(self._first_at or perf_counter()) - self._started,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoteSpeaker:
    """A model of a server."""

    server: Server
    name: str
    drafter_name: str = "the server's"
    drafter: None = None
    tells_drafted: bool = False

    def converse(self, **state: Any) -> RemoteDialogue:
        return RemoteDialogue(self.server, self.name, **state)


class RemoteLoader:
    """Models of one server."""

    def __init__(self, server: Server):
        self._server = server

    def load(self, model: str | None) -> RemoteSpeaker:
        """A model by its name; None takes the first one. Raises `ServerError`, or `OSError` if no server is there."""
        names = self._server.models()
        if not names or model not in (None, *names):
            raise ServerError(f"{self._server.url} has no model {model}; it has: {', '.join(names) or 'none'}")
        return RemoteSpeaker(server=self._server, name=model or names[0])

    def load_instead(self, speaker: RemoteSpeaker, model: str) -> RemoteSpeaker:
        return replace(speaker, name=self.load(model).name)

    def with_drafter(self, speaker: RemoteSpeaker, name: str, draft: str | None = None) -> RemoteSpeaker:
        raise ValueError("what drafts is decided where the server is started: `specdec serve --drafter`")
