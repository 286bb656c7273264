"""The target's own copy of 8 or 4 bits drafts for the float target: the output is exactly the float model's.

The copy of a float32 target reads the target's own keys and values, so it needs no prefill and no memory for a cache,
and its context is the true one; what it adds while drafting is forgotten before the target verifies. Another one is a
small model that happens to be the target's size: on a GPU its steps are captured like those of any draft.

Shape legend: B rows, M nodes of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Run
from specdec.drafters.model.growing import GrowingSession
from specdec.drafters.model.quantized_copy import QuantizedCopy, check_quantized_weights
from specdec.drafters.model.small_model import SmallModel
from specdec.model_options import QuantizedWeights
from specdec.tree_model.model import TreeModel
from trees import Chain, Draft, GrowingTrees, GrowthPolicy, TreeBatch


class QuantizedSelf(Drafter):
    """Drafts with an int8 (or int4) copy of the target, made at the first call and kept as long as the drafter. A call
    that finds the target's weights or adapters changed makes the copy again.

    The copy shares embeddings and norms with the target, and its cache if that is float32; it adds a quarter of the
    memory of the linears (int4: a sixth). It agrees with the target on most tokens, and pays where its forward is
    several times cheaper (float32 on a CPU).

    On a CUDA device there is a copy of 4 bits (`specdec.prepare`; not measured), of a bfloat16 target. It shares all
    that is not quantised, the LM head too, and has a cache of its own.

    Args:
        num_tokens: length of the chain that it drafts, unless the call names a tree.
        weights: of the copy. "int4" is quicker still, and agrees a little less.

    Raises:
        UnsupportedModelError: at the first call, for a target that `specdec.prepare` refuses such weights.
        UnsupportedOptionError: at the first call on a CUDA device, without torchao.
        ValueError: `num_tokens` is not a positive integer, or `weights` is something else.
    """

    prior_acceptance = 0.9

    def __init__(self, num_tokens: int = 5, weights: QuantizedWeights = "int8"):
        check_quantized_weights("QuantizedSelf", weights)
        self.policy: GrowthPolicy = Chain(num_tokens)
        self._num_tokens = num_tokens
        self._weights: QuantizedWeights = weights
        self._copies: WeakKeyDictionary[PreTrainedModel, QuantizedCopy] = WeakKeyDictionary()

    def has_copy(self, target: PreTrainedModel) -> bool:
        """Whether there is a copy of the target as it is now."""
        return target in self._copies and self._copies[target].is_current

    def copy_of(self, target: PreTrainedModel) -> PreTrainedModel:
        """The copy, which is made if there is none yet, and made again if the target has changed."""
        return self._copies.setdefault(target, QuantizedCopy(target, self._weights)).current()

    def copy_seconds(self, target: PreTrainedModel) -> float:
        """That making the copy took, the last time; 0 if there has been none."""
        return self._copies[target].seconds if target in self._copies else 0.0

    def shares_cache(self, target: PreTrainedModel) -> bool:
        """Whether the copy can read the target's keys and values: its own are float32."""
        return target.dtype == torch.float32

    def start(self, run: Run) -> DraftSession:
        target = run.target.model
        copy = self.copy_of(target)
        if not self.shares_cache(target):
            return SmallModel(copy, num_tokens=self._num_tokens).start(run)
        return _QuantizedSelfSession(run, copy, run.tree or self.policy)


class SelfSession(GrowingSession):
    """Drafts with a model that holds what the target has committed, when it is asked."""

    takes_rows = True
    _model: TreeModel

    @property
    def num_forwards(self) -> int:
        return self._model.num_forwards

    def _score_root(self) -> Tensor:
        roots_B1 = self._run.sequences.roots_B1
        return self._model.forward(roots_B1, torch.zeros_like(roots_B1), None)

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        seen_BMT = None if grown.is_chain else grown.seen_BMT
        return self._model.forward(grown.tokens_BM, grown.depths_BM, seen_BMT)


class _QuantizedSelfSession(SelfSession):
    def __init__(self, run: Run, copy: PreTrainedModel, policy: GrowthPolicy):
        super().__init__(run, policy)
        self._model = TreeModel(copy)

    @property
    def draft_model(self) -> PreTrainedModel:
        return self._model.model

    def join(self) -> None:
        """The row's states are the target's."""

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        self._model.share_cache_with(self._run.target)
        try:
            return self._grow(max_depths)
        finally:
            self._run.target.forget_tail()
