"""A model of the target's tokenizer whose cache follows the committed tokens, without recomputation.

Shape legend: B rows, T new slots, K tail slots, W pending tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cache import RowStates
from specdec.drafters.base import Run
from specdec.target import TreeModel

_CHUNK = 256
"""Tokens of a prompt that are read at once."""


class Follower:
    """Reads the prompts when it is first asked what is pending; then keeps what the target accepts of its tail.

    So do rows that join: their prompts are read, each alone, when something is next asked.
    """

    def __init__(self, model: PreTrainedModel, run: Run):
        self._run = run
        self._model = TreeModel(model)
        self._cached: list[int] | None = None
        """Committed tokens (padding included) that each row's cache holds; None before the prefill."""
        self._reader: TreeModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self._model.model

    @property
    def backlog(self) -> int:
        """Tokens that are not in the cache, besides the newest, padding included."""
        lengths = self._run.sequences.lengths
        if self._cached is None and not self._has_joined:
            return len(lengths) * max(lengths)
        cached = self._cached or [0] * len(lengths)
        unread = sum(length - 1 for length, seen in zip(lengths, cached, strict=True) if not seen)
        behind = max((length - seen - 1 for length, seen in zip(lengths, cached, strict=True) if seen), default=0)
        return unread + len(lengths) * behind

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
        self._read_prompts()
        assert self._cached is not None
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

    def join(self) -> None:
        """Take the row that the sequences have been given at their end."""
        if self._cached is not None:
            self._model.join()
            self._cached.append(0)

    @property
    def _has_joined(self) -> bool:
        """Whether there is a row that the call did not come with: it has no padding."""
        return any(number >= len(self._run.input_ids) for number in self._run.sequences.rows)

    def _read_prompts(self) -> None:
        """Bring the cache to a point where every row's pending tokens are few."""
        sequences = self._run.sequences
        if self._cached is None and not self._has_joined:
            self._cached = self._prefill()
        elif self._cached is None:
            self._model.begin(len(sequences))
            self._cached = [0] * len(sequences)
        for row, (seen, length) in enumerate(zip(self._cached, sequences.lengths, strict=True)):
            if not seen and length > 1:
                self._model.cache.write_row(row, self._read_alone(sequences.prefix(row, length - 1)))
                self._cached[row] = length - 1

    def _read_alone(self, tokens_L: Tensor) -> RowStates:
        if self._reader is None:
            self._reader = TreeModel(self.model)
        self._reader.begin(1, capacity=len(tokens_L))
        for part_P in self._readable(tokens_L.to(self.device)).split(_CHUNK):
            self._reader.read(part_P.unsqueeze(0))
        return self._reader.cache.row_views(0)

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
