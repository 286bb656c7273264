"""What a reply is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from specdec.decoding.stats import DecodingStats


class Piece(NamedTuple):
    """The text that a token adds, and whether the token was drafted and accepted."""

    text: str
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was said, and what it took.

    Args:
        stats: None if the run was broken off.
        num_read: tokens of the prompt that had to be read.
        num_kept: tokens of the prompt whose states were kept from the turns before.
        num_forgotten: messages that no longer fit into the context and were dropped.
        stopped: on request, before its end.
        cut: ended at the limit of new tokens.
    """

    pieces: tuple[Piece, ...]
    stats: DecodingStats | None
    num_read: int
    num_kept: int
    num_forgotten: int
    stopped: bool
    cut: bool

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)
