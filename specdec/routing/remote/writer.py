"""A writer whose model is an endpoint: it writes steps by request, and holds the text as token ids like any writer.

A step is streamed and cut here, by the same rule as everywhere (`StepStop`), and the stream is closed where the step
ends. Every request is the text so far and nothing else, so a server that caches prompts reads only what is new. What a
broken stream has brought is kept, and the next request goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event, Lock
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import logits_process as lp

from routers import Signals
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stats import DecodingStats
from specdec.errors import EndpointError, UnsupportedOptionError
from specdec.routing.remote.endpoint import Endpoint, Piece, Prompt, WrittenToken
from specdec.routing.stop import StepStop
from specdec.text.translation import BROKEN, continuation, decode_from, encode_inside

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_SENT = {
    lp.TemperatureLogitsWarper: ("temperature", "temperature"),
    lp.TopKLogitsWarper: ("top_k", "top_k"),
    lp.TopPLogitsWarper: ("top_p", "top_p"),
    lp.MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processors that servers have too: their name there, and the attribute that holds the value."""
_OTHER_TOKENIZER = "the endpoint's model has another tokenizer: pass Endpoint(prompts='text')"
_T = TypeVar("_T")


def sampling_fields(sampler: Sampler) -> dict[str, Any]:
    """The call's way of choosing tokens, as servers know it.

    Raises:
        UnsupportedOptionError: a processor that cannot be sent.
    """
    # every value is sent: servers have defaults of their own
    fields: dict[str, Any] = {"temperature": 0.0}
    if sampler.do_sample:
        fields = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    for processor in sampler.processors:
        if type(processor) not in _SENT:
            raise UnsupportedOptionError(
                f"{type(processor).__name__} cannot be sent to an endpoint: leave out the option that made it (it may "
                "stand in the model's generation_config), and give the server's own to Endpoint(extra_body={...})"
            )
        name, attribute = _SENT[type(processor)]
        fields[name] = getattr(processor, attribute)
    return fields


@dataclass(kw_only=True, eq=False)
class _Answer:
    """What one row's requests have brought.

    Args:
        known: ids of the text before it.
    """

    known: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    seed: int | None
    ids: list[int] = field(default_factory=list)
    """Settled: as the server told them."""
    loose: list[int] = field(default_factory=list)
    """After them: text of which the server tells no ids, tokenized here, for as long as it may change."""
    text: str = ""
    loose_text: str = ""
    scored: list[WrittenToken] = field(default_factory=list)
    has_ended: bool = False
    num_requests: int = 0
    error: EndpointError | None = None

    @property
    def tokens(self) -> list[int]:
        return [*self.ids, *self.loose]

    def add(self, piece: Piece) -> None:
        """Take the next piece; raises `ValueError` if its ids are none of this tokenizer."""
        self.has_ended = piece.finish == "stop"
        self.scored += piece.tokens
        self.text += piece.text
        if piece.token_ids is None:
            self.loose_text += piece.text
            self._tokenize()
            return
        ids = [*self.tokens, *piece.token_ids]
        if not all(0 <= token < self.vocab_size for token in piece.token_ids):
            raise ValueError(f"token ids {piece.token_ids} are not among the {self.vocab_size} of this tokenizer")
        spelled = [token for token in ids if token not in self.tokenizer.all_special_ids]  # not by every server
        said = [decode_from(self.tokenizer, [*self.known, *some], len(self.known)) for some in (ids, spelled)]
        if BROKEN not in said[0] + self.text and not any(text.startswith(self.text) for text in said):
            raise ValueError(f"its token ids say {said[0]!r} but its text is {self.text!r}")
        self.ids, self.loose, self.loose_text = ids, [], ""

    def signals(self, count: int) -> list[WrittenToken]:
        """What is known of the first tokens; where the server's may be others, of the same share of the text."""
        if not self.loose:
            return self.scored[:count]
        num_chars, length, kept = len(self.tokenizer.decode(self.tokens[:count])), 0, []
        for token in self.scored:
            if length < num_chars:
                kept.append(token)
            length += len(token.text)
        return kept

    def _tokenize(self) -> None:
        before = [*self.known, *self.ids]
        self.loose = continuation(self.tokenizer, before, self.loose_text)
        if not self.loose and self.loose_text:
            self.loose = encode_inside(self.tokenizer, self.loose_text)


class RemoteWriter:
    """Writes steps by request: the part of a `StepWriter` that `StepLoop` uses.

    Args:
        sequences: the text of the unfinished rows.
        stop: where steps and texts end.
        sampler: how tokens are chosen; see `sampling_fields`.
        vocab_size: ids lie below it.
        end_token: stands for the end of a text, where the server does not tell its id; None if the call has none.

    Raises:
        UnsupportedOptionError: a processor that cannot be sent.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequences: Sequences,
        stop: StepStop,
        sampler: Sampler,
        vocab_size: int,
        end_token: int | None,
    ):
        self.endpoint, self.sequences, self.stop = endpoint, sequences, stop
        self.stats = DecodingStats.for_rows(len(sequences))
        self.num_forwards = 0
        """Nobody knows."""
        self.num_requests = 0
        self._tokenizer, self._sampler, self._vocab_size = tokenizer, sampler, vocab_size
        self.fields = sampling_fields(sampler)
        """Sent with every request."""

        self._end_token = end_token
        self.num_alternatives = 0
        """How many log-probabilities to ask for at each token."""

        self._scored: list[list[WrittenToken]] = [[] for _ in sequences.rows]
        self._tokenizing, self._over = Lock(), Event()

    def append_draft_step(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """A server cannot be given a draft: it writes its own words."""

    def write(self, limits: Mapping[int, int]) -> None:
        """As `StepWriter.write`, all rows at once.

        Raises:
            EndpointError: the endpoint has failed for good; what it had written until then stands.
        """
        self.begin(limits)
        self.round()

    def begin(self, limits: Mapping[int, int]) -> None:
        """As `StepWriter.begin`; one round is enough."""
        for row, limit in limits.items():
            self.stop.go_on(row, len(self.step_tokens(row)), limit)

    def round(self) -> None:
        """Write every row that writes up to its pause; raises as `write`."""
        answers = {
            row: _Answer(
                known=self.sequences.tokens[row],
                tokenizer=self._tokenizer,
                vocab_size=self._vocab_size,
                seed=self._draw_seed() if self._sampler.do_sample else None,
            )
            for row in self.stop.writing
        }
        if not answers:
            return
        self.each(lambda row: self._fill(answers[row], row), answers)
        self._take(answers)
        for step in self.stop.steps:
            step.writing = False
        for answer in answers.values():
            if answer.error is not None:
                raise answer.error

    def step_tokens(self, row: int) -> list[int]:
        """What stands in a row's step."""
        return self.sequences.tokens[row][self.stop.steps[row].start :]

    def step_signals(self, row: int) -> Signals:
        """Of the step's tokens, as far as the endpoint tells: one entry for each of *its* tokens.

        Entropies and margins are those of the alternatives that it lists; what they leave counts as one token more, so
        that an entropy is a lower bound.
        """
        scored = [token for token in self._scored[row] if token.log_prob is not None]
        columns = np.array([_signals(token) for token in scored], np.float32).reshape(len(scored), 3)
        return Signals(log_probs=columns[:, 0], entropies=columns[:, 1], margins=columns[:, 2])

    def sync(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Make these the rows' tokens."""
        for row, text in texts.items():
            length = len(self.sequences.tokens[row])
            if self.sequences.replace(row, text) < max(length, len(text)):
                self.stop.steps[row].is_over = self.stop.steps[row].is_last = False
                self._scored[row] = []

    def begin_steps(self, rows: Iterable[int]) -> None:
        """The next step of these rows begins at their end."""
        for row in rows:
            self.stop.begin_step(row, self.sequences.tokens[row])
            self._scored[row] = []

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.sequences.select_rows(rows)
        self.stop.select_rows(rows)
        self._scored = [self._scored[row] for row in rows]

    def close(self) -> None:
        """No request of the run goes on."""
        self._over.set()

    def each(self, function: Callable[[int], _T], rows: Iterable[int]) -> list[_T]:
        """The function of every row, some at once; the time counts as the writer's."""
        started, rows = perf_counter(), list(rows)
        pool = ThreadPoolExecutor(max(1, min(len(rows), self.endpoint.max_parallel)))
        try:
            return list(pool.map(function, rows))
        except KeyboardInterrupt:
            self.close()
            raise
        finally:
            pool.shutdown(wait=not self._over.is_set(), cancel_futures=True)
            self.stats.verify_seconds += perf_counter() - started

    def prompt(self, tokens: Sequence[int]) -> Prompt:
        """A text as the endpoint is sent it."""
        return as_prompt(self.endpoint, self._tokenizer, tokens)

    def _fill(self, answer: _Answer, row: int) -> None:
        """Ask until the step is over or the endpoint has failed for good."""
        step, failures = self.stop.steps[row], 0
        room = max(1, self.stop.max_length - self.sequences.lengths[row])
        limit = min(step.limit - len(self.step_tokens(row)), room)
        while not self._over.is_set():
            before = len(answer.tokens)
            try:
                if self._listen(answer, row, limit):
                    return
                trouble = EndpointError(self.endpoint, "it stops before the step is over: is its context full?")
                trouble.is_final = len(answer.tokens) == before
            except EndpointError as error:
                trouble = error
            failures = 0 if len(answer.tokens) > before else failures + 1
            if trouble.is_final or failures > self.endpoint.retries:
                answer.error = trouble
                return
            if failures:
                self._over.wait(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1)))

    def _listen(self, answer: _Answer, row: int, limit: int) -> bool:
        """One request for what is missing; whether that was all."""
        with self._tokenizing:
            prompt = self.prompt([*answer.known, *answer.tokens])
        answer.num_requests += 1
        fields = self.fields if answer.seed is None else {**self.fields, "seed": answer.seed + answer.num_requests}
        pieces = self.endpoint.stream(
            prompt, limit - len(answer.tokens), num_alternatives=self.num_alternatives, fields=fields
        )
        with closing(pieces):
            for piece in pieces:
                with self._tokenizing:
                    try:
                        answer.add(piece)
                    except ValueError as error:
                        raise EndpointError(self.endpoint, f"{error}; {_OTHER_TOKENIZER}") from error
                    is_over = len(answer.tokens) >= limit or self.stop.ends(row, self.step_tokens(row), answer.tokens)
                if answer.has_ended or is_over or self._over.is_set():
                    return True
        return False

    def _take(self, answers: Mapping[int, _Answer]) -> None:
        """Commit what was written, up to where the step or the text ends."""
        candidates = [self._with_end(answers[row]) if row in answers else [] for row in range(len(self.sequences))]
        for row, tokens in enumerate(candidates):
            self.sequences.put(row, tokens)
        counts, _ = self.stop.cut(self.sequences, candidates, lambda count: None)
        for row, answer in answers.items():
            self.num_requests += answer.num_requests
            self.sequences.commit(row, candidates[row][: counts[row]])
            self._scored[row] += answer.signals(counts[row])
            if answer.has_ended and counts[row] == len(candidates[row]):
                self.stop.steps[row].is_over = self.stop.steps[row].is_last = True

    def _with_end(self, answer: _Answer) -> list[int]:
        tokens = answer.tokens
        if answer.has_ended and self._end_token is not None and not self.stop.eos_token_ids & set(tokens[-1:]):
            return [*tokens, self._end_token]
        return tokens

    def _draw_seed(self) -> int:
        source = self._sampler.generator
        device = None if source is None else source.device
        return int(torch.randint(2**31 - 1, (), generator=source, device=device))


def as_prompt(endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Prompt:
    """A text as an endpoint is sent it; a server puts the beginning-of-text token before a text itself."""
    if endpoint.prompts == "ids":
        return list(tokens)
    begins = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    return str(tokenizer.decode(list(tokens[begins:]), clean_up_tokenization_spaces=False))


def _signals(token: WrittenToken) -> tuple[float, float, float]:
    """log p, entropy in nats, margin."""
    assert token.log_prob is not None
    p = np.sort(np.exp([other.log_prob for other in token.alternatives]))[::-1]
    rest = max(0.0, 1.0 - float(p.sum()))
    entropy = -sum(chance * math.log(chance) for chance in (*p, rest) if chance > 0)
    return token.log_prob, entropy, float(p[0] - (p[1] if len(p) > 1 else rest)) if len(p) else 0.0
