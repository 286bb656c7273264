"""Tokens become text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

_NOTHING: Mapping[int, str] = {}
_UNFINISHED = "\ufffd"
"""What a decoder makes of the first bytes of a character."""


class Detokenizer:
    """Turns tokens into text one at a time; the parts put together are the text of all.

    A token is decoded with the one before it (some decoders drop a leading space), and held back until its
    characters are whole.

    Args:
        shown: special tokens that are a part of the text, with what they look like; others are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: Mapping[int, str] = _NOTHING):
        self._tokenizer = tokenizer
        self._shown = shown
        self._ids: list[int] = []
        """The tokens told last, and those that are held back."""
        self._num_told = 0

    def add(self, token: int) -> str:
        """The text that can be told now that this token is known."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._num_told :]
        self._num_told = len(self._ids)
        return text

    def finish(self) -> str:
        """What is still held back: bytes that make no character."""
        return self._new_text()

    def _new_text(self) -> str:
        told = self._decode(self._ids[: self._num_told])
        return self._decode(self._ids)[len(told) :]

    def _decode(self, ids: list[int]) -> str:
        for place, token in enumerate(ids):
            if token in self._shown:
                return self._decode(ids[:place]) + self._shown[token] + self._decode(ids[place + 1 :])
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class TextStream:
    """The text of a reply as it comes, without the stop string that ends it.

    What may become a stop string is held back, so nothing that was told is ever taken back. A stop string counts
    once it is complete; if one token completes several, the text is cut where the first of them starts.

    Args:
        stop: none of them empty.
        shown: as of `Detokenizer`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), shown: Mapping[int, str] = _NOTHING
    ):
        self._detokenizer = Detokenizer(tokenizer, shown)
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False
        """Whether a stop string is complete: the text has ended."""

    @property
    def num_held(self) -> int:
        """Characters that are held back because they may begin a stop string."""
        return len(self._held)

    def add(self, token: int) -> str:
        """The text that can be told now that this token is known."""
        return self._take(self._detokenizer.add(token))

    def finish(self) -> str:
        """What is still held back, once no token comes any more."""
        told = self._take(self._detokenizer.finish())
        held, self._held = self._held, ""
        return told if self.is_stopped else told + held

    def _take(self, text: str) -> str:
        if self.is_stopped or not text:
            return ""
        self._held += text
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        self.is_stopped = bool(found)
        count = min(found) if found else len(self._held) - self._num_suspect()
        told, self._held = self._held[:count], self._held[count:]
        return told

    def _num_suspect(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class StopAtText(StoppingCriteria):
    """Stops a row with the token that completes a stop string, as `TextStream` sees it.

    A function of the tokens alone; the text of the prefix seen last is kept, because the next one mostly continues it.

    Args:
        prompt_length: tokens at the beginning that are no part of the text, padding included.
        shown: as of `Detokenizer`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        prompt_length: int,
        shown: Mapping[int, str] = _NOTHING,
    ):
        self._tokenizer = tokenizer
        self._shown = shown
        self._stop = tuple(stop)
        self._prompt_length = prompt_length
        self._ids: list[int] = []
        self._text = TextStream(tokenizer, self._stop, shown)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        verdicts = [self._is_stopped(ids) for ids in input_ids[:, self._prompt_length :].tolist()]
        return torch.tensor(verdicts, dtype=torch.bool, device=input_ids.device)

    def _is_stopped(self, ids: list[int]) -> bool:
        if ids[: len(self._ids)] != self._ids:
            self._ids, self._text = [], TextStream(self._tokenizer, self._stop, self._shown)
        for token in ids[len(self._ids) :]:
            self._text.add(token)
        self._ids = ids
        return self._text.is_stopped
