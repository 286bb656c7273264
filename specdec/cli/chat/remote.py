"""A model behind OpenAI's API, as `specdec serve` offers it. The `openai` client speaks to it (the extra `remote`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from specdec.cli.chat.dialogue import Dialogue
from specdec.cli.chat.reply import Piece, Reply
from specdec.decoding.stats import DecodingStats
from specdec.text.prompting import Message

if TYPE_CHECKING:
    from openai import OpenAI

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


def connect(url: str, api_key: str | None = None) -> OpenAI:
    """A client of the API at an address, with or without the `/v1` at its end.

    Raises:
        ValueError: it is no address, or the `openai` client is not installed.
    """
    address = url.rstrip("/").removesuffix("/v1")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--url takes an address that starts with http:// or https://, got {url!r}")
    if find_spec("openai") is None:
        raise ValueError("--url needs the openai client: pip install 'specdec-runtime[remote]'")
    from openai import OpenAI, Timeout

    # how long a reply may take is the server's decision
    timeout = Timeout(None, connect=_CONNECT_SECONDS)
    return OpenAI(base_url=f"{address}/v1", api_key=api_key or "none", timeout=timeout, max_retries=0)


@contextmanager
def _in_its_words() -> Iterator[None]:
    """Raise `ServerError` for what the server refuses, and `ConnectionError` if it is not there."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise ConnectionError(f"cannot reach {error.request.url}: {error.__cause__ or error}") from error
    except openai.APIError as error:
        told = error.body if isinstance(error.body, dict) else {}
        raise ServerError(told.get("message") or f"the server answers: {error.message}", error.code) from error


class RemoteDialogue(Dialogue):
    """A dialogue with a model of a server. The server keeps no conversation: each turn sends the whole of it.

    A sampled reply gets its seed from torch's randomness, so that a seeded chat says the same again.
    """

    def __init__(self, client: OpenAI, model: str, **state: Any):
        super().__init__(**state)
        self._client = client
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
        answer = _Answer(show)
        kept = messages
        while True:
            try:
                with _in_its_words():
                    answer.read(self._stream(kept, options), stop)
                break
            except ServerError as error:
                if error.code != _TOO_LONG or len(kept) == 1:
                    raise
                kept = kept[2:]
        reply = answer.reply(num_forgotten=len(messages) - len(kept))
        self.messages = [*kept, {"role": "assistant", "content": reply.text}]
        return reply

    def _stream(self, messages: list[Message], options: dict[str, Any]) -> Any:
        sent: Any = self._with_system(messages)
        return self._client.chat.completions.create(
            model=self._model,
            messages=sent,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=options,
        )


def _options(max_new_tokens: int, generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `generate()` takes, in the words of the API."""
    options = {"max_tokens": max_new_tokens, **generation_kwargs}
    if options.pop("do_sample"):
        return {"seed": int(torch.randint(2**31, ())), **options}
    return {"temperature": 0, **options}


class _Answer:
    """A reply while it comes."""

    def __init__(self, show: Callable[[Sequence[Piece]], None]):
        self._show = show
        self._pieces: list[Piece] = []
        self._usage: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._started = perf_counter()
        self._first_at: float | None = None
        self._is_stopped = False

    def read(self, stream: Any, stop: Callable[[], bool]) -> None:
        """Show what comes until the end, or until it is stopped, which ends it at the server too.

        Raises:
            KeyboardInterrupt: before the first token; later it stops the reply.
        """
        with stream:
            try:
                for chunk in stream:
                    self._take(chunk.to_dict())
                    if stop():
                        self._is_stopped = True
                        break
            except KeyboardInterrupt:
                if not self._pieces:
                    raise
                self._is_stopped = True

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

    client: OpenAI
    name: str
    drafter_name: str = "the server's"
    drafter: None = None
    tells_drafted: bool = False
    samples: bool = False

    @classmethod
    def of(cls, client: OpenAI, model: str | None) -> RemoteSpeaker:
        """A model by its name; None takes the first one. Raises `ServerError`, or `OSError` if no server is there."""
        with _in_its_words():
            names = _served_names(client)
        if not names or model not in (None, *names):
            raise ServerError(f"{client.base_url} has no model {model}; it has: {', '.join(names) or 'none'}")
        return cls(client=client, name=model or names[0])

    def converse(self, **state: Any) -> RemoteDialogue:
        return RemoteDialogue(self.client, self.name, **state)

    def with_model(self, name: str) -> RemoteSpeaker:
        return self.of(self.client, name)

    def with_drafter(self, name: str, draft: str | None = None) -> RemoteSpeaker:
        raise ValueError("what drafts is decided where the server is started: `specdec serve --drafter`")


def _served_names(client: OpenAI) -> list[str]:
    try:
        return [str(model.id) for model in client.models.list(timeout=_CONNECT_SECONDS)]
    except (AttributeError, TypeError, ValueError) as error:
        raise ServerError(f"{client.base_url} does not answer as OpenAI's API does") from error
