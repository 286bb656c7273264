"""Acceptance as a function of tensors alone, which a GPU replays: processors, rule, and the table that the host reads.

What a round differs in from the last one of its kind is numbers: scores, tokens, parents and sizes, and the
distributions that were drawn from. So one graph serves all rounds of a shape. Processors that look at prefixes are
called outside of it, on the way from one graph to the next. Drawn drafts that were merged, and traversal, have none.

Shape legend: B rows, N nodes, T = N + 1 slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec.acceptance import Acceptance, walk
from specdec.acceptance.coins import choose
from specdec.acceptance.families import links_of
from specdec.acceptance.outcome import TabledAcceptance, table_of
from specdec.acceptance.rules import drawn_from, greatest, topdown_chain, topdown_steps
from specdec.cuda.functions import GraphedFunctions
from trees import ROOT, Draft, TreeBatch
from trees.randomness import Randomness

_STEPS = 4


def rounded_up(number: int) -> int:
    """Of the steps down a tree. Trees differ from round to round, and a graph has so many: more of them do nothing."""
    return -(-number // _STEPS) * _STEPS


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the rows of a round are accepted. Rounds of equal rules and of scores of one dtype and size are one function.

    Args:
        processors: that look at nothing but the scores; None where scores have been processed.
        settings: what these do, as `Sampler.shared_settings`.
        is_drawn: whether trees were drawn, from distributions that are given.
        num_rows: B.
        width: N.
        depth: of the deepest node, or more.
        is_chain: whether all trees are.
        is_ragged: whether some are smaller than others.
        num_steps: tests that a row of drawn trees can come to (`families.most_tests`), or more; 0 for chains.
    """

    processors: LogitsProcessorList | None
    settings: Hashable
    do_sample: bool
    is_drawn: bool
    num_rows: int
    width: int
    depth: int
    is_chain: bool
    is_ragged: bool
    num_steps: int

    @property
    def takes_logits(self) -> bool:
        """Whether it calls the processors."""
        return self.processors is not None

    def replay(
        self, graphs: GraphedFunctions, draft: Draft, scores_BTV: Tensor, generator: torch.Generator | None
    ) -> Acceptance:
        """What is kept of a draft; it holds until the next replay.

        Args:
            scores_BTV: float logits, or processed scores.
        """
        key = (
            *(self.settings, self.do_sample, self.is_drawn, self.num_rows, self.width, self.depth),
            *(self.is_chain, self.is_ragged, self.num_steps, scores_BTV.dtype, scores_BTV.shape[-1]),
        )
        given = [scores_BTV, *self._structure(draft)]
        return TabledAcceptance(graphs.call(key, self._table, given, generator))

    def _structure(self, draft: Draft) -> Iterator[Tensor]:
        trees = draft.trees
        if self.width:
            yield trees.tokens_BN
        if not self.is_chain:
            yield trees.parents_BN
        if self.is_ragged:
            yield trees.sizes_B
        if self.is_drawn and self.width:
            yield drawn_from(draft, self.width + (not self.is_chain))
        if self.num_steps:
            (links,) = links_of(draft)
            yield links.first_child_BT
            yield links.next_sibling_BT

    def _table(self, given: Sequence[Tensor], source: Randomness) -> Tensor:
        scores_BTV, *rest = given
        scores_BTV = scores_BTV.to(torch.float32, copy=bool(self.processors))
        if self.processors:
            no_prefix = torch.empty(0, dtype=torch.long)
            scores_BTV = self.processors(no_prefix, scores_BTV.flatten(0, 1)).view_as(scores_BTV)
        trees, rest = self._trees(rest, scores_BTV.device)
        if not self.do_sample:
            acceptance = walk(trees, greatest(scores_BTV))
        elif not self.is_drawn:
            acceptance = walk(trees, choose(scores_BTV, source))
        elif self.is_chain:
            q_BNV = rest[0] if self.width else scores_BTV[:, :0]
            acceptance = topdown_chain(trees, scores_BTV, q_BNV, source).if_finite(scores_BTV)
        else:
            q_BTV, first_child_BT, next_sibling_BT = rest
            links = first_child_BT, next_sibling_BT
            acceptance = topdown_steps(trees, scores_BTV, q_BTV, links, self.num_steps, source).if_finite(scores_BTV)
        missing = self.depth - acceptance.path_BD.shape[1]  # where the host could see that no row goes on
        return table_of(trees, replace(acceptance, path_BD=torch.nn.functional.pad(acceptance.path_BD, (0, missing))))

    def _trees(self, given: Sequence[Tensor], device: torch.device) -> tuple[TreeBatch, list[Tensor]]:
        """Trees whose sizes the host does not know, and what is left of the inputs."""
        rest = list(given)
        nothing_BN = torch.empty((self.num_rows, 0), dtype=torch.long, device=device)
        tokens_BN = rest.pop(0) if self.width else nothing_BN
        chain_N = torch.arange(ROOT, self.width - 1, device=device)
        parents_BN = chain_N.expand_as(tokens_BN) if self.is_chain else rest.pop(0)
        full_B = torch.full((self.num_rows,), self.width, device=device)
        sizes_B = rest.pop(0) if self.is_ragged else full_B
        trees = TreeBatch(
            tokens_BN=tokens_BN,
            parents_BN=parents_BN,
            sizes=(self.width,) * self.num_rows,
            depth=self.depth,
            is_chain=self.is_chain,
        )
        real_BN = torch.arange(self.width, device=device) < sizes_B.unsqueeze(1)
        vars(trees).update(sizes_B=sizes_B, real_BN=real_BN)
        return trees, rest
