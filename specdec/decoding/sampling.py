"""From logits to the distribution that a token is drawn from, with the user's processors on each node's own prefix.

Shape legend: B rows, T slots (or any number of them), V vocabulary, L prefix length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from specdec.acceptance import Acceptance, HostAcceptance, follow, topdown, traversal, walk
from specdec.acceptance.coins import choose
from specdec.acceptance.families import most_tests
from specdec.decoding.replayed import Rule, rounded_up
from specdec.decoding.sequences import Sequences
from trees import Draft, GrowingTrees, TreeBatch

_BLIND = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.TopHLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
)
"""Processors that look at the scores only, and at which token one belongs to not even then."""

_POINTWISE = (*_BLIND, lp.SuppressTokensLogitsProcessor)
"""Processors that look at the scores only."""

_UNORDERED = (*_POINTWISE, lp.RepetitionPenaltyLogitsProcessor)
"""Processors that see of a prefix no more than which tokens it has: more of one of these change nothing."""

_ROW_WISE = (
    *_POINTWISE,
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
    lp.WatermarkLogitsProcessor,
)
"""Processors that look at the prefix too but treat every row alike, whatever its index."""


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The prefixes of some slots of a batch of trees, made when asked for.

    Args:
        sequences: the committed tokens.
        trees: trees on top of them, grown or still growing.
        slots: the slots meant, 0 for the root.
    """

    sequences: Sequences
    trees: TreeBatch | GrowingTrees
    slots: range

    def of_row(self, row: int) -> list[Tensor]:
        """int64 prefixes of a row's own slots, which come before those past its tree."""
        committed, tokens_N = self.sequences.prefix(row), self.trees.tokens_BN[row]
        own = [slot for slot in self.slots if slot <= self.trees.sizes[row]]
        if self.trees.is_chain:
            whole = torch.cat([committed, tokens_N])
            return [whole[: len(committed) + slot] for slot in own]
        ancestors_TT = self.trees.ancestors_BTT[row]
        return [torch.cat([committed, tokens_N[ancestors_TT[slot, 1:]]]) for slot in own]

    def in_one(self, skipped: Sequence[int] | None) -> Tensor:
        """int64 [B * T, L]: every slot's prefix in any order, some of its tokens several times.

        Args:
            skipped: first tokens of every row of the caller's batch that are left out.
        """
        committed_B1L, slots = self.sequences.in_one(skipped).unsqueeze(1), slice(self.slots.start, self.slots.stop)
        if not slots.stop - 1:
            return committed_B1L.squeeze(1)
        roots_B1 = self.sequences.roots_B1
        tokens_B1T = torch.cat([roots_B1, self.trees.tokens_BN], 1).unsqueeze(1)
        drafted_BTN = torch.where(self.trees.ancestors_BTT[:, slots], tokens_B1T, roots_B1.unsqueeze(1))
        committed_BTL = committed_B1L.expand(-1, drafted_BTN.shape[1], -1)
        return torch.cat([committed_BTL, drafted_BTN], 2).flatten(0, 1)

    def by_length(self) -> dict[int, list[list[tuple[int, Tensor]]]]:
        """length -> for each row its (index in `slots`, int64 prefix [length]) of that length."""
        groups: dict[int, list[list[tuple[int, Tensor]]]] = defaultdict(lambda: [[] for _ in self.trees.sizes])
        for row in range(len(self.trees.sizes)):
            for index, prefix in enumerate(self.of_row(row)):
                groups[len(prefix)][row].append((index, prefix))
        return dict(sorted(groups.items()))


class Sampler:
    """The user's processors, and how a token is chosen from what they leave.

    Args:
        processors: applied in order, as `model.generate()` has prepared them.
        do_sample: draw tokens; False takes the likeliest.
        verify: "topdown" or "traversal".
        generator: None for torch's global source of randomness.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        do_sample: bool,
        verify: str = "topdown",
        generator: torch.Generator | None = None,
    ):
        self.processors = processors
        self.do_sample = do_sample
        self.generator = generator
        self._verify = {"topdown": topdown, "traversal": traversal}[verify]
        self._warpers = [processor for processor in processors if type(processor) in _POINTWISE]
        self._pointwise = all(type(processor) in _POINTWISE for processor in processors)
        self._unordered = all(_is_one_of(_UNORDERED, processor) for processor in processors)
        self._row_wise = all(_is_one_of(_ROW_WISE, processor) for processor in processors)
        self._over_sets = _over_sets(processors)

    @cached_property
    def shared_settings(self) -> Hashable:
        """Of processors that treat every row alike, whatever its index: what they do. None: they may not.

        Those of another sampler with the same settings do for its rows what these would.
        """
        return _as_hashable([vars(each) | {"": type(each)} for each in self.processors]) if self._row_wise else None

    @property
    def reads_no_tokens(self) -> bool:
        """Whether `process` treats all tokens alike: then scores may be those of some of them, in any order."""
        return all(type(processor) in _BLIND for processor in self.processors)

    def process(self, logits_BTV: Tensor, prefixes: Prefixes) -> Tensor:
        """Scores after the processors: float32 [B, T, V]; the logits are left as they are.

        Scores of slots past a row's tree are not meaningful.
        """
        scores_BTV = logits_BTV.to(torch.float32, copy=bool(self.processors))
        if not self.processors:
            return scores_BTV
        if self._pointwise:
            flat = self.processors(torch.empty(0, dtype=torch.long), scores_BTV.flatten(0, 1))
            return flat.view_as(scores_BTV)
        sets = self._over_sets
        if sets is not None and sets.fits(prefixes.sequences):
            return sets.processors(prefixes.in_one(sets.skipped), scores_BTV.flatten(0, 1)).view_as(scores_BTV)
        if self._row_wise:
            self.process_rows(list(scores_BTV), [prefixes.of_row(row) for row in range(len(scores_BTV))])
            return scores_BTV
        for per_row in prefixes.by_length().values():
            self._process_in_place(scores_BTV, per_row, prefixes.sequences)
        return scores_BTV

    def process_rows(self, rows_TV: Sequence[Tensor], prefixes: Sequence[Sequence[Tensor]]) -> None:
        """Process the first slots of rows in place, as few calls as the processors allow (see `shared_settings`).

        Args:
            rows_TV: float32 scores of each row's slots.
            prefixes: of the first slots of each row.
        """
        own_TV = [scores_TV[: len(own)] for scores_TV, own in zip(rows_TV, prefixes, strict=True)]
        scores_KV, each = torch.cat(own_TV), [prefix for own in prefixes for prefix in own]
        if self._pointwise:
            scores_KV = self.processors(torch.empty(0, dtype=torch.long), scores_KV)
        elif self._unordered:
            scores_KV = self.processors(_filled(each), scores_KV)
        else:
            for places in _by_length(each).values():
                scores_KV[places] = self.processors(torch.stack([each[place] for place in places]), scores_KV[places])
        for scores_TV, processed_TV in zip(own_TV, scores_KV.split([len(own) for own in prefixes]), strict=True):
            scores_TV.copy_(processed_TV)

    def warp(self, logits_BTV: Tensor) -> Tensor:
        """Scores, float32, after those processors only that look at nothing else: enough for statistics."""
        scores_BTV = logits_BTV.to(torch.float32, copy=bool(self._warpers))
        no_prefix = torch.empty(0, dtype=torch.long)
        for warper in self._warpers:
            scores_BTV = warper(no_prefix, scores_BTV.flatten(0, 1)).view_as(logits_BTV)
        return scores_BTV

    def forced(self, row: int, sequences: Sequences) -> list[int]:
        """Tokens that a row's processors leave no choice about, as far as they tell: to be drafted, then verified.

        A processor tells by `forced_tokens(prefix)`, of token ids with padding; it sees no other row.
        """
        for processor in self.processors if self.forces_tokens else ():
            if hasattr(processor, "forced_tokens"):
                return processor.forced_tokens(sequences.prefix(row).tolist())
        return []

    @cached_property
    def forces_tokens(self) -> bool:
        """Whether a processor tells what it leaves no choice about."""
        return any(hasattr(processor, "forced_tokens") for processor in self.processors)

    def accept(self, scores_BTV: Tensor, draft: Draft) -> Acceptance:
        """Verify a draft against the processed scores of its slots.

        Where the target's scores are no numbers on the way, `next_B` is -1, which `to_host` refuses.
        """
        if not self.do_sample:
            return follow(draft.trees, scores_BTV)
        if not draft.is_drawn:
            return walk(draft.trees, choose(scores_BTV, self.generator))
        accepted = self._verify(draft, scores_BTV, self.generator)
        return accepted if isinstance(accepted, HostAcceptance) else accepted.if_finite(scores_BTV)

    def rule(self, draft: Draft, *, keeps_scores: bool) -> Rule | None:
        """How a draft is accepted, as a function of tensors alone; None where it is none.

        Args:
            keeps_scores: whether the processed scores are wanted too: then it is given them.
        """
        trees, takes_logits = draft.trees, self._pointwise and not keeps_scores
        is_drawn = self.do_sample and draft.is_drawn
        if is_drawn and (draft.parts is not None or self._verify is not topdown):
            return None
        return Rule(
            processors=self.processors if takes_logits else None,
            settings=self.shared_settings if takes_logits else None,
            do_sample=self.do_sample,
            is_drawn=is_drawn,
            num_rows=trees.num_rows,
            width=trees.width,
            depth=trees.depth if trees.is_chain else min(trees.width, rounded_up(trees.depth)),
            is_chain=trees.is_chain,
            is_ragged=min(trees.sizes) < trees.width,
            num_steps=rounded_up(most_tests(draft)) if is_drawn and not trees.is_chain else 0,
        )

    def _process_in_place(
        self, scores_BTV: Tensor, per_row: Sequence[Sequence[tuple[int, Tensor]]], sequences: Sequences
    ) -> None:
        """Calls that look like plain decoding's: every row of the batch, at its own index, of one length.

        Rows without a prefix of that length (left) are filled with another row's.
        """
        for call in range(max(len(group) for group in per_row)):
            present = [
                (row, sequences.rows[row], *group[call]) for row, group in enumerate(per_row) if call < len(group)
            ]
            first_row, _, first_slot, first_prefix = present[0]
            input_ids = first_prefix.repeat(sequences.num_all_rows, 1)
            scores = scores_BTV[first_row, first_slot].repeat(sequences.num_all_rows, 1)
            for row, index, slot, prefix in present:
                input_ids[index] = prefix
                scores[index] = scores_BTV[row, slot]
            processed = self.processors(input_ids, scores)
            for row, index, slot, _ in present:
                scores_BTV[row, slot] = processed[index]


def _is_one_of(kinds: Sequence[type], processor: lp.LogitsProcessor) -> bool:
    """Whether it is of these kinds, and looks at no part of a prefix alone where it could look at all."""
    if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        return ignored is None if kinds is _UNORDERED else not isinstance(ignored, Tensor)
    return type(processor) in kinds


class _OverSets:
    """Processors that see of a prefix which tokens it has, and no more.

    Args:
        processors: what they do with prefixes that lack the tokens which are left out.
        left_out: how many first tokens of every row those are; None for none.
    """

    def __init__(self, processors: LogitsProcessorList, left_out: Tensor | None):
        self.processors = processors
        self._left_out = left_out

    @cached_property
    def skipped(self) -> list[int] | None:
        return None if self._left_out is None else self._left_out.tolist()

    def fits(self, sequences: Sequences) -> bool:
        """Whether they are of these rows, and leave out no row's last token: that one fills the others' places."""
        if self._left_out is None or self.skipped is None:
            return True
        if len(self.skipped) != sequences.num_all_rows:
            return False
        return all(self.skipped[row] < length for row, length in zip(sequences.rows, sequences.lengths, strict=True))


def _over_sets(processors: Sequence[lp.LogitsProcessor]) -> _OverSets | None:
    """None where a processor sees more. `model.generate()` tells one to leave out each row's padding."""
    penalties = [each for each in processors if type(each) is lp.RepetitionPenaltyLogitsProcessor]
    others_do = all(type(each) in _POINTWISE for each in processors if each not in penalties)
    left_out = penalties[0].prompt_ignore_length if len(penalties) == 1 else None
    if isinstance(left_out, Tensor) and others_do:
        without = lp.RepetitionPenaltyLogitsProcessor(penalties[0].penalty)
        return _OverSets(LogitsProcessorList([without if each in penalties else each for each in processors]), left_out)
    is_unordered = all(_is_one_of(_UNORDERED, each) for each in processors)
    return _OverSets(LogitsProcessorList(processors), None) if is_unordered else None


def _by_length(prefixes: Sequence[Tensor]) -> dict[int, list[int]]:
    """The places of prefixes, by their length."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, prefix in enumerate(prefixes):
        places[len(prefix)].append(place)
    return places


def _filled(prefixes: Sequence[Tensor]) -> Tensor:
    """int64 [K, L] for processors to whom the order is nothing: shorter ones have their first token several times."""
    longest = max(map(len, prefixes))
    return torch.stack([torch.cat([prefix[:1].expand(longest - len(prefix)), prefix]) for prefix in prefixes])


def _as_hashable(value: object) -> Hashable:
    """Equal for settings that are, tensors and lists among them."""
    if isinstance(value, Tensor):
        return str(value.dtype), _as_hashable(value.tolist())
    if isinstance(value, dict):
        return tuple((name, _as_hashable(part)) for name, part in sorted(value.items(), key=repr))
    if isinstance(value, list | tuple | set):
        return tuple(map(_as_hashable, value))
    return value if isinstance(value, Hashable) else id(value)
