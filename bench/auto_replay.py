"""Models and drafters that replay traces on a virtual clock: what `bench.simulate_auto` gives to the real `Auto`.

Shape legend: B rows, T slots, V vocabulary, A tokens of an answer, D depth of a draft, K ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bench.auto_clock import Clock, Timed
from bench.auto_traces import Trace
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.drafters import Auto, Cascade, Drafter, DraftSession, Outcome, QuantizedSelf, Run
from specdec.drafters.composite.nested import NestedSession
from specdec.drafters.model.growing import GrowingSession
from specdec.tree_model.model import TreeModel
from trees import Chain, Draft, GrowingTrees, Round, TreeBatch
from trees.token_source import TokenSource

_NOBODYS = 0
"""A token that no target says: traces are renumbered from 1 on."""


class _Replay:
    """Of the traces of a batch: knows where each row of a run is."""

    def __init__(self, traces: Sequence[Trace]):
        self.traces = traces

    def trace(self, sequences: Sequences, row: int) -> Trace:
        return self.traces[sequences.rows[row]]

    def position(self, sequences: Sequences, row: int) -> int:
        """Tokens of the answer that the row has."""
        return len(sequences.tokens[row]) - len(self.trace(sequences, row).prompt)


class ReplayedDraft(Drafter):
    """A draft model with a cache of its own."""

    supports_rollback = True

    def __init__(self, model: Timed, replay: _Replay):
        self.model = model
        self.replay = replay

    def start(self, run: Run) -> DraftSession:
        return _ReplayedSession(self, run)


class _ReplayedSource(TokenSource):
    """Of one layer: ranks are handed out in order."""

    def __init__(self, ranks: Sequence[tuple[Sequence[int], Sequence[float]]]):
        self._ranks = ranks
        self._taken = [0] * len(ranks)

    def take(self, slots: Sequence[int], count: int) -> tuple[list[list[int]], list[list[float]]]:
        tokens, probs = [], []
        for slot in slots:
            start = self._taken[slot]
            self._taken[slot] += count
            own_tokens, own_probs = (list(column[start : start + count]) for column in self._ranks[slot])
            tokens.append(own_tokens + [_NOBODYS] * (count - len(own_tokens)))
            probs.append(own_probs + [0.0] * (count - len(own_probs)))
        return tokens, probs


class _ReplayedSession(GrowingSession):
    """Follows the target as `SmallModel` does: what it has not read costs it time."""

    def __init__(self, drafter: ReplayedDraft, run: Run):
        super().__init__(run, Chain(5))
        self._model, self._replay = drafter.model, drafter.replay
        self._read: list[int] = []
        self._at_proposal: list[int] = []
        self._steps = self._num_forwards = 0

    @property
    def num_forwards(self) -> int:
        return self._num_forwards

    @property
    def num_uncached_tokens(self) -> int:
        lengths = self._lengths
        if not self._read:
            return len(lengths) * max(lengths)
        return len(lengths) * max(length - read - 1 for length, read in zip(lengths, self._read, strict=True))

    @property
    def draft_model(self) -> Timed:
        return self._model

    @property
    def _lengths(self) -> list[int]:
        return [len(tokens) for tokens in self._run.sequences.tokens]

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths)))
        if not self._read:
            self._read = [len(self._replay.trace(self._run.sequences, row).prompt) for row in range(len(max_depths))]
            self._forward(len(self._read) * max(self._read))
        self._forward(self.num_uncached_tokens + len(max_depths))
        self._read, self._at_proposal, self._steps = self._lengths, self._lengths, 0
        grower = self.policy.start(
            Round(max_depths=max_depths, sample=False, token_source=lambda scores, **_: self._layer(len(max_depths)))
        )
        while True:
            grower.grow(torch.zeros((len(max_depths), 1, 1)))
            self._steps += 1
            if not grower.needs_scores:
                return grower.finish()
            self._forward(len(max_depths))

    def observe(self, outcome: Outcome) -> None:
        if outcome.is_own and self._at_proposal:
            passed = [sum(node < self._steps - 1 for node in path) for path in outcome.paths]
            self._read = [start + count for start, count in zip(self._at_proposal, passed, strict=True)]
        self._at_proposal = []

    def rollback(self) -> None:
        self._read = [min(read, length - 1) for read, length in zip(self._read, self._lengths, strict=False)]

    def select_rows(self, rows: Sequence[int]) -> None:
        self._read = [self._read[row] for row in rows] if self._read else []

    def _layer(self, num_rows: int) -> TokenSource:
        ranks = []
        for row in range(num_rows):
            trace, position = (find(self._run.sequences, row) for find in (self._replay.trace, self._replay.position))
            assert trace.draft_tokens_ADK is not None
            assert trace.draft_probs_ADK is not None
            if position < len(trace.answer) and self._steps < trace.draft_tokens_ADK.shape[1]:
                tokens_K = trace.draft_tokens_ADK[position, self._steps].tolist()
                ranks.append((tokens_K, trace.draft_probs_ADK[position, self._steps].tolist()))
            else:
                ranks.append(([_NOBODYS], [0.0]))
        return _ReplayedSource(ranks)

    def _forward(self, width: int) -> None:
        self._model.run(width)
        self._num_forwards += 1

    def _score_root(self) -> Tensor:
        raise NotImplementedError("nothing is scored: the layers are replayed")

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        raise NotImplementedError("nothing is scored: the layers are replayed")


class ReplayedCopy:
    """A `TreeModel` of a copy of the target. It works on one row.

    Attributes:
        cache: with what `NestedSession` asks of one.
    """

    is_packed = False
    num_read_along = 0

    def __init__(self, model: Timed, trace: Trace, vocab_size: int):
        self.model = model
        self.num_forwards = 0
        self.cache = self
        self._trace, self._vocab_size = trace, vocab_size
        self._text: list[int] = []
        self._tail: list[list[int]] = []

    @property
    def lengths(self) -> list[int]:
        return [len(self._text)]

    def point(self) -> int:
        return len(self._text)

    def return_to(self, point: int) -> None:
        del self._text[point:]

    def share_cache_with(self, target: ReplayedTarget) -> None:
        self._text = target.sequences.tokens[0][:-1]

    def verify(self, trees: TreeBatch, roots_B1: Tensor) -> Tensor:
        self.model.run(trees.width + 1)
        self.num_forwards += 1
        tree, root = trees.row(0), roots_B1.item()
        paths = ([], *(tree.path(node) for node in range(len(tree))))
        self._tail = [[root, *(tree.tokens[node] for node in path)] for path in paths]
        return torch.stack([self._logits([*self._text, *path]) for path in self._tail])[None]

    def commit(self, slots: Sequence[Sequence[int]]) -> None:
        if slots[0]:
            self._text += self._tail[slots[0][-1]]

    def _logits(self, context: Sequence[int]) -> Tensor:
        trace, own = self._trace, list(context[len(self._trace.prompt) :])
        assert trace.copy_tokens_A is not None
        assert trace.copy_probs_A is not None
        position = min(len(own), len(trace.answer) - 1)
        is_on_trace = own == trace.answer[: len(own)] and len(own) < len(trace.answer)
        token = trace.copy_tokens_A[position] if is_on_trace else _NOBODYS
        prob = min(max(trace.copy_probs_A[position], 0.1), 0.9999)
        logits_V = torch.full((self._vocab_size,), log((1 - prob) / (self._vocab_size - 1)))
        logits_V[int(token)] = log(prob)
        return logits_V


class ReplayedCascade(Cascade):
    """The target's int8 copy, for which another drafter drafts."""

    def __init__(self, cheap: Drafter, model: Timed, replay: _Replay):
        super().__init__(cheap, QuantizedSelf(), num_tokens=16, min_tokens=1)
        self._timed, self._replay = model, replay

    def start(self, run: Run) -> DraftSession:
        (trace,) = self._replay.traces
        copy = cast(TreeModel, ReplayedCopy(self._timed, trace, run.vocab_size))
        return NestedSession(run, copy, self.cheap, most=self.num_tokens, least=self.min_tokens)


@dataclass(eq=False)
class ReplayedTarget:
    """As much of a `TreeModel` as drafters ask for."""

    model: Timed
    sequences: Sequences
    is_packed: bool = False
    num_read_along = 0

    def forget_tail(self) -> None:
        """There is none."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Milliseconds of forwards by their number of tokens, and what drafts.

    Args:
        traces: name of their file.
        target: that verifies.
        draft: a small model; None: there is none.
        copy: of the target, which drafts with the help of the others; None: there is none.
        rows: of a batch.
        is_packed: whether a round's forward has as many tokens as its rows have, as in the engine on native layers;
            else as many as the longest, in each.
        wrong_until: share of every answer up to which the draft model is wrong, and sure of it.
        bad_passes: over all prompts, before the one that counts, in which the draft model is always wrong.
    """

    traces: str
    target: Mapping[int, float]
    draft: Mapping[int, float] | None = None
    copy: Mapping[int, float] | None = None
    rows: int = 1
    is_packed: bool = False
    wrong_until: float = 0.0
    bad_passes: int = 0


@dataclass(kw_only=True, eq=False)
class Player:
    """Decodes traces, one batch after the other; what `Auto` learns of one it knows in the next."""

    machine: Machine
    clock: Clock
    sources: dict[str | None, int] = field(default_factory=dict)
    """Rounds by who drafted."""
    wrong_until: float = 0.0

    def __post_init__(self) -> None:
        machine = self.machine
        self._target = Timed(machine.target, self.clock)
        self._replay = _Replay([])
        drafters: list[Drafter] = []
        if machine.draft is not None:
            drafters.append(ReplayedDraft(Timed(machine.draft, self.clock), self._replay))
        self._auto = self._clocked(Auto(*drafters))
        if machine.copy is not None:
            self._auto = self._clocked(Auto(ReplayedCascade(self._auto, Timed(machine.copy, self.clock), self._replay)))

    def _clocked(self, auto: Auto) -> Auto:
        auto.clock = self.clock
        return auto

    def speedup(self, traces: Sequence[Trace], max_new_tokens: int) -> float:
        """Over plain decoding of the same batch, both at the speed that forwards have on average."""
        traces, vocab_size = renumbered(traces)
        traces = [_lying(trace, self.wrong_until) for trace in traces]
        self._replay.traces = traces
        started = self.clock.expected
        self._decode(traces, vocab_size, max_new_tokens)
        return self._plain_seconds(traces) / (self.clock.expected - started)

    def _plain_seconds(self, traces: Sequence[Trace]) -> float:
        lengths = [len(trace.answer) for trace in traces]
        left = (sum(length > position for length in lengths) for position in range(1, max(lengths)))
        return sum(map(self._target.seconds, left)) * self.clock.noise.mean

    def _decode(self, traces: Sequence[Trace], vocab_size: int, max_new_tokens: int) -> None:
        run = _run(traces, self._target, vocab_size, is_packed=self.machine.is_packed)
        session, sequences = self._auto.start(run), run.sequences
        self._commit(session, sequences, [[]] * len(traces), [trace.answer[:1] for trace in traces])
        while len(sequences):
            answers = [traces[row].answer[done:] for row, done in zip(sequences.rows, sequences.num_new, strict=True)]
            draft = session.propose([max_new_tokens - done - 1 for done in sequences.num_new])
            source = session.explain()["drafter"]
            self.sources[source] = self.sources.get(source, 0) + 1
            padded = len(answers) * (draft.trees.width + 1)
            self._target.run(len(answers) + sum(draft.trees.sizes) if self.machine.is_packed else padded)
            paths = [_accepted(draft.trees, row, answer) for row, answer in enumerate(answers)]
            committed = [answer[: len(path) + 1] for path, answer in zip(paths, answers, strict=True)]
            self._commit(session, sequences, paths, committed)
            stay = [row for row, answer in enumerate(answers) if len(answer) > len(committed[row])]
            if len(stay) < len(answers):
                sequences.select_rows(stay)
                session.select_rows(stay)
        session.close()

    def _commit(
        self,
        session: DraftSession,
        sequences: Sequences,
        paths: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        for row, own in enumerate(tokens):
            sequences.put(row, own)
            sequences.commit(row, own)
        session.observe(Outcome(paths=paths, tokens=tokens))


def _accepted(trees: TreeBatch, row: int, answer: Sequence[int]) -> list[int]:
    """The nodes that the target agrees with."""
    tree, path, slot = trees.row(row), [], 0
    for token in answer:
        node = next((node for node in tree.children[slot] if tree.tokens[node] == token), None)
        if node is None:
            break
        path.append(node)
        slot = node + 1
    return path


def _run(traces: Sequence[Trace], model: Timed, vocab_size: int, *, is_packed: bool) -> Run:
    longest = max(len(trace.prompt) for trace in traces)
    pads = [longest - len(trace.prompt) for trace in traces]
    input_ids = torch.tensor([[0] * pad + trace.prompt for pad, trace in zip(pads, traces, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    sequences = Sequences(input_ids, mask, longest + 256)
    return Run(
        target=cast(TreeModel, ReplayedTarget(model, sequences, is_packed)),
        vocab_size=vocab_size,
        sequences=sequences,
        sampler=Sampler(LogitsProcessorList(), do_sample=False),
        tree=None,
        input_ids=input_ids,
        attention_mask=mask,
    )


def _lying(trace: Trace, until: float) -> Trace:
    """The same with a draft that is wrong, and sure of it, in the first part of the answer."""
    if not until or trace.draft_tokens_ADK is None or trace.draft_probs_ADK is None:
        return trace
    end = round(until * len(trace.answer))
    tokens_ADK, probs_ADK = trace.draft_tokens_ADK.copy(), trace.draft_probs_ADK.copy()
    tokens_ADK[:end], probs_ADK[:end] = _NOBODYS, [0.99, *[0.003] * (probs_ADK.shape[2] - 1)]
    return replace(trace, draft_tokens_ADK=tokens_ADK, draft_probs_ADK=probs_ADK)


def renumbered(traces: Sequence[Trace]) -> tuple[list[Trace], int]:
    """The same traces with small token ids, and the size of that vocabulary."""
    numbers: dict[int, int] = {}

    def number(tokens: Sequence[int]) -> list[int]:
        return [numbers.setdefault(token, len(numbers) + 1) for token in tokens]

    small = []
    for trace in traces:
        columns: dict[str, object] = {"prompt": number(trace.prompt), "answer": number(trace.answer)}
        for name in ("draft_tokens_ADK", "copy_tokens_A"):
            tokens = getattr(trace, name)
            if tokens is not None:
                columns[name] = torch.tensor(number(tokens.flatten().tolist())).view(tokens.shape).numpy()
        small.append(replace(trace, **columns))
    return small, len(numbers) + 1
