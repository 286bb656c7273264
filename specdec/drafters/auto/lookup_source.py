"""The source of `Auto` that takes no time: what prompt lookup proposes for every row, cut to what it is worth."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from math import exp, inf, log
from operator import itemgetter

from specdec.control import AcceptanceModel, Plan, capped_throughput
from specdec.decoding.drafter import Outcome, Run
from specdec.decoding.sequences import num_shared
from specdec.drafters.auto.sources import RoundContext, Source
from specdec.drafters.lookup.prompt_lookup import ChainSession, PromptLookup, Proposal
from trees import Chain, Draft, TokenTree, TreeBatch

LONGEST_LOOKUP = 24
_HOPELESS = 0.01
_HOPELESS_SHARE = 0.25
"""Gain below which the rest of a proposal is not looked at: so much, or this share of the least that a token costs."""
_UNPROVEN, _PROOF = 0.15, 0.5
"""What a row's proposal may cost, in rounds of plain decoding: before anything was right in this run, and more for each
token that was. What other runs have shown says little about whether this one copies at all, and plain rounds, in which
proposals are tested for nothing, soon tell; so no run loses much to a belief that it gives no reason for."""
_LONGEST_REST = 4
"""Rounds that a row is not looked at, at most."""


@dataclass(eq=False)
class _Row:
    """What is known of a row, and when it is looked at next.

    Args:
        acceptance: its own: one repeats its prompt, its neighbour nothing. Together they would be taken for middling.
        rest: rounds until then.
        num_vain: looks since one that found something worth drafting.
    """

    acceptance: AcceptanceModel
    rest: int = 0
    num_vain: int = 0

    def rests(self) -> bool:
        """Whether it is not looked at in this round."""
        is_resting = self.rest > 0
        self.rest -= is_resting
        return is_resting

    def looked(self, length: int, num_rows: int) -> None:
        """So much was worth drafting. All rows wait while one is looked at, and what it might have drafted would have
        been one row's: the more there are, the longer it rests; of two, never."""
        self.num_vain = 0 if length else self.num_vain + 1
        self.rest = max(min(self.num_vain, num_rows - 2, _LONGEST_REST), 0)


class LookupSource(Source):
    """Proposals that take no forward are made every round: looked at, cut to what they are worth, and learned from also
    when another source drafts."""

    def __init__(self, run: Run, drafter: PromptLookup):
        self._lookup = ChainSession(drafter, run, Chain(drafter.num_tokens))
        super().__init__(run, drafter, self._lookup)
        self._rows = [self._new_row() for _ in run.sequences.rows]
        self._proposals: list[Proposal] = []
        self._lengths: list[int] = []
        self._promised = 0.0
        """Tokens of the drafts that were planned last, and how many of them seemed to be accepted."""

    def plan(self, context: RoundContext) -> Plan[Source] | None:
        """The lengths at which proposals are worth most; None if all are 0.

        Rows count by the geometric mean of their tokens, so that a draft has to make up for what it costs its
        neighbours (proportional fairness; Kelly 1997). By the sum of tokens one row that repeats its prompt would slow
        down all others, and a batch ends with the last of them.
        """
        rows = zip(self._rows, context.max_depths, strict=True)
        depths = [0 if row.rests() else self._proven_length(row, most, context) for row, most in rows]
        self._proposals, self._lengths = self._lookup.proposals(depths), [0] * context.num_rows
        plan = self._best(context) if any(proposal.tokens for proposal in self._proposals) else None
        for row, depth, length in zip(self._rows, depths, self._lengths, strict=True):
            if depth:
                row.looked(length, context.num_rows)
        return plan

    def _best(self, context: RoundContext) -> Plan[Source] | None:
        """Of the proposals; sets their lengths. None if none is worth more than plain decoding: then rows rest."""
        num_rows, costs, throughput = context.num_rows, context.costs, context.throughput
        least = max(_HOPELESS, _HOPELESS_SHARE * throughput * context.least_seconds)
        least_of_row = least if context.is_packed else least / num_rows
        pairs = zip(self._rows, self._proposals, strict=True)
        reaches = [row.acceptance.reaches(proposal.probs, least_of_row) for row, proposal in pairs]
        share = self._known.bias_at(num_rows).share
        plain, dearer = context.plain, costs.seconds(num_rows + 1) - context.plain.seconds
        if share * sum(map(sum, reaches)) * plain.seconds <= plain.tokens * dearer:
            return None  # all of it is worth less than one more token costs
        num_tokens, most, gained = num_rows, -inf, 0.0
        best_tokens = best_seconds = 0.0
        longer: list[Sequence[int]] = []
        num_best = 0
        for gain, rows in _extensions([_gains(reach, share) for reach in reaches], context.is_packed):
            if gain < least:
                break
            gained += gain
            num_tokens += len(rows)
            longer.append(rows)
            tokens, seconds = num_rows * exp(gained / num_rows), costs.seconds(num_tokens)
            worth = tokens - throughput * seconds
            if worth > most:
                most, best_tokens, best_seconds, num_best = worth, tokens, seconds, len(longer)
        if not num_best:
            return None
        counts = Counter(chain.from_iterable(longer[:num_best]))
        plan: Plan[Source] = Plan(source=self, length=max(counts.values()), tokens=best_tokens, seconds=best_seconds)
        throughput = capped_throughput(throughput, [plain, plan])
        if plan.worth(throughput) <= plain.worth(throughput):
            return None
        self._lengths = [counts[row] for row in range(num_rows)]
        self._promised = sum(sum(reach[:length]) for reach, length in zip(reaches, self._lengths, strict=True))
        return plan

    def _proven_length(self, row: _Row, most: int, context: RoundContext) -> int:
        """How long a row's proposal may be."""
        length = min(most, LONGEST_LOOKUP)
        allowed = context.plain.seconds * (1 + _UNPROVEN + _PROOF * row.acceptance.num_accepted)
        if self._seconds_alone(length, context) > allowed:
            lengths = range(1, length + 1)
            length = max(bisect_right(lengths, allowed, key=lambda n: self._seconds_alone(n, context)), 1)
        return length

    @staticmethod
    def _seconds_alone(length: int, context: RoundContext) -> float:
        """Of a round in which one row drafts so many tokens; if padded, it verifies as many in every row."""
        return context.costs.seconds(context.num_rows + length) if context.is_packed else context.seconds(length)

    def draft(self, plan: Plan[Source], context: RoundContext) -> Draft:
        pairs = zip(self._proposals, self._lengths, strict=True)
        chains = [TokenTree.chain(proposal.tokens[:length]) for proposal, length in pairs]
        return Draft(trees=TreeBatch.stack(chains, self._run.device))

    def learn(self, outcome: Outcome, drafted: Plan[Source] | None) -> None:
        """Compare the proposals with what the target said, whoever drafted.

        Args:
            drafted: the plan, if these were what was drafted.
        """
        bias = self._known.bias_at(len(outcome.tokens))
        if drafted is None:
            bias.passed_over()
        if not any(proposal.tokens for proposal in self._proposals):
            return
        agreed = self._agreed(outcome)
        if drafted is not None:
            bias.update(self._promised, sum(map(min, agreed, self._lengths)))
        rows = zip(self._rows, self._proposals, outcome.tokens, agreed, strict=True)
        for row, proposal, tokens, num_accepted in rows:
            row.acceptance.update_chain(proposal.probs[: len(tokens)], num_accepted)

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        self._rows = [self._rows[row] for row in rows]

    def join(self) -> None:
        super().join()
        self._rows.append(self._new_row())

    def _new_row(self) -> _Row:
        return _Row(AcceptanceModel(self._known.acceptance))

    def _agreed(self, outcome: Outcome) -> list[int]:
        """For each row how many of the proposal's first tokens are those that were committed."""
        return [num_shared(own.tokens, tokens) for own, tokens in zip(self._proposals, outcome.tokens, strict=True)]


def _gains(reach: Sequence[float], share: float) -> list[float]:
    """Of each token of a row's proposal: what it adds to the logarithm of the tokens that the row is to commit."""
    gains, shorter = [], 1.0
    for chance in reach:
        longer = shorter + share * chance
        gains.append(log(longer / shorter))
        shorter = longer
    return gains


def _extensions(gains: Sequence[Sequence[float]], is_packed: bool) -> Iterable[tuple[float, Sequence[int]]]:
    """What proposals may be made longer by, the best first: the gain, and the rows that get a token more. If packed it
    is any row, else all."""
    if not is_packed:
        rows = range(len(gains))
        return ((sum(column), rows) for column in zip_longest(*gains, fillvalue=0.0))
    singly = [(gain, (row,)) for row, own in enumerate(gains) for gain in own]
    return sorted(singly, key=itemgetter(0), reverse=True)  # along a chain they fall
