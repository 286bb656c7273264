"""What a server said, and what it tells of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specdec.audit.cases import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of an answer.

    Args:
        log_prob: natural logarithm, before penalties.
        others: the likeliest texts in its place -> their log-probabilities; this one may be among them.
    """

    text: str
    log_prob: float
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer to a case, or why there is none.

    Args:
        tokens: empty if the server does not tell them.
        finish: "stop" or "length", as the server says.
        num_drafted, num_accepted: None if the server does not say.
        error: what went wrong; None if nothing did.
        status: of HTTP, where it refused.
    """

    text: str = ""
    tokens: Sequence[Token] = ()
    finish: str | None = None
    num_prompt_tokens: int | None = None
    num_new_tokens: int | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None
    error: str | None = None
    status: int | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the server understood, and does not do that."""
        return self.status in (400, 404, 405, 422, 501)


class Reference(Protocol):
    """What decodes without speculation."""

    def describe(self) -> str:
        """What it is, for the report."""

    def answer(self, case: Case, *, with_logprobs: bool = False) -> Answer:
        """Its answer; never raises for what a server says."""

    @property
    def takes_several(self) -> bool:
        """Whether it may be asked by several threads at once."""

    @property
    def tie_bound(self) -> float | None:
        """What is known of its rounding, in natural logarithms; None: it is to be measured."""


def placed(answer: Answer) -> Iterator[tuple[int, Token]]:
    """Where in the text each token begins. Ends early where the tokens do not spell the text.

    A tokenizer may spell a token without the blank before it; that is put right.
    """
    position = 0
    for token in answer.tokens:
        at = next((at for at in (position, position + 1) if answer.text.startswith(token.text, at)), None)
        if at is None or (at > position and answer.text[position] != " "):
            return
        yield position, token
        position = at + len(token.text)


def tokens_from(document: Mapping[str, Any] | None) -> list[Token]:
    """Of the `logprobs` of a choice: OpenAI's two forms, and llama.cpp's, which has the newer one everywhere."""
    if not document:
        return []
    if document.get("content") is not None:
        return [
            Token(
                text=entry["token"],
                log_prob=entry["logprob"],
                others={other["token"]: other["logprob"] for other in entry.get("top_logprobs") or ()},
            )
            for entry in document["content"]
        ]
    tops = document.get("top_logprobs") or [{}] * len(document.get("tokens") or ())
    rows = zip(document.get("tokens") or (), document.get("token_logprobs") or (), tops, strict=False)
    return [Token(text=text, log_prob=p, others=others or {}) for text, p, others in rows if p is not None]
