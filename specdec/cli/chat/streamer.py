"""A reply while it comes: tokens become text, and it is known which of them were drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.cli.chat.reply import Piece
from specdec.streaming import RoundStreamer

_UNFINISHED = "\ufffd"
"""What a decoder makes of the first bytes of a character."""


class Detokenizer:
    """Turns tokens into text one at a time; the parts put together are the text of all.

    A token is decoded with the one before it (some decoders drop a leading space), and held back until its
    characters are whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """The tokens told last, and those that are held back."""
        self._num_told = 0

    def add(self, token: int) -> str:
        """The text that can be told now that this token is known."""
        self._ids.append(token)
        text = self._untold()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._num_told :]
        self._num_told = len(self._ids)
        return text

    def finish(self) -> str:
        """What is still held back: bytes that make no character."""
        return self._untold()

    def _untold(self) -> str:
        told = self._decode(self._ids[: self._num_told])
        return self._decode(self._ids)[len(told) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


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
        self._take([Piece(self._detokenizer.add(token), place < count) for place, token in enumerate(row_tokens)])

    def end(self) -> None:
        """Tell what was held back; also called when the run was broken off."""
        self._take([Piece(self._detokenizer.finish(), False)])

    def _take(self, pieces: list[Piece]) -> None:
        told = [piece for piece in pieces if piece.text]
        self.pieces += told
        if told:
            self._show(told)
