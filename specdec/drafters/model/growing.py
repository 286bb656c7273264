"""Drafts that grow a layer of nodes for each forward of whatever scores them.

Shape legend: B rows, M nodes of a layer, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.decoding.drafter import DraftSession, Run
from specdec.decoding.sampling import Prefixes
from specdec.kernels.trees.token_source import open_token_source
from trees import Draft, Grower, GrowingTrees, GrowthPolicy, Round
from trees.draft import widened

_NEVER = -1e4
"""Logit of tokens that a draft cannot say: finite, so that processors may forbid all that it can."""


def target_scores(run: Run, logits_BMV: Tensor, prefixes: Prefixes) -> Tensor:
    """Scores over the target's vocabulary, after the user's processors; the logits may have a smaller vocabulary."""
    missing = run.vocab_size - logits_BMV.shape[-1]
    if missing:
        logits_BMV = torch.nn.functional.pad(logits_BMV, (0, missing), value=-torch.inf)
    return run.sampler.process(logits_BMV.to(run.device), prefixes)


class GrowingSession(DraftSession):
    """Lets a growth policy shape the trees.

    Attributes:
        policy: of the next drafts; may be replaced between rounds.
    """

    policy: GrowthPolicy
    grows_trees = True

    def __init__(self, run: Run, policy: GrowthPolicy):
        self.policy = policy
        self._run = run
        self._grower: Grower | None = None

    @property
    def _vocab_ids(self) -> Tensor | None:
        """int64 [V]: the target's token of each logit; None: the first V, in order."""
        return None

    @abstractmethod
    def _score_root(self) -> Tensor:
        """Logits after every row's root, [B, 1, V]; V may be less than the target's vocabulary."""

    @abstractmethod
    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        """Logits after the newest layer of the growing trees, [B, M, V]."""

    def _confidence(self) -> Tensor | None:
        """See `Round.confidence`."""
        return None

    def _grow(self, max_depths: Sequence[int]) -> Draft:
        """One round's trees; at least one depth is positive.

        Where processors treat all tokens alike, a tree grows in the vocabulary of the logits, and takes the target's
        tokens only where it is forwarded, and in the end.
        """
        sampler, vocab_size, vocab_ids = self._run.sampler, self._run.vocab_size, self._vocab_ids
        narrow_ids = None
        if vocab_ids is not None and sampler.reads_no_tokens:
            narrow_ids = vocab_ids.to(self._run.device)
        round_ = Round(
            max_depths=max_depths,
            sample=sampler.do_sample,
            generator=sampler.generator,
            previous=self._grower,
            token_source=open_token_source,
            confidence=self._confidence,
        )
        grower = self._grower = self.policy.start(round_)
        grown = GrowingTrees(len(max_depths), self._run.device)
        logits_BMV = self._score_root()
        while True:
            prefixes = Prefixes(self._run.sequences, grown, grown.newest)
            if narrow_ids is not None:
                scores_BMV = sampler.process(logits_BMV.to(self._run.device), prefixes)
            else:
                if vocab_ids is not None:
                    logits_BMV = widened(logits_BMV, vocab_ids, vocab_size, _NEVER)
                scores_BMV = target_scores(self._run, logits_BMV, prefixes)
            layer = grower.grow(scores_BMV)
            if not grower.needs_scores:
                break
            if narrow_ids is not None:
                layer = replace(layer, tokens_BM=narrow_ids[layer.tokens_BM])
            grown.append(layer)
            logits_BMV = self._score_nodes(grown)
        draft = grower.finish()
        return draft if narrow_ids is None else draft.in_vocabulary(narrow_ids, vocab_size)
