"""A completions endpoint that writes steps: vLLM, SGLang, llama.cpp's server, or another of OpenAI's protocol.

The `openai` client speaks to it (the extra `remote`). What servers answer beyond the protocol (token ids,
log-probabilities of more alternatives, of a given text) is asked for and read where it is there; what is there is found
out once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from specdec.errors import EndpointError, UnsupportedOptionError

if TYPE_CHECKING:
    from openai import OpenAI

Prompt: TypeAlias = list[int] | str
Failure: TypeAlias = Literal["raise", "continue"]
PromptForm: TypeAlias = Literal["ids", "text"]

_ALTERNATIVES = (20, 5, 1)
"""Numbers of alternatives that are asked for until one is granted: vLLM's limit, OpenAI's, and the least."""
_NEUTRAL = {("top_k", -1), ("min_p", 0.0)}
"""Fields that are sent although they ask for nothing: llama.cpp has other defaults."""
_CONNECT_SECONDS = 10.0
_LONGEST_QUOTE = 300
"""Characters of a server's own words in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that the server's model could write next."""

    token_id: int | None
    text: str
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenToken:
    """A token of an answer, or of a prompt that was scored.

    Args:
        log_prob: None where there is none: of a text's first token.
        alternatives: the likeliest tokens in its place, this one perhaps among them.
    """

    token_id: int | None
    text: str
    log_prob: float | None
    alternatives: Sequence[Alternative]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What an answer's next chunk holds.

    Args:
        token_ids: of the text; None if the server does not say.
        tokens: what is known of them; empty if the server does not say.
        finish: "stop" if the text ends, "length" if the server goes on when it is asked to; None in between.
    """

    text: str
    token_ids: list[int] | None
    tokens: list[WrittenToken]
    finish: str | None


class Endpoint:
    """A remote model that writes steps, as the target or as the draft of `specdec.generate(..., router=...)`.

    One instance may serve many calls.

    Args:
        base_url: with its version: "http://localhost:8000/v1".
        model: its name there; None takes the first that the server lists.
        api_key: None takes the environment's OPENAI_API_KEY, if it is set. It is sent, never shown and never logged.
        prompts: "ids" sends token ids, for servers whose model has the tokenizer of the call. "text" sends text, for
            servers that take nothing else, and for models of another tokenizer; steps are then tokenized here.
        timeout: seconds to wait for the next part of an answer (and at most 10 for a connection).
        retries: how often a request is repeated, with growing pauses, after a connection error, a time-out, or status
            408, 409, 429 or 5xx; as often an answer that breaks off is taken up where it broke.
        on_failure: when that was in vain: "raise" an `EndpointError` with what was generated, or "continue": the other
            writer goes on alone until the call returns. One that is not there when a call begins is always an error.
        max_parallel: rows of a batch that are written at once.
        extra_body: further fields of every request, under the server's own names.

    Raises:
        UnsupportedOptionError: the `openai` client is not installed.
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        prompts: PromptForm = "ids",
        timeout: float = 60.0,
        retries: int = 3,
        on_failure: Failure = "raise",
        max_parallel: int = 8,
        extra_body: Mapping[str, Any] | None = None,
    ):
        _check(base_url, prompts, timeout=timeout, retries=retries, on_failure=on_failure, max_parallel=max_parallel)
        self.base_url, self.prompts, self.timeout, self.retries = base_url, prompts, timeout, retries
        self.on_failure, self.max_parallel = on_failure, max_parallel
        self._model = model
        self._key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        self._extra = dict(extra_body or {})
        self._asks_ids = False
        self._alternatives: int | None = None
        self._scores: bool | None = None

    def __repr__(self) -> str:
        parts = urlsplit(self.base_url)
        address = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        return f"Endpoint({address!r}{f', model={self._model!r}' if self._model else ''})"

    def connect(self) -> None:
        """Make sure that somebody is there, and find the model's name if none was given.

        Raises:
            EndpointError: nobody is, or the key is refused, or there is no model.
        """
        import openai

        try:
            listed = [model.id for model in self._client.models.list()]
        except openai.NotFoundError:
            listed = []  # some servers have no list
        except Exception as error:
            raise self._error(error) from error
        if self._model is None:
            if not listed:
                raise EndpointError(self, "the server lists no model: pass model=")
            self._model = listed[0]

    def num_alternatives(self, prompt: Prompt) -> int:
        """For how many of the likeliest tokens it gives log-probabilities; 0 for none. Found by trial, once.

        Raises:
            EndpointError: it does not answer.
        """
        if self._alternatives is None:
            self._alternatives = self._granted_alternatives(prompt)
        return self._alternatives

    def scores_prompts(self, prompt: Prompt) -> bool:
        """Whether it gives log-probabilities of a text that it is given (`echo`). Found by trial, once.

        Raises:
            EndpointError: it does not answer.
        """
        if self._scores is None:
            self._scores = self._granted_echo(prompt)
        return self._scores

    def accepted(self, prompt: Prompt, fields: Mapping[str, Any]) -> dict[str, Any]:
        """These fields of sampling, without those that change nothing, if the server does not know them.

        Raises:
            EndpointError: it refuses others.
        """
        if fields.keys() <= {"temperature"}:
            return dict(fields)
        meant = {name: value for name, value in fields.items() if (name, value) not in _NEUTRAL}
        for tried in (dict(fields), meant):
            try:
                self._complete(prompt, 0, tried)
            except EndpointError as error:
                if not _is_refusal(error) or tried is meant:
                    raise
            else:
                break
        return tried

    def stream(
        self, prompt: Prompt, num_tokens: int, *, num_alternatives: int, fields: Mapping[str, Any]
    ) -> Generator[Piece, None, None]:
        """The endpoint's continuation, piece by piece; whoever stops reading ends it.

        Args:
            num_tokens: at most.
            num_alternatives: how many are to be given at each place.
            fields: of sampling.

        Raises:
            EndpointError: not final where the answer broke off.
        """
        request = self._request(prompt, num_tokens, num_alternatives, fields)
        try:
            answer = self._client.completions.create(**request, stream=True)
        except Exception as error:
            raise self._error(error) from error
        finish, is_begun = None, False
        try:
            with answer:
                for chunk in answer:
                    if (piece := _read(chunk)) is not None:
                        finish, is_begun = piece.finish, True
                        yield piece
        except Exception as error:
            raise self._error(error, is_final=False) from error
        if finish is None:
            trouble = "the answer broke off" if is_begun else "the answer holds no completion"
            raise EndpointError(self, trouble, is_final=False)

    def first_alternatives(self, prompt: Prompt) -> Sequence[Alternative]:
        """The likeliest next tokens, as many as the endpoint lists.

        Raises:
            EndpointError: as of `stream`.
        """
        piece = self._complete(prompt, self.num_alternatives(prompt), {"temperature": 0.0})
        return piece.tokens[0].alternatives if piece.tokens else ()

    def scored_prompt(self, prompt: Sequence[int], num_tokens: int) -> list[WrittenToken]:
        """The last tokens of a prompt, each with its log p and the likeliest one in its place.

        Raises:
            EndpointError: as of `stream`, or the endpoint does not give them.
        """
        if self.prompts == "text":
            raise EndpointError(self, "a given text is scored on token ids only: pass prompts='ids'")
        piece = self._complete(list(prompt), 1, {"temperature": 0.0, "echo": True})
        told = piece.tokens[len(prompt) - num_tokens : len(prompt)]
        scored = [token for token in told if token.log_prob is not None]
        if len(scored) < num_tokens:
            raise EndpointError(self, f"it scored {len(scored)} of {num_tokens} tokens of a given text")
        return scored

    @cached_property
    def _client(self) -> OpenAI:
        from openai import OpenAI, Timeout

        timeout = Timeout(self.timeout, connect=min(self.timeout, _CONNECT_SECONDS))
        key = self._key or "none"
        return OpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=self.retries)

    def _request(self, prompt: Prompt, num_tokens: int, alternatives: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in fields.items() if name in ("temperature", "top_p", "seed", "echo")}
        extra = {name: value for name, value in fields.items() if name not in known}
        if self._asks_ids:
            extra["return_token_ids"] = True  # vLLM's; llama.cpp tells ids with log-probabilities
        if alternatives:
            known["logprobs"] = alternatives
        return {
            "model": self._model or "",
            "prompt": prompt,
            "max_tokens": num_tokens,
            "extra_body": {**extra, **self._extra},
            **known,
        }

    def _complete(self, prompt: Prompt, alternatives: int, fields: Mapping[str, Any]) -> Piece:
        """An answer of one token."""
        try:
            answer = self._client.completions.create(**self._request(prompt, 1, alternatives, fields), stream=False)
            piece = _read(answer)
        except Exception as error:
            raise self._error(error) from error
        if piece is None:
            raise EndpointError(self, "the answer is empty")
        return piece

    def _granted_alternatives(self, prompt: Prompt) -> int:
        """Ask for less and less; strict servers refuse what they do not know, so ids too may not be asked for."""
        refusal: EndpointError | None = None
        ways = (True, False) if self.prompts == "ids" else (False,)
        for wanted, asks_ids in product((*_ALTERNATIVES, 0), ways):
            self._asks_ids = asks_ids
            try:
                piece = self._complete(prompt, wanted, {"temperature": 0.0})
            except EndpointError as error:
                if not _is_refusal(error):
                    raise
                refusal = error
            else:
                return max((min(wanted, len(token.alternatives)) for token in piece.tokens), default=0)
        assert refusal is not None
        raise refusal

    def _granted_echo(self, prompt: Prompt) -> bool:
        if self.prompts == "text" or isinstance(prompt, str):
            return False
        tried = prompt if len(prompt) > 1 else prompt * 2  # nothing is known of a text's first token
        try:
            self.scored_prompt(tried, len(tried) - 1)
        except EndpointError as error:
            if _is_refusal(error) or error.__cause__ is None:
                return False
            raise
        return True

    def _error(self, error: Exception, *, is_final: bool = True) -> EndpointError:
        """What went wrong in words; the key is not among them, whatever the server says."""
        import openai

        if isinstance(error, EndpointError):
            return error
        if isinstance(error, openai.APITimeoutError):
            trouble = f"no answer within {self.timeout:g} s"
        elif isinstance(error, openai.APIConnectionError):
            trouble = f"cannot be reached, or has closed the connection ({type(error.__cause__ or error).__name__})"
        elif isinstance(error, openai.APIStatusError):
            trouble = f"status {error.status_code}: {_quoted(error.message)}"
        elif isinstance(error, openai.APIError):
            trouble = f"it says: {_quoted(error.message)}"
        elif isinstance(error, (json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError)):
            trouble = f"the answer cannot be read as a completion ({type(error).__name__}: {_quoted(str(error))})"
        else:
            raise error
        if self._key:
            trouble = trouble.replace(self._key, "***")
        return EndpointError(self, trouble, is_final=is_final)


def _check(base_url: Any, prompts: Any, *, timeout: Any, retries: Any, on_failure: Any, max_parallel: Any) -> None:
    if find_spec("openai") is None:
        raise UnsupportedOptionError("an endpoint needs the openai client: pip install 'specdec-runtime[remote]'")
    if not isinstance(base_url, str) or urlsplit(base_url).scheme not in ("http", "https"):
        raise ValueError(f"Endpoint({base_url!r}): pass a URL such as 'http://localhost:8000/v1'")
    for name, value, allowed in (("prompts", prompts, PromptForm), ("on_failure", on_failure, Failure)):
        if value not in get_args(allowed):
            raise ValueError(f"Endpoint({name}={value!r}): it is one of {get_args(allowed)}")
    if not timeout > 0 or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"Endpoint(timeout={timeout!r}, retries={retries!r}): seconds above 0, and 0 retries or more")
    if not isinstance(max_parallel, int) or max_parallel < 1:
        raise ValueError(f"Endpoint(max_parallel={max_parallel!r}): it is a positive integer")


def _is_refusal(error: EndpointError) -> bool:
    """Whether the server understood a request and declined it."""
    return getattr(error.__cause__, "status_code", None) in (400, 422)


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _read(answer: Any) -> Piece | None:
    """The first choice of a completion or of a chunk of one; None if it has no choice (it counts tokens, say)."""
    fields = answer.to_dict()
    if fields["choices"] == []:
        return None
    choice = fields["choices"][0]
    tokens = _tokens(choice.get("logprobs") or {})
    ids: list[Any] | None = choice.get("token_ids")
    if ids is None and tokens and all(token.token_id is not None for token in tokens):
        ids = [token.token_id for token in tokens]
    if not isinstance(choice["text"], str) or (ids is not None and not all(type(token) is int for token in ids)):
        raise TypeError(f"a choice without text: {choice}")
    return Piece(text=choice["text"], token_ids=ids, tokens=tokens, finish=choice.get("finish_reason"))


def _tokens(log_probs: Mapping[str, Any]) -> list[WrittenToken]:
    """In the form of completions, or in that of chats, which llama.cpp uses for both."""
    if log_probs.get("content") is not None:
        return [
            WrittenToken(
                token_id=token.get("id"),
                text=token["token"],
                log_prob=token["logprob"],
                alternatives=[
                    Alternative(token_id=other.get("id"), text=other["token"], log_prob=float(other["logprob"]))
                    for other in token.get("top_logprobs") or ()
                ],
            )
            for token in log_probs["content"]
        ]
    texts = log_probs.get("tokens") or []
    tops = log_probs.get("top_logprobs") or [None] * len(texts)
    columns = zip(texts, log_probs.get("token_logprobs") or [], tops, strict=True)
    return [
        WrittenToken(
            token_id=None,
            text=text,
            log_prob=log_prob,
            alternatives=[
                Alternative(token_id=None, text=other, log_prob=float(value)) for other, value in (top or {}).items()
            ],
        )
        for text, log_prob, top in columns
    ]
