"""Feeds a `transformers` streamer exactly as plain decoding does: one token of every row at a time.

A streamer that wants to know more than plain decoding could tell, which tokens were drafted, is a `RoundStreamer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class RoundStreamer(BaseStreamer):
    """A streamer that is also told of every round which of its tokens were drafted.

    `put` and `end` are called as on any streamer: `put` with the prompt, then with one token of every row at a time.
    """

    def put_round(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_accepted: Sequence[int]) -> None:
        """Take what a round has committed; called before `put` passes it on. The prefill counts as a round.

        Args:
            rows: index in the caller's batch of every row that has new tokens.
            tokens: for each of these rows its new tokens, at least one.
            num_accepted: for each of these rows how many of its first new tokens were drafted and accepted; the one
                that may follow is the target's own. 0 after the prefill.
        """
        raise NotImplementedError


class StreamFeed:
    """Holds tokens back until every unfinished row has one for the same place.

    Args:
        streamer: receives int64 [B] tensors on the CPU.
        num_rows: B.
        pad_token_id: stands in for the tokens of rows that have finished.
    """

    def __init__(self, streamer: BaseStreamer, num_rows: int, pad_token_id: int):
        self._streamer = streamer
        self._pad = pad_token_id
        self._waiting: list[list[int]] = [[] for _ in range(num_rows)]
        self._finished = [False] * num_rows

    def put_round(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_accepted: Sequence[int]) -> None:
        """Tell a `RoundStreamer` of a round; other streamers do not ask."""
        if isinstance(self._streamer, RoundStreamer):
            self._streamer.put_round(rows, tokens, num_accepted)

    def put(self, row: int, tokens: Sequence[int], finished: bool) -> None:
        """Take a row's newly committed tokens."""
        self._waiting[row].extend(tokens)
        self._finished[row] = finished

    def flush(self) -> None:
        """Pass on the places that are complete."""
        while any(self._waiting) and all(
            waiting or finished for waiting, finished in zip(self._waiting, self._finished, strict=True)
        ):
            self._streamer.put(torch.tensor([row.pop(0) if row else self._pad for row in self._waiting]))

    def end(self) -> None:
        """All rows have finished."""
        self._streamer.end()


class PastPrompt(BaseStreamer):
    """A streamer that has been given the prompt already, when the call was refused."""

    def __init__(self, streamer: BaseStreamer):
        self._streamer = streamer
        self._has_prompt = True

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self._has_prompt = False
        else:
            self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
