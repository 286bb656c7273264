"""A head on the target's hidden states drafts (EAGLE-3, Li et al. 2025; DFlash, arXiv 2602.06036; DSpark).

The target hands over its states at every committed token; the head reads each token together with the state before it,
once, and keeps keys and values of its own. Of drafted tokens its own output stands for the target's state, so what it
has computed for them is dropped after the round, and those that were accepted are read again with the true states.

Shape legend: B rows, M nodes of a layer, K nodes so far and the root, C channels, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.head.dflash import DFlash
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.fitting import check_fit, fitted
from specdec.drafters.head.graphed import runner_of
from specdec.drafters.head.later_layer import LaterLayer
from specdec.drafters.head.loading import load_head
from specdec.drafters.head.mtp import Mtp
from specdec.drafters.head.network import HeadNetwork
from specdec.drafters.head.peagle import PEagle
from specdec.drafters.head.pending import PendingPairs
from specdec.drafters.model.growing import GrowingSession
from specdec.tree_model.compatibility import check_layers
from trees import Chain, ConfidentChain, Draft, GrowingTrees, GrowthPolicy, TreeBatch

_CHUNK = 1024
"""Tokens of a row that are read in one forward: of a long prompt there are several."""

_SURE = 0.5
"""Probability of a token below which a chain ends. A further step and its verification take a fifth of a plain round
(demo model, int8, AVX2), and of tokens that follow an accepted one two in five are accepted."""

_logger = logging.getLogger("specdec")


class DraftHead(Drafter):
    """Drafts with a small network that reads the target's hidden states: an EAGLE-3, P-EAGLE, DFlash or DSpark head,
    or an MTP layer, of this very target.

    Lossless whatever the head is: one of another model, or one whose layers are misread, is only rarely right.

    Args:
        head: a folder, or the id of one on the hub, with config.json and safetensors, in the layout of the authors of
            EAGLE-3, DFlash or DSpark, of SpecForge or of speculators, or written by `specdec train-head`; the folder of
            a model that was published with an MTP layer; or a head that has been loaded
            (`specdec.drafters.head.loading.load_head`).
        num_tokens: most tokens of the chain that it drafts, unless the call names a tree. On a CPU the chain ends where
            the head is unsure; on a GPU, where asking after each token takes as long as a step, it is as long as that.
        state_layers: after how many of the target's layers the states are taken that the head reads (as the indices of
            `output_hidden_states`); None: as its config.json says. Projects number layers in two ways, and
            a file may be silent about which: if hardly anything is accepted, try one more or one less for each.

    Raises:
        DraftError: the folder holds no head that can be read; at the call, where the head is not one of this target.
        UnsupportedModelError: at the call, for a target whose layers do not run one by one.
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        head: HeadNetwork | str | os.PathLike[str],
        *,
        num_tokens: int = 5,
        state_layers: Sequence[int] | None = None,
    ):
        self.policy: GrowthPolicy = ConfidentChain(num_tokens, _SURE)
        self.queued_policy: GrowthPolicy = Chain(num_tokens)
        """Whose next token is not waited for."""
        if not isinstance(head, HeadNetwork | str | os.PathLike):
            raise ValueError(f"DraftHead({type(head).__name__}): pass a folder, or a head that has been loaded")
        self.model = head if isinstance(head, HeadNetwork) else load_head(head)
        self.state_layers = None if state_layers is None else tuple(state_layers)
        self._warned = False

    def models(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def start(self, run: Run) -> DraftSession:
        if not run.target.keeps_states:  # of those no part is run alone
            check_layers(run.target.model)
        layers = self.state_layers or self.model.head_config.layers_read(run.target.num_layers)
        check_fit(self.model, run.target, layers)
        return _session_of(self.model)(self, run, layers)

    def warn_of_length(self, length: int) -> None:
        """Say once that texts have become longer than those that the head was trained on."""
        limit = self.model.config.max_position_embeddings
        if length > limit and not self._warned:
            self._warned = True
            _logger.warning(
                "the draft head was made for %d positions, and a text has %d tokens: what it drafts past them may "
                "rarely be right. Output is not affected",
                limit,
                length,
            )


class _HeadSession(GrowingSession):
    takes_rows = True

    def __init__(self, drafter: DraftHead, run: Run, layers: Sequence[int]):
        own = drafter.policy if run.device.type == "cpu" else drafter.queued_policy
        super().__init__(run, run.tree or own)
        self._drafter = drafter
        self._pending = PendingPairs(run.target, run.sequences, layers)
        self._runner = runner_of(fitted(drafter.model, run.target.model), run.target)
        self._runners = [self._runner]
        """Each begins a token after the one before it."""
        self._has_begun = not len(run.input_ids)  # in an engine nothing has been read at first
        self._longest = drafter.model.head_config.longest_draft or sys.maxsize

    @property
    def num_forwards(self) -> int:
        return sum(runner.num_forwards for runner in self._runners)

    @property
    def _vocab_ids(self) -> Tensor | None:
        return self._runner.head.vocab_ids

    @property
    def num_uncached_tokens(self) -> int:
        sizes = self._pending.sizes
        return len(sizes) * max(max(sizes, default=0) - 1, 0)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        pairs = zip(self._pending.sizes, max_depths, strict=True)
        depths = [
            min(depth, self._longest) if size else 0 for size, depth in pairs
        ]  # nothing is known yet of some that have just joined
        if max(depths) == 0:
            return Draft(trees=TreeBatch.empty(len(depths), self._run.device))
        self._drafter.warn_of_length(max(self._run.sequences.lengths))
        return self._grow(depths)

    def observe(self, outcome: Outcome) -> None:
        if not self._has_begun:
            self._has_begun = True
            counts = self._pending.begin()
            for lag, runner in enumerate(self._runners):
                runner.begin_rows([position + lag for position in self._first(counts)])
            return
        for runner in self._runners:
            runner.forget_tail()
        self._pending.add(
            [
                [0, *(node + 1 for node in path)][: len(tokens)]
                for path, tokens in zip(outcome.paths, outcome.tokens, strict=True)
            ]
        )

    def select_rows(self, rows: Sequence[int]) -> None:
        for runner in self._runners:
            runner.select_rows(rows)
        self._pending.select_rows(rows)

    def join(self) -> None:
        count = self._pending.join()
        first = int(self._run.target.next_positions_B[-1]) - count
        for lag, runner in enumerate(self._runners):
            runner.join_row(first + lag)

    def _first(self, counts: Sequence[int]) -> list[int]:
        """Positions of the first states, where the last ones are those before each row's next token."""
        positions = self._run.target.next_positions_B.tolist()
        return [position - count for position, count in zip(positions, counts, strict=True)]

    def _score_root(self) -> Tensor:
        while max(self._pending.sizes) > _CHUNK:
            self._read([min(max(size - _CHUNK, 0), _CHUNK) for size in self._pending.sizes])
        return self._read(self._pending.sizes)

    @abstractmethod
    def _read(self, sizes: Sequence[int]) -> Tensor:
        """Read so many pending pairs of each row; logits [B, 1, V] after the last of them."""


class _EagleSession(_HeadSession):
    """A forward for each layer of the tree, in which the head's own output stands for the target's states."""

    _outputs: list[Tensor]
    """Of the root and every layer, [B, M, C]."""

    def _read(self, sizes: Sequence[int]) -> Tensor:
        output = self._runner.read_pairs(*self._pending.take(sizes), sizes)
        self._outputs = [output.states_BTC]
        return self._runner.logits(output.normed_BTC)

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        return self._runner.logits(self._normed(grown))

    def _normed(self, grown: GrowingTrees) -> Tensor:
        """What the LM head reads [B, M, C] of the newest layer, each node with the output for its parent."""
        runner = self._runner
        if grown.is_chain:
            offsets_BM = torch.full_like(grown.tokens_BM, grown.num_slots - 2)
            before_BMC, seen_BMK = self._outputs[-1], None
        else:
            offsets_BM = grown.depths_BM - 1
            parents_BM1 = torch.from_numpy(grown.parents_BM).to(runner.device).unsqueeze(2) + 1
            outputs_BKC = torch.cat(self._outputs, 1)
            before_BMC = outputs_BKC.gather(1, parents_BM1.expand(-1, -1, outputs_BKC.shape[2]))
            seen_BMK = grown.seen_nodes_BMN
        output = runner.run_head(grown.tokens_BM, before_BMC, offsets_BM, seen_BMK)
        self._outputs.append(output.states_BTC)
        return output.normed_BTC


class _StackSession(_EagleSession):
    """Several MTP layers, each for a token further ahead.

    Layer k reads a token beside what layer k - 1 has made of the token before, and layer 0 beside the target's state
    there. So the first k tokens of a text are nothing to it. Before a drafted node of depth d there is no state of the
    target, so that layer d is the first that it is something to, and drafts its children. Layers above read it when
    they are asked for the first time, layers below never need it.
    """

    _parents: list[np.ndarray]
    """Of every layer of nodes."""

    def __init__(self, drafter: DraftHead, run: Run, layers: Sequence[int]):
        super().__init__(drafter, run, layers)
        head = self._runner.head
        assert isinstance(head, Mtp)
        self._later = [LaterLayer(cast(HeadNetwork, layer), run.target) for layer in head.later]
        self._runners += [layer.runner for layer in self._later]

    def propose(self, max_depths: Sequence[int]) -> Draft:
        known = [length + size for length, size in zip(self._lengths, self._pending.sizes, strict=True)]
        return super().propose([min(depth, 1 + count) for depth, count in zip(max_depths, known, strict=True)])

    def observe(self, outcome: Outcome) -> None:
        if not self._has_begun:
            for layer in self._later:
                for _ in outcome.tokens:
                    layer.join()
        super().observe(outcome)

    def join(self) -> None:
        super().join()
        for layer in self._later:
            layer.join()

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        for layer in self._later:
            layer.select_rows(rows)

    @property
    def _lengths(self) -> Sequence[int]:
        """Tokens of each row that have been read."""
        return self._runner.cache.lengths

    def _read(self, sizes: Sequence[int]) -> Tensor:
        tokens_BW, states_BWX = self._pending.take(sizes)
        output = self._runner.append_pairs(tokens_BW, self._runner.fused(states_BWX), sizes)
        tokens = [tokens_W[:size] for tokens_W, size in zip(tokens_BW, sizes, strict=True)]
        self._later[0].feed(tokens, [made_WC[:size] for made_WC, size in zip(output.states_BTC, sizes, strict=True)])
        self._parents = []
        for layer in self._later:
            layer.begin_round()
        rows_B, last_B = torch.arange(len(sizes)), torch.tensor(sizes) - 1
        return self._runner.logits(output.normed_BTC[rows_B, last_B].unsqueeze(1))

    def _normed(self, grown: GrowingTrees) -> Tensor:
        self._parents.append(grown.parents_BM)
        depths_BM = grown.host_depths_BT[:, grown.newest.start :]
        normed = {depth: self._ask(depth, grown) for depth in np.unique(depths_BM).tolist()}
        first, *others = normed
        normed_BMC = normed[first]
        for depth in others:
            is_there_BM1 = torch.from_numpy(depths_BM == depth).to(normed_BMC.device).unsqueeze(2)
            normed_BMC = torch.where(is_there_BM1, normed[depth], normed_BMC)
        return normed_BMC

    def _ask(self, depth: int, grown: GrowingTrees) -> Tensor:
        """What the LM head reads [B, M, C] of the newest nodes, by the layer that drafts children of this depth.

        Their parents have been scored: by the layer before, which has read all that this one is to read.
        """
        layer, *above = self._later[depth - 1 :]
        read = layer.read(_CHUNK)
        if above:
            above[0].feed(*read)
        return layer.score(grown, np.concatenate(self._parents, 1), self._later[depth - 2] if depth > 1 else None)


class _BlockSession(_HeadSession):
    """One forward a round. What it says of a depth holds for every node there (as in DDTree), but for what a DSpark
    head makes of the token before."""

    confidence_BM: Tensor | None = None
    """Logits of the chance that what was said last is accepted."""

    _slots_BTC: Tensor
    _logits_BTV: Tensor

    def _read(self, sizes: Sequence[int]) -> Tensor:
        roots_B1 = self._run.sequences.roots_B1
        self._slots_BTC = self._slots(roots_B1, sizes)
        self._logits_BTV = self._runner.logits(self._slots_BTC)
        return self._after(torch.zeros_like(roots_B1), roots_B1)

    def _slots(self, roots_B1: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the LM head reads of a block, after so many pending pairs of each row are read."""
        _, states_BWX = self._pending.take(sizes)
        self._runner.read_states(states_BWX, sizes)
        return self._runner.run_block(roots_B1)

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        return self._after(grown.depths_BM, grown.tokens_BM)

    def _after(self, depths_BM: Tensor, tokens_BM: Tensor) -> Tensor:
        """Logits [B, M, V] after tokens of these depths."""
        depths_BM = depths_BM.to(self._logits_BTV.device).clamp(max=self._logits_BTV.shape[1] - 1)
        rows_B1 = torch.arange(len(depths_BM), device=depths_BM.device).unsqueeze(1)
        logits_BMV, slots_BMC = self._logits_BTV[rows_B1, depths_BM], self._slots_BTC[rows_B1, depths_BM]
        head = self._runner.head
        if isinstance(head, DSpark):
            self.confidence_BM = head.confidence(slots_BMC, tokens_BM)
            logits_BMV = head.follow(logits_BMV, slots_BMC, tokens_BM)
        return logits_BMV

    def _confidence(self) -> Tensor | None:
        return None if self.confidence_BM is None else self.confidence_BM.float().sigmoid()


class _ParallelSession(_BlockSession):
    """The same forward reads what is pending: a P-EAGLE head."""

    def _slots(self, roots_B1: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._runner.read_block(*self._pending.take(sizes), sizes)


def _session_of(head: HeadNetwork) -> type[_HeadSession]:
    if isinstance(head, PEagle):
        return _ParallelSession
    if isinstance(head, Mtp) and head.later:
        return _StackSession
    return _BlockSession if isinstance(head, DFlash) else _EagleSession
