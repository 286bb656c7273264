"""Keeps what the caller gets: finished rows, and if asked for, scores, logits and key/value states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from specdec.decoding.stats import DecodingStats, SpeculativeOutput
from specdec.hf import CACHE
from specdec.tree_model.cache import RowStates, TreeCache
from specdec.tree_model.dynamic_cache import refill


class Recorder:
    """The results of every row of the caller's batch.

    Args:
        num_rows: rows of the caller's batch.
        scores: keep processed scores.
        logits: keep raw logits.
        states: keep key/value states.
    """

    def __init__(self, num_rows: int, *, scores: bool, logits: bool, states: bool):
        self._scores: list[list[Tensor]] | None = [[] for _ in range(num_rows)] if scores else None
        self._logits: list[list[Tensor]] | None = [[] for _ in range(num_rows)] if logits else None
        self._states: dict[int, RowStates] | None = {} if states else None
        self._ids: dict[int, Tensor] = {}

    def keeps(self, row: int) -> bool:
        """Whether a row's vectors are wanted: else they need not be looked up for `record`."""
        return self._scores is not None or self._logits is not None

    def record(self, row: int, slots: Sequence[int], scores_TV: Tensor, logits_TV: Tensor) -> None:
        """Keep the vectors that a row's committed tokens were chosen from.

        Args:
            row: index in the caller's batch.
            slots: the slot before each committed token.
        """
        for kept, vectors_TV in ((self._scores, scores_TV), (self._logits, logits_TV)):
            if kept is not None:
                kept[row].extend(vectors_TV[list(slots)].float().clone())

    def trim(self, row: int, count: int) -> None:
        """Forget a row's vectors past its first `count` tokens."""
        for kept in (self._scores, self._logits):
            if kept is not None:
                del kept[row][count:]

    def scores(self, count: int | None = None) -> tuple[Tensor, ...] | None:
        """One float32 [B, V] for each of the first `count` tokens (None: all); zeros for rows without one.

        None if scores are not kept.
        """
        return _by_token(self._scores, count)

    def logits(self) -> tuple[Tensor, ...] | None:
        """As `scores`, before the processors."""
        return _by_token(self._logits, None)

    def finish(self, row: int, ids: Tensor, cache: TreeCache | None, index: int) -> None:
        """Keep a row that has stopped.

        Args:
            row: index in the caller's batch.
            ids: int64 its tokens, prompt and padding included.
            cache: None if states are not kept.
            index: the row's index in the cache now.
        """
        self._ids[row] = ids.clone()
        if self._states is not None:
            assert cache is not None
            self._states[row] = cache.row_states(index)

    def sequences(self, pad_token_id: int) -> Tensor:
        """int64 [B, L]: all rows, filled with padding to the longest one."""
        return torch.nn.utils.rnn.pad_sequence(
            [self._ids[row] for row in sorted(self._ids)], batch_first=True, padding_value=pad_token_id
        )

    def output(
        self,
        stats: DecodingStats,
        config: GenerationConfig,
        *,
        device: torch.device,
        cache: DynamicCache | None = None,
    ) -> SpeculativeOutput:
        """What the call returns, once its rows are finished."""
        return SpeculativeOutput(
            sequences=self.sequences(pad_token_id(config)).to(device),
            scores=self.scores(),
            logits=self.logits(),
            **{CACHE: cache},
            stats=stats,
        )

    def refill(self, cache: DynamicCache) -> None:
        """Give the caller's cache the states of all rows, if they were kept."""
        if self._states is not None:
            refill(cache, [self._states[row] for row in sorted(self._states)])


def pad_token_id(config: GenerationConfig) -> int:
    """What finished rows are filled with."""
    return 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)


def _by_token(kept: list[list[Tensor]] | None, count: int | None) -> tuple[Tensor, ...] | None:
    if kept is None:
        return None
    blank = torch.zeros_like(next(vectors[0] for vectors in kept if vectors))
    num_tokens = max(len(vectors) for vectors in kept) if count is None else count
    return tuple(
        torch.stack([vectors[index] if index < len(vectors) else blank for vectors in kept])
        for index in range(num_tokens)
    )
