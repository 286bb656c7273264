"""A smaller model of the same tokenizer drafts (Leviathan et al. 2023; Chen et al. 2023).

Its cache follows the target's without recomputation: what the target accepts of the drafted tail is kept as it
is, and the tokens that the draft has not seen yet (the bonus, and the last drafted leaf) open its next round.

Shape legend: B rows, M nodes of a layer, K nodes so far, W pending tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.compatibility import check_model
from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.growing import GrowingSession
from specdec.errors import DraftError
from specdec.kernels import quantized_copy
from specdec.target import TreeModel
from trees import Chain, Draft, GrowthPolicy, TreeBatch

_PADDING_ROWS = 0.01
"""Vocabularies of one tokenizer may differ in size by this share: rows that pad the embedding to a round number."""


class SmallModel(Drafter):
    """Drafts with a causal LM.

    Args:
        model: a decoder-only model with the target's tokenizer.
        weights: "int8" drafts with an int8 copy of it (CPU); None with the model as it is.
        num_tokens: length of the chain that it drafts, unless the call names a tree.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        ValueError: `num_tokens` is not a positive integer, or `weights` is something else.
    """

    def __init__(self, model: PreTrainedModel, weights: str | None = None, num_tokens: int = 5):
        self.policy: GrowthPolicy = Chain(num_tokens)
        if weights not in (None, "int8"):
            raise ValueError(f"SmallModel(weights={weights!r}): weights is None or 'int8'")
        check_model(model)
        self.model = model if weights is None else quantized_copy(model)

    def start(self, run: Run) -> DraftSession:
        self._check_fit(run)
        return _SmallModelSession(self, run)

    def _check_fit(self, run: Run) -> None:
        draft_size = self.model.config.get_text_config(decoder=True).vocab_size
        if abs(draft_size - run.vocab_size) > _PADDING_ROWS * max(draft_size, run.vocab_size):
            raise DraftError(
                f"the draft model has a vocabulary of {draft_size} and the target one of {run.vocab_size}: they do "
                "not share a tokenizer. Take a draft of the target's own family"
            )
        if run.input_ids.shape[1] == 0:
            raise DraftError(
                "a draft model cannot read inputs_embeds made for the target: pass input_ids, or draft with "
                "specdec.drafters.PromptLookup()"
            )


class _SmallModelSession(GrowingSession):
    def __init__(self, drafter: SmallModel, run: Run):
        super().__init__(run, run.tree or drafter.policy)
        self._model = TreeModel(drafter.model)
        self._cached: list[int] | None = None
        """Committed tokens (padding included) that each row's draft cache holds; None before the prefill."""
        self._draft: Draft | None = None

    @property
    def num_forwards(self) -> int:
        return self._model.num_forwards

    @property
    def backlog(self) -> int:
        lengths = self._run.sequences.lengths
        return max(lengths) if self._cached is None else max(map(int.__sub__, lengths, self._cached)) - 1

    @property
    def draft_model(self) -> PreTrainedModel:
        return self._model.model

    def propose(self, max_depths: Sequence[int]) -> Draft:
        if max(max_depths) == 0:
            return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
        self._draft = self._grow(max_depths)
        return self._draft

    def observe(self, outcome: Outcome) -> None:
        if self._cached is None or not outcome.is_own:
            return
        kept = [self._forwarded(row, path) for row, path in enumerate(outcome.paths)]
        self._model.commit(kept)
        self._cached = [cached + len(nodes) for cached, nodes in zip(self._cached, kept, strict=True)]

    def select_rows(self, rows: Sequence[int]) -> None:
        if self._cached is not None:
            self._model.select_rows(rows)
            self._cached = [self._cached[row] for row in rows]

    def _forwarded(self, row: int, path: Sequence[int]) -> list[int]:
        """Where the draft's cache holds the nodes of a path (not the last one, if nothing was asked of it)."""
        places = path
        if self._draft is not None and self._draft.places is not None:
            places = [self._draft.places[row][node] for node in path]
        return [place for place in places if 0 <= place < self._model.cache.tail]

    def _prefill(self) -> None:
        rows, mask = self._run.sequences.rows, self._run.attention_mask
        input_ids = self._run.input_ids[rows]
        device = self._model.device
        if mask is not None:
            mask = mask[rows][:, -input_ids.shape[1] :].to(device)
        self._model.prefill(self._readable(input_ids.to(device)), attention_mask=mask)
        self._cached = [input_ids.shape[1]] * len(rows)

    def _score_root(self) -> Tensor:
        """Forward the committed tokens that the draft has not seen; logits after each row's last, [B, 1, V]."""
        if self._cached is None:
            self._prefill()
        sequences, cached = self._run.sequences, self._cached
        assert cached is not None
        sizes = [length - seen for length, seen in zip(sequences.lengths, cached, strict=True)]
        width = max(sizes)
        tokens_BW = torch.zeros((len(sizes), width), dtype=torch.long, device=self._model.device)
        for row, (seen, size) in enumerate(zip(cached, sizes, strict=True)):
            tokens_BW[row, :size] = sequences.prefix(row)[seen:]
        offsets_BW = torch.arange(width, device=self._model.device).expand_as(tokens_BW)
        seen_BWW = (offsets_BW[:, :, None] >= offsets_BW[:, None]).contiguous()
        logits_BWV = self._model.forward(self._readable(tokens_BW), offsets_BW, seen_BWW)
        self._model.commit([range(size) for size in sizes])
        self._cached = list(sequences.lengths)
        last_B = torch.tensor(sizes, device=logits_BWV.device) - 1
        return logits_BWV[torch.arange(len(sizes)), last_B].unsqueeze(1)

    def _readable(self, tokens: Tensor) -> Tensor:
        """The tokens, with a stand-in for those of the target's padding rows that the draft does not have."""
        return tokens.clamp(max=self._model.vocab_size - 1)

    def _score_nodes(self, grown: TreeBatch, num_new: int) -> Tensor:
        sees_all = grown.is_chain and num_new == 1
        device = self._model.device
        return self._model.forward(
            grown.tokens_BN[:, -num_new:].to(device),
            grown.depths_BT[:, -num_new:].to(device) - 1,
            None if sees_all else grown.ancestors_BTT[:, -num_new:, 1:].to(device),
        )
