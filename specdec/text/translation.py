"""From the tokens of one tokenizer to those of another, by text.

A translation may be worse than another one, never wrong for the target: it only decides what is drafted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BROKEN = "\ufffd"
"""What tokenizers make of bytes that are no whole character."""

_LOOK_BACK = 16
"""Tokens of old text that are encoded again together with the new text, because they may merge with it."""
_GUARD = "\n"
"""Stands before a piece of text that is encoded on its own, so that it is not taken for the beginning of a text."""


def shared_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Ids of the tokens that mean the same bytes in both vocabularies; their ends of text are the same too."""
    ids_of = {meaning: token for token, meaning in _meanings(second).items()}
    pairs = [(token, ids_of[meaning]) for token, meaning in _meanings(first).items() if meaning in ids_of]
    ends = first.eos_token_id, second.eos_token_id
    if None not in ends and not any(ends[0] == own or ends[1] == other for own, other in pairs):
        pairs.append(ends)
    return pairs


def _meanings(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes | str]:
    """The bytes of every token; special tokens stand for themselves."""
    vocab = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    is_byte_level = tokenizer.convert_tokens_to_string(["\u0120"]) == " "
    meanings: dict[int, bytes | str] = {}
    for text, token in vocab.items():
        if token in special:
            meanings[token] = text
        elif is_byte_level:
            if all(char in byte_of for char in text):
                meanings[token] = bytes(byte_of[char] for char in text)
        elif text.startswith("<0x") and text.endswith(">") and len(text) == 6:
            meanings[token] = bytes([int(text[3:5], 16)])
        else:
            meanings[token] = text.replace("\u2581", " ").encode()
    return meanings


def decode_from(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> str:
    """The text of the ids from `start` on, as it stands in the whole text."""
    before = _decode(tokenizer, ids[max(0, start - 1) : start])
    text = _decode(tokenizer, ids[max(0, start - 1) :])
    if text.startswith(before) and not before.endswith(BROKEN):
        return text[len(before) :]
    return _decode(tokenizer, ids[start:])


def encode_inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that is not the beginning of one."""
    guard, guarded = _encode(tokenizer, _GUARD), _encode(tokenizer, _GUARD + text)
    return guarded[len(guard) :] if guarded[: len(guard)] == guard else _encode(tokenizer, text)


def continuation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Tokens that say a text after these ones; none if there are no such tokens."""
    start = max(0, len(ids) - _LOOK_BACK)
    known = decode_from(tokenizer, ids, start)
    before, after = encode_inside(tokenizer, known), encode_inside(tokenizer, known + text)
    tokens = after[len(before) :] if after[: len(before)] == before else encode_inside(tokenizer, text)
    is_faithful = decode_from(tokenizer, [*ids, *tokens], len(ids)) == text
    return tokens if is_faithful else []


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


class Translator:
    """A growing text of one tokenizer, in the tokens of another.

    Old text is encoded once: a new piece is encoded together with the last `_LOOK_BACK` tokens or a few more.
    """

    def __init__(self, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase):
        self._source = source
        self._target = target
        begins = list(target.encode(""))
        self._begin = begins if begins == [target.bos_token_id] else []
        self._borders = deque([(0, 0)])
        """Where both texts have a border between tokens: numbers of tokens of source and target."""
        self.ids: list[int] = []
        """The text in the target's tokens; it begins as the target's texts do."""

    def update(self, tokens: Sequence[int]) -> bool:
        """The whole text in the source's tokens.

        Returns:
            Whether `ids` say all of it: not while it ends within a character.
        """
        while len(self._borders) > 1 and self._borders[1][0] <= len(tokens) - _LOOK_BACK:
            self._borders.popleft()
        start, num_kept = self._borders[0]
        text = decode_from(self._source, tokens, start)
        if text.endswith(BROKEN):
            return False
        encoded = encode_inside(self._target, text) if start else [*self._begin, *_encode(self._target, text)]
        old, self.ids = self.ids, [*self.ids[:num_kept], *encoded]
        while self._borders[-1][1] and old[: self._borders[-1][1]] != self.ids[: self._borders[-1][1]]:
            self._borders.pop()  # there is no border any more: what stood on both sides has merged
        if self._borders[-1][0] < len(tokens):
            self._borders.append((len(tokens), len(self.ids)))
        return bool(self.ids)
