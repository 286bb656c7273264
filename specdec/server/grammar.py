"""Replies that follow a JSON schema: a grammar of llguidance as a logits processor.

The mask of a prefix depends on its tokens alone, whatever was asked before: drafted prefixes that are dropped leave
no trace, so that speculation is exact under it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MAX_KEPT = 32
"""Prefixes whose state is kept, of a round's trees: a draft model asks about them first, then the target. A state takes
about 120 bytes for each byte of the document."""
_MAX_STEPS = 32
"""How far back a known beginning of a prefix is looked for; beyond it, all is consumed again."""
OVERRIDES: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A]{1,24}"}
"""How llguidance reads a schema. Between the parts of a document: enough to indent, too little to go on for ever."""
_LIMITS = LLParserLimits(verbose_errors=False)
"""llguidance's own: a mask takes tens of milliseconds at most, a grammar about 15 MB. They do not bound `compile`."""
_MAX_REASON = 500
ANY_OBJECT = {"type": "object"}
"""The schema of `response_format` "json_object"."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What a reply is to follow, before it is compiled: a JSON schema as JSON, or a Lark grammar."""

    kind: Literal["json", "lark"]
    text: str

    @classmethod
    def of_schema(cls, schema: dict[str, Any] | bool) -> GrammarSource:
        """A JSON schema; the order of its properties is that of the reply."""
        return cls("json", json.dumps(schema))


class GrammarError(ValueError):
    """A grammar that cannot be used, or that became too complex while a reply was written."""


def serialized(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer as the JSON of the `tokenizers` library. Raises `ValueError` if it is none of that library."""
    backend = copy(getattr(tokenizer, "backend_tokenizer", None))
    if not tokenizer.is_fast or backend is None:
        raise ValueError("only tokenizers of the `tokenizers` library can follow a grammar")
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


def refusal(reason: str) -> str:
    """What is said about a schema that llguidance refuses, with what to do about it where that is known."""
    shown = reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."
    advice = ""
    if reason.startswith("Unable to determine if regex is empty"):
        advice = "several patterns (or a pattern and a length) for one text are too much: leave one of them. "
    return f"this JSON schema cannot be followed: {advice}{shown}"


class Grammars:
    """Makes processors of JSON schemas, for one tokenizer.

    Args:
        eos_ids: tokens that end a reply; they are allowed where the document may end.

    Raises:
        ValueError: the tokenizer is none of the `tokenizers` library, or there is no token that ends a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]):
        if not eos_ids:
            raise ValueError("no token ends a reply")
        self.tokenizer_json = serialized(tokenizer)
        self.eos_ids = list(eos_ids)
        self._tokenizer = LLTokenizer(self.tokenizer_json, eos_token=self.eos_ids)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing, if the tokenizer does not know it."""
        return self._tokenizer.decode_bytes([token]) if token < self._tokenizer.vocab_size else b""

    def compile(self, source: GrammarSource) -> str:
        """A grammar of a source that is trusted: some take for ever (see `sandbox`).

        Raises:
            GrammarError: says what is wrong with a schema, or which keyword is not known here.
        """
        try:
            grammar = (
                LLMatcher.grammar_from_lark(source.text)
                if source.kind == "lark"
                else LLMatcher.grammar_from_json_schema(source.text, overrides=OVERRIDES)
            )
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:  # RecursionError is none: the body's parser refuses such depths before
            problem = str(error)
        if problem:
            raise GrammarError(refusal(problem))
        return grammar

    def matcher(self, grammar: str) -> LLMatcher:
        """A grammar of `compile` at its beginning. Takes as long as `compile`, and lets other threads run."""
        return _checked(LLMatcher(self._tokenizer, grammar, limits=_LIMITS))

    def processor(self, grammar: str, prompt_length: int) -> GrammarProcessor:
        """What allows a reply to follow a grammar of `compile`, and nothing else."""
        return GrammarProcessor(self.matcher(grammar), prompt_length)


class GrammarProcessor(LogitsProcessor):
    """Leaves only the tokens that can go on towards a complete document.

    A prefix has a matcher of its own, a copy of that of its longest known beginning: llguidance can also take tokens
    back, but its masks are then not always those of the tokens that are left. A prefix that has left the grammar (a
    drafted token that will be refused) is not masked at all: nothing is drawn there.

    Args:
        matcher: that has consumed nothing; it is not changed.
        prompt_length: tokens at the beginning that are no part of the reply, padding included.
    """

    def __init__(self, matcher: LLMatcher, prompt_length: int):
        self._root = _State(matcher)
        self._prompt_length = prompt_length
        self._states: OrderedDict[tuple[int, ...], _State | None] = OrderedDict()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] with -inf where the grammar of the row's prefix [B, L] does not go on.

        Raises:
            GrammarError: the grammar has become too complex.
        """
        scores = scores.clone()
        for row, prefix in enumerate(input_ids[:, self._prompt_length :].tolist()):
            state = self._state(tuple(prefix))
            if state is not None:
                allowed = state.allowed()
                width = min(len(allowed), scores.shape[1])  # either may be padded to a round number
                scores[row, :width].masked_fill_(~allowed[:width].to(scores.device), -torch.inf)
                scores[row, width:] = -torch.inf
        return scores

    def forced_tokens(self, prefix: Sequence[int]) -> list[int]:
        """The tokens after a prefix that the grammar leaves no choice about: none, where it has one."""
        reply = tuple(prefix[self._prompt_length :])
        state = self._state(reply)
        if state is None:
            return []
        forced = state.forced()
        after = state.after(forced) if forced else state
        end = None if after is None else after.only()
        return forced if end is None else [*forced, end]

    def _state(self, prefix: tuple[int, ...]) -> _State | None:
        """None for a prefix outside the grammar."""
        if prefix not in self._states:
            self._states[prefix] = self._follow(prefix)
            if len(self._states) > _MAX_KEPT:
                self._states.popitem(last=False)
        self._states.move_to_end(prefix)
        return self._states[prefix]

    def _follow(self, prefix: tuple[int, ...]) -> _State | None:
        for length in range(len(prefix) - 1, max(0, len(prefix) - _MAX_STEPS), -1):
            if prefix[:length] in self._states:
                known = self._states[prefix[:length]]
                return None if known is None else known.after(prefix[length:])
        return self._root.after(prefix)


class _State:
    """A matcher that has consumed a prefix. It is copied to go on, never changed."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._allowed: Tensor | None = None

    def after(self, tokens: Sequence[int]) -> _State | None:
        """The state some tokens later; None if they leave the grammar."""
        matcher = self._matcher.deep_copy()
        if tokens and matcher.try_consume_tokens(list(tokens)) < len(tokens):
            return None
        return _State(_checked(matcher))

    def forced(self) -> list[int]:
        """What must come next, in the tokens that llguidance's masks allow for it."""
        return self._matcher.deep_copy().compute_ff_tokens()

    def only(self) -> int | None:
        """The one token that may come next; None if there are several."""
        allowed = self.allowed().nonzero()
        return int(allowed[0]) if len(allowed) == 1 else None

    def allowed(self) -> Tensor:
        """What may come next: bool over the tokenizer's vocabulary."""
        if self._allowed is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            _checked(self._matcher)
            self._allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        return self._allowed


def _checked(matcher: LLMatcher) -> LLMatcher:
    if matcher.is_error():
        raise GrammarError(f"the JSON schema is too complex: {matcher.get_error()}")
    return matcher
