"""A server of OpenAI's API, asked by the standard library alone: what it refuses is an answer too."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from specdec.audit.answers import Answer, tokens_from
from specdec.audit.cases import Case
from specdec.errors import SpecdecError

_ALTERNATIVES = (20, 5, 1)
"""Numbers of log-probabilities that are asked for until one is granted: vLLM's limit, OpenAI's, and the least."""
_CONNECT_SECONDS = 30.0
_LONGEST_QUOTE = 200
_DRAFTED = re.compile(r"^(\w+:)?\w*(?:draft(?:ed)?)_tokens(?:_total)?(?:\{[^}]*\})?\s+(\S+)$", re.MULTILINE)


class Server:
    """An endpoint.

    Args:
        url: with or without the `/v1` at its end.
        model: its name there; None takes the first that is listed.
        extra: fields of every request, beyond those of the case.
        timeout: seconds for an answer.

    Raises:
        ValueError: `url` is none.
        SpecdecError: nobody answers there as OpenAI's API does.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
    ):
        if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
            raise ValueError(f"an endpoint is an address that starts with http:// or https://, got {url!r}")
        self.root = url.rstrip("/").removesuffix("/v1")
        self.extra, self.timeout = dict(extra or {}), timeout
        self._key = api_key
        self._card = self._find(model)
        self.model = str(self._card["id"])
        self._num_alternatives: dict[bool, int | None] = {}

    takes_several = True
    tie_bound = None

    def with_extra(self, extra: Mapping[str, Any]) -> Server:
        """The same server, with further fields in every request."""
        both = {**self.extra, **extra}
        return Server(self.root, model=self.model, api_key=self._key, extra=both, timeout=self.timeout)

    def describe(self) -> str:
        fields = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in self.extra.items())
        return f"{_without_password(self.root)}/v1, model {self.model}{fields}"

    def answer(self, case: Case, *, with_logprobs: bool = False) -> Answer:
        """Ask once; without log-probabilities where the server has none."""
        if not with_logprobs:
            return self._ask(case, {})
        for number in self._alternatives(case):
            answer = self._ask(case, _logprobs(case, number))
            if not answer.is_refused:
                self._num_alternatives[case.is_chat] = number
                return answer
        plain = self._ask(case, {})
        if plain.error is None:
            self._num_alternatives[case.is_chat] = None
        return plain

    def stream(self, case: Case, *, leave_after: int | None = None) -> Answer:
        """Ask for a stream, and hang up after so many parts of it."""
        text, finish, usage = "", None, None
        try:
            with self._open(case.path, {**self._body(case), "stream": True}) as response:
                for count, chunk in enumerate(_events(response)):
                    if count == leave_after:
                        break
                    if "error" in chunk:
                        return Answer(error=_told(json.dumps(chunk)))
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or ():
                        text += _text_of(choice)
                        finish = choice.get("finish_reason") or finish
        except (OSError, http.client.HTTPException, ValueError) as error:
            return _failed(error)
        return Answer(text=text, finish=finish, **_counts({"usage": usage}))

    def context_length(self) -> int | None:
        """As vLLM and llama.cpp tell it; None if it is not told."""
        if self._card.get("max_model_len"):
            return int(self._card["max_model_len"])
        settings = (self._get("/props") or {}).get("default_generation_settings") or {}
        return int(settings["n_ctx"]) if settings.get("n_ctx") else None

    def version(self) -> str | None:
        """Of the engine, where it tells: vLLM at /version, llama.cpp at /props."""
        told = (self._get("/version") or {}).get("version") or (self._get("/props") or {}).get("build_info")
        return None if told is None else str(told)

    def drafted_so_far(self) -> float | None:
        """Drafted tokens by the counters of /metrics; None if there are none."""
        values = [float(value) for _, value in _DRAFTED.findall(self._read("/metrics") or "")]
        return sum(values) if values else None

    def refuses(self, extra: Mapping[str, Any], case: Case) -> bool:
        """Whether a field is looked at, and refused."""
        return self._ask(case, extra).is_refused

    def _alternatives(self, case: Case) -> tuple[int, ...]:
        if case.is_chat not in self._num_alternatives:
            return _ALTERNATIVES
        known = self._num_alternatives[case.is_chat]
        return () if known is None else (known,)

    def _ask(self, case: Case, extra: Mapping[str, Any]) -> Answer:
        try:
            with self._open(case.path, {**self._body(case), **extra}) as response:
                document = json.load(response)
            (choice,) = document["choices"]
            return Answer(
                text=_text_of(choice),
                tokens=tokens_from(choice.get("logprobs")),
                finish=choice.get("finish_reason"),
                **_counts(document),
            )
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            return _failed(error)

    def _body(self, case: Case) -> dict[str, Any]:
        return {"model": self.model, **case.body(), **self.extra}

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout: float | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.root}{path}", data, headers)
        return urllib.request.urlopen(request, timeout=timeout or self.timeout)

    def _read(self, path: str) -> str | None:
        try:
            with self._open(path, None, _CONNECT_SECONDS) as response:
                return str(response.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException):
            return None

    def _get(self, path: str) -> dict[str, Any] | None:
        try:
            document = json.loads(self._read(path) or "")
        except ValueError:
            return None
        return document if isinstance(document, dict) else None

    def _find(self, model: str | None) -> dict[str, Any]:
        """The entry of a model in the list of models."""
        where = _without_password(self.root)
        try:
            with self._open("/v1/models", None, _CONNECT_SECONDS) as response:
                cards = json.load(response)["data"]
            known = [str(card["id"]) for card in cards]
        except urllib.error.HTTPError as error:
            raise SpecdecError(f"{where}/v1/models answers {_failed(error).error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise SpecdecError(f"cannot reach {where}: {getattr(error, 'reason', error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SpecdecError(f"{where} does not answer as OpenAI's API does: it lists no models") from error
        if not known or model not in (None, *known):
            raise SpecdecError(f"{where} has no model {model}; it has: {', '.join(known) or 'none'}")
        return dict(cards[0 if model is None else known.index(model)])


def _logprobs(case: Case, number: int) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": number} if case.is_chat else {"logprobs": number}


def _text_of(choice: Mapping[str, Any]) -> str:
    if "text" in choice:
        return choice["text"] or ""
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _counts(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of tokens: OpenAI's usage, and llama.cpp's timings."""
    usage, timings = document.get("usage") or {}, document.get("timings") or {}
    details = usage.get("completion_tokens_details") or {}
    accepted, rejected = (details.get(f"{name}_prediction_tokens") for name in ("accepted", "rejected"))
    if accepted is None and "prompt_n" in timings:
        accepted = timings.get("draft_n_accepted", 0)
        rejected = timings.get("draft_n", 0) - accepted
    return {
        "num_prompt_tokens": usage.get("prompt_tokens"),
        "num_new_tokens": usage.get("completion_tokens"),
        "num_accepted": accepted,
        "num_drafted": None if accepted is None or rejected is None else accepted + rejected,
    }


def _events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode().removeprefix("data:").strip() if line.startswith(b"data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _failed(error: Exception) -> Answer:
    if isinstance(error, urllib.error.HTTPError):
        with error:
            told = _told(error.read().decode(errors="replace"))
        return Answer(error=f"{error.code} {told}", status=error.code)
    if isinstance(error, TimeoutError):
        return Answer(error="no answer in time")
    if isinstance(error, OSError):
        return Answer(error=f"the connection failed: {getattr(error, 'reason', error)}")
    return Answer(error=f"this is no answer of OpenAI's API: {error}")


def _told(body: str) -> str:
    """A server's own words."""
    try:
        told = json.loads(body)
        error = told.get("error", told)
        body = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(body.split())[:_LONGEST_QUOTE]


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
