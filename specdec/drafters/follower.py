"""A model of the target's tokenizer whose cache follows the committed tokens, without recomputation.

Shape legend: B rows, T new slots, K tail slots, W pending tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Run
from specdec.target import TreeModel


class Follower:
    """Reads the prompt when it is first asked what is pending; then keeps what the target accepts of its tail."""

    def __init__(self, model: PreTrainedModel, run: Run):
        self._run = run
        self._model = TreeModel(model)
        self._cached: list[int] | None = None
        """Committed tokens (padding included) that each row's cache holds; None before the prefill."""

    @property
    def model(self) -> PreTrainedModel:
        return self._model.model

    @property
    def backlog(self) -> int:
        """Tokens of the longest row, besides the newest, that are not in the cache."""
        lengths = self._run.sequences.lengths
        return max(lengths) if self._cached is None else max(map(int.__sub__, lengths, self._cached)) - 1

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def num_forwards(self) -> int:
        return self._model.num_forwards

    @property
    def tail(self) -> int:
        """Slots forwarded since the last `keep`."""
        return 0 if self._cached is None else self._model.cache.tail

    def pending(self) -> tuple[Tensor, list[int]]:
        """int64 [B, W] the committed tokens that the cache does not hold yet, and how many each row has (1 or more)."""
        if self._cached is None:
            self._cached = self._prefill()
        sequences = self._run.sequences
        sizes = [length - seen for length, seen in zip(sequences.lengths, self._cached, strict=True)]
        tokens_BW = torch.zeros((len(sizes), max(sizes)), dtype=torch.long, device=self.device)
        for row, (seen, size) in enumerate(zip(self._cached, sizes, strict=True)):
            tokens_BW[row, :size] = sequences.prefix(row)[seen:]
        return tokens_BW, sizes

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        """Append slots to the tail (see `TreeModel.forward`): logits [B, T, V]."""
        return self._model.forward(self._readable(tokens_BT), offsets_BT, seen_BTK)

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """These tail slots of each row are the next committed tokens; the others are forgotten."""
        if self._cached is not None:
            self._model.commit(kept)
            self._cached = [cached + len(slots) for cached, slots in zip(self._cached, kept, strict=True)]

    def select_rows(self, rows: Sequence[int]) -> None:
        if self._cached is not None:
            self._model.select_rows(rows)
            self._cached = [self._cached[row] for row in rows]

    def _prefill(self) -> list[int]:
        rows, mask = self._run.sequences.rows, self._run.attention_mask
        input_ids = self._run.input_ids[rows]
        if mask is not None:
            mask = mask[rows][:, -input_ids.shape[1] :].to(self.device)
        self._model.prefill(self._readable(input_ids.to(self.device)), attention_mask=mask)
        return [input_ids.shape[1]] * len(rows)

    def _readable(self, tokens: Tensor) -> Tensor:
        """The tokens, with a stand-in for those of the target's padding rows that this model does not have."""
        return tokens.clamp(max=self._model.vocab_size - 1)
