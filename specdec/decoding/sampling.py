"""From logits to the distribution that a token is drawn from, with the user's processors on each node's own prefix.

Shape legend: B rows, T slots (or any number of them), V vocabulary, L prefix length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from specdec.acceptance import Acceptance, HostAcceptance, draw, follow, topdown, traversal, walk
from specdec.decoding.sequences import Sequences
from specdec.errors import NumericalError
from trees import Draft, GrowingTrees, TreeBatch

_POINTWISE = (
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
    lp.SuppressTokensLogitsProcessor,
)
"""Processors that look at the scores only."""

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

    def by_length(self) -> dict[int, list[list[tuple[int, Tensor]]]]:
        """length -> for each row its (index in `slots`, int64 prefix [length]) of that length."""
        groups: dict[int, list[list[tuple[int, Tensor]]]] = defaultdict(lambda: [[] for _ in self.trees.sizes])
        ancestors_BTT, tokens_BN = self.trees.ancestors_BTT, self.trees.tokens_BN
        for row, size in enumerate(self.trees.sizes):
            committed = self.sequences.prefix(row)
            for index, slot in enumerate(self.slots):
                if slot <= size:
                    on_path = ancestors_BTT[row, slot, 1:]
                    prefix = torch.cat([committed, tokens_BN[row][on_path]])
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
        self._row_wise = all(_is_row_wise(processor) for processor in processors)

    def process(self, logits_BTV: Tensor, prefixes: Prefixes) -> Tensor:
        """Scores after the processors: float32 [B, T, V]; the logits are left as they are.

        Slots past a row's tree are not processed when processors look at prefixes.
        """
        scores_BTV = logits_BTV.to(torch.float32, copy=bool(self.processors))
        if not self.processors:
            return scores_BTV
        if self._pointwise:
            flat = self.processors(torch.empty(0, dtype=torch.long), scores_BTV.flatten(0, 1))
            return flat.view_as(scores_BTV)
        for per_row in prefixes.by_length().values():
            if self._row_wise:
                self._process_together(scores_BTV, per_row)
            else:
                self._process_in_place(scores_BTV, per_row, prefixes.sequences)
        return scores_BTV

    def warp(self, logits_BTV: Tensor) -> Tensor:
        """Scores, float32, after those processors only that look at nothing else: enough for statistics."""
        scores_BTV = logits_BTV.to(torch.float32, copy=bool(self._warpers))
        no_prefix = torch.empty(0, dtype=torch.long)
        for warper in self._warpers:
            scores_BTV = warper(no_prefix, scores_BTV.flatten(0, 1)).view_as(logits_BTV)
        return scores_BTV

    def accept(self, scores_BTV: Tensor, draft: Draft) -> Acceptance:
        """Verify a draft against the processed scores of its slots."""
        if not self.do_sample:
            accepted = follow(draft.trees, scores_BTV)
            _refuse_unless(accepted.has_next)
            return accepted
        if not draft.is_drawn:
            _refuse_unless(bool(scores_BTV.amax(-1).isfinite().all()))
            return walk(draft.trees, draw(scores_BTV.softmax(-1), self.generator))
        accepted = self._verify(draft, scores_BTV, self.generator)
        if isinstance(accepted, HostAcceptance):
            _refuse_unless(accepted.has_next)
            return accepted
        # where p is no distribution no child is accepted, so that only the last slot can be such a one
        last_BV = scores_BTV[torch.arange(len(scores_BTV), device=scores_BTV.device), accepted.last_B]
        _refuse_unless(bool(last_BV.amax(-1).isfinite().all()))
        return accepted

    def _process_together(self, scores_BTV: Tensor, per_row: Sequence[Sequence[tuple[int, Tensor]]]) -> None:
        """One call for all slots of one prefix length."""
        rows, slots, prefixes = zip(
            *((row, slot, prefix) for row, group in enumerate(per_row) for slot, prefix in group), strict=True
        )
        scores_BTV[list(rows), list(slots)] = self.processors(
            torch.stack(prefixes), scores_BTV[list(rows), list(slots)]
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


def _refuse_unless(usable: bool) -> None:
    """Raise if scores make no distribution, as their greatest one tells: it is NaN if any is, or infinite."""
    if not usable:
        raise NumericalError(
            "the target's scores are not numbers (NaN, or infinite everywhere): check the weights and the dtype "
            "(float16 overflows on CPU), or pass remove_invalid_values=True"
        )


def _is_row_wise(processor: lp.LogitsProcessor) -> bool:
    if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
        return not isinstance(processor.prompt_ignore_length, Tensor)
    return type(processor) in _ROW_WISE
