"""A model of the target's tokenizer whose cache follows the committed tokens, without recomputation.

Shape legend: B rows, T new slots, K tail slots, W pending tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda import tree_model_of
from specdec.decoding.drafter import Run
from specdec.tree_model.model import TreeModel
from trees.uploads import upload

_CHUNK = 256
"""Tokens of prompts that are read in a round."""


class DraftModelRunner:
    """Reads the prompts when something is first asked; then keeps what the target accepts of its tail.

    The prompts of rows that join are read one after the other, a chunk a round: see `prefill_chunk`.
    """

    def __init__(self, model: PreTrainedModel, run: Run):
        self._run = run
        self._model = tree_model_of(model)
        self._cached: list[int] | None = None
        """Committed tokens (padding included) that each row's cache holds; None before the prefill."""
        self._reader: TreeModel | None = None
        self._begun: tuple[int, int] | None = None
        """The row (by number) whose prompt is being read alone, and how much of it has been."""

    @property
    def model(self) -> PreTrainedModel:
        return self._model.model

    @property
    def num_uncached_tokens(self) -> int:
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
        return self._model.num_forwards + (0 if self._reader is None else self._reader.num_forwards)

    @property
    def tail(self) -> int:
        """Slots forwarded since the last `keep`."""
        return 0 if self._cached is None else self._model.cache.tail

    def prefill_chunk(self) -> list[bool]:
        """Read the prompts of the call; of rows that have joined no more than a chunk, so that others need not wait.

        Returns:
            Of which rows everything that matters has been read: only those can be drafted for.
        """
        sequences, left = self._run.sequences, _CHUNK
        if self._cached is None and not self._has_joined:
            self._cached = self._prefill()
        elif self._cached is None:
            self._model.begin(len(sequences))
            self._cached = [0] * len(sequences)
        for row, length in enumerate(sequences.lengths):
            if left > 0 and not self._cached[row] and length > 1:
                left -= self._prefill_row(row, left)
        return [bool(seen) or length == 1 for seen, length in zip(self._cached, sequences.lengths, strict=True)]

    def read_pending(self) -> Tensor:
        """Read the committed tokens that the cache does not hold yet; logits after each row's last, [B, 1, V]."""
        tokens_BW, sizes = self._pending()
        logits_B1V = read_ragged(self._model, self._readable(tokens_BW), sizes)
        assert self._cached is not None
        self._cached = [cached + size for cached, size in zip(self._cached, sizes, strict=True)]
        return logits_B1V

    def _pending(self) -> tuple[Tensor, list[int]]:
        """int64 [B, W] the committed tokens that the cache does not hold yet, and how many each row has.

        That is one or more, but for rows whose prompt has not been read: they have none.
        """
        if self._cached is None:
            self.prefill_chunk()
        assert self._cached is not None
        sequences = self._run.sequences
        texts, rows = sequences.tokens, zip(sequences.lengths, self._cached, strict=True)
        sizes = [length - seen if seen or length == 1 else 0 for length, seen in rows]
        width = max(sizes)  # what is not in the cache is no padding, which is read with the prompt
        pending = [
            [*tokens[len(tokens) - size :], *[0] * (width - size)] for tokens, size in zip(texts, sizes, strict=True)
        ]
        return upload(pending, self.device), sizes

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        """Append slots to the tail (see `TreeModel.forward`): logits [B, T, V]."""
        return self._model.forward(self._readable(tokens_BT), offsets_BT, seen_BTK)

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """These tail slots of each row are the next committed tokens; the others are forgotten."""
        if self._cached is not None:
            self._model.commit(kept)
            self._cached = [cached + len(slots) for cached, slots in zip(self._cached, kept, strict=True)]

    def rollback(self) -> None:
        """Forget what the cache holds past the ends of the texts; the newest token is never in it."""
        if self._cached is not None:
            lengths = self._run.sequences.lengths
            self._cached = [min(seen, length - 1) for seen, length in zip(self._cached, lengths, strict=True)]
            self._model.cache.truncate_committed(self._cached)

    def select_rows(self, rows: Sequence[int]) -> None:
        if self._cached is not None:
            self._model.select_rows(rows)
            self._cached = [self._cached[row] for row in rows]
        if self._begun is not None and self._begun[0] not in self._run.sequences.rows:
            self._stop_reading()

    def join(self) -> None:
        """Take the row that the sequences have been given at their end."""
        if self._cached is not None:
            self._model.join()
            self._cached.append(0)

    @property
    def _has_joined(self) -> bool:
        """Whether there is a row that the call did not come with: it has no padding."""
        return any(number >= len(self._run.input_ids) for number in self._run.sequences.rows)

    def _prefill_row(self, row: int, most: int) -> int:
        """Go on reading a row's text but its newest token; returns the number of tokens read."""
        assert self._cached is not None
        sequences = self._run.sequences
        number, beginning_L = sequences.rows[row], sequences.prefix(row)[:-1]
        if self._reader is None:
            self._reader = TreeModel(self.model)
        if self._begun is None or self._begun[0] != number:
            self._reader.begin(1, capacity=len(beginning_L))
            self._begun = number, 0
        start = self._begun[1]
        part_T = beginning_L[start : start + most].to(self.device)
        self._reader.read(self._readable(part_T).unsqueeze(0))
        self._begun = number, start + len(part_T)
        if self._begun[1] == len(beginning_L):
            self._model.cache.write_row(row, self._reader.cache.row_views(0))
            self._cached[row] = len(beginning_L)
            self._stop_reading()
        return len(part_T)

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.begin()
        self._begun = None

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


def read_ragged(model: TreeModel, tokens_BW: Tensor, sizes: Sequence[int]) -> Tensor:
    """Commit the first `sizes` tokens of each row; logits after the last of them, [B, 1, V]."""
    offsets_BW = torch.arange(tokens_BW.shape[1], device=tokens_BW.device).expand_as(tokens_BW)
    seen_BWW = (offsets_BW[:, :, None] >= offsets_BW[:, None]).contiguous()
    logits_BWV = model.forward(tokens_BW, offsets_BW, seen_BWW)
    model.commit([range(size) for size in sizes])
    if min(sizes) == max(sizes):
        return logits_BWV[:, sizes[0] - 1 : sizes[0]]
    last_B = upload(sizes, logits_BWV.device) - 1
    return logits_BWV[torch.arange(len(sizes), device=last_B.device), last_B].unsqueeze(1)
