"""A reply while it comes: tokens become text, and it is known which of them were drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.cli.chat.reply import Piece
from specdec.streaming import RoundStreamer
from specdec.text.detokenize import Detokenizer


class ReplyStreamer(RoundStreamer):
    """Collects a reply, and shows each round's part of it as it comes.

    Args:
        show: called with the new pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[Sequence[Piece]], None]):
        self._detokenizer = Detokenizer(tokenizer)
        self._show = show
        self.pieces: list[Piece] = []
        self.num_tokens = 0

    def put(self, value: Tensor) -> None:
        """Nothing: `put_round` has told more."""

    def put_round(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], num_accepted: Sequence[int]) -> None:
        (row_tokens,), (count,) = tokens, num_accepted
        self.num_tokens += len(row_tokens)
        self._take([Piece(self._detokenizer.add(token), index < count) for index, token in enumerate(row_tokens)])

    def end(self) -> None:
        """Tell what was held back; also called when the run was broken off."""
        self._take([Piece(self._detokenizer.finish(), False)])

    def _take(self, pieces: list[Piece]) -> None:
        told = [piece for piece in pieces if piece.text]
        self.pieces += told
        if told:
            self._show(told)
