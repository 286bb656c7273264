"""A smaller model of the same tokenizer drafts (Leviathan et al. 2023; Chen et al. 2023).

Its cache follows the target's without recomputation: what the target accepts of the drafted tail is kept as it
is, and the tokens that the draft has not seen yet (the bonus, and the last drafted leaf) open its next round.

Shape legend: B rows, M nodes of a layer, K nodes so far, W pending tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.model.growing import GrowingSession
from specdec.drafters.model.quantized_copy import QuantizedCopy, check_quantized_weights
from specdec.drafters.model.runner import DraftModelRunner
from specdec.errors import DraftError, UnsupportedOptionError
from specdec.model_options import QuantizedWeights
from specdec.tree_model.compatibility import check_model
from specdec.tree_model.layer_kinds import keeps_states
from trees import Chain, Draft, GrowingTrees, GrowthPolicy, TreeBatch

_PADDING_ROWS = 0.01
"""Vocabularies of one tokenizer may differ in size by this share: rows that pad the embedding to a round number."""


class SmallModel(Drafter):
    """Drafts with a causal LM.

    Args:
        model: a decoder-only model with the target's tokenizer.
        weights: "int8" or "int4" drafts with such a copy of it (CPU), made again if it changes between two calls; None
            with the model as it is.
        num_tokens: length of the chain that it drafts, unless the call names a tree.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        ValueError: `num_tokens` is not a positive integer, or `weights` is something else.
    """

    def __init__(self, model: PreTrainedModel, weights: QuantizedWeights | None = None, num_tokens: int = 5):
        self.policy: GrowthPolicy = Chain(num_tokens)
        if weights is not None:
            check_quantized_weights("SmallModel", weights)
        check_model(model)
        self.supports_rollback = not keeps_states(model.config)
        self._model: PreTrainedModel | QuantizedCopy = model
        if weights is not None:
            self._model = QuantizedCopy(model, weights)
            self._model.current()  # made at once, as the original may be let go

    @property
    def model(self) -> PreTrainedModel:
        """That drafts."""
        return self._model.current() if isinstance(self._model, QuantizedCopy) else self._model

    def models(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def start(self, run: Run) -> DraftSession:
        self.check_fit(run)
        return _SmallModelSession(self, run)

    def check_fit(self, run: Run) -> None:
        """Raise `DraftError` if the model cannot read what the target writes."""
        draft_size = self.model.config.get_text_config(decoder=True).vocab_size
        if abs(draft_size - run.vocab_size) > _PADDING_ROWS * max(draft_size, run.vocab_size):
            raise DraftError(
                f"the draft model has a vocabulary of {draft_size} and the target one of {run.vocab_size}: they do "
                "not share a tokenizer. Take a draft of the target's own family, or specdec.drafters.ForeignModel"
            )
        if len(run.input_ids) and not run.input_ids.shape[1]:
            raise UnsupportedOptionError(
                "a draft model cannot read inputs_embeds made for the target: pass input_ids, or draft with "
                "specdec.drafters.PromptLookup()"
            )


class _SmallModelSession(GrowingSession):
    takes_rows = True

    def __init__(self, drafter: SmallModel, run: Run):
        super().__init__(run, run.tree or drafter.policy)
        self._runner = DraftModelRunner(drafter.model, run)
        self._draft: Draft | None = None

    @property
    def num_forwards(self) -> int:
        return self._runner.num_forwards

    @property
    def num_uncached_tokens(self) -> int:
        return self._runner.num_uncached_tokens

    @property
    def draft_model(self) -> PreTrainedModel:
        return self._runner.model

    def propose(self, max_depths: Sequence[int]) -> Draft:
        self._draft, depths = None, max_depths
        if max(max_depths):
            is_read = self._runner.prefill_chunk()
            depths = [depth if read else 0 for depth, read in zip(max_depths, is_read, strict=True)]
        if not max(depths):  # there may be nothing to read either
            return Draft(trees=TreeBatch.empty(len(depths), self._run.device))
        self._draft = self._grow(depths)
        return self._draft

    def observe(self, outcome: Outcome) -> None:
        draft = self._draft or Draft(trees=TreeBatch.empty(len(outcome.own_paths)))
        self._runner.keep([draft.grown(row, path, self._runner.tail) for row, path in enumerate(outcome.own_paths)])

    def select_rows(self, rows: Sequence[int]) -> None:
        self._runner.select_rows(rows)

    def join(self) -> None:
        self._runner.join()

    def rollback(self) -> None:
        self._runner.rollback()

    def _score_root(self) -> Tensor:
        return self._runner.read_pending()

    def _score_nodes(self, grown: GrowingTrees) -> Tensor:
        device = self._runner.device
        return self._runner.forward(
            grown.tokens_BM.to(device),
            grown.depths_BM.to(device) - 1,
            None if grown.is_chain else grown.seen_nodes_BMN.to(device),
        )
