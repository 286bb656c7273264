"""The committed tokens of the rows that are still being decoded."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.decoding.earlier import EarlierTexts
from trees.uploads import upload


class Sequences:
    """Tokens on the device (padding included, as processors expect them) and on the host (without padding).

    Args:
        input_ids: int64 [B, P] prompts.
        attention_mask: [B, P], 0 where a prompt token is padding; None if none is.
        capacity: largest length that a row can reach.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, capacity: int):
        num_rows, prompt_length = input_ids.shape
        self.num_all_rows = num_rows
        """Rows that there have ever been."""
        self.rows = list(range(num_rows))
        """Number of every row: its index in the caller's batch; rows that join are numbered on."""
        self.lengths = [prompt_length] * num_rows
        self.prompt_lengths = [prompt_length] * num_rows
        self._ids_BL = input_ids.new_zeros((num_rows, max(capacity, prompt_length)))
        self._ids_BL[:, :prompt_length] = input_ids
        real_BP = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real_BP = real_BP[:, real_BP.shape[1] - prompt_length :].bool()
        self.tokens = [ids[real].tolist() for ids, real in zip(input_ids, real_BP, strict=True)]
        """Real tokens of every row, prompt and output."""
        self.earlier: list[EarlierTexts | None] = [None] * num_rows
        """Other texts that every row's next tokens may be copied from."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self._ids_BL.device

    @property
    def num_new(self) -> list[int]:
        """Generated tokens of every row."""
        return [length - prompt for length, prompt in zip(self.lengths, self.prompt_lengths, strict=True)]

    @property
    def roots_B1(self) -> Tensor:
        """int64 the last committed token of every row."""
        return upload([tokens[-1] for tokens in self.tokens], self.device).view(-1, 1)

    def prefix(self, row: int, length: int | None = None) -> Tensor:
        """int64 view of a row's first `length` tokens, padding included (all committed ones by default)."""
        return self._ids_BL[row, : self.lengths[row] if length is None else length]

    def in_one(self, skipped: Sequence[int] | None = None) -> Tensor:
        """int64 [B, L]: all rows, each filled up with its own last token. Not to be written to.

        Args:
            skipped: first tokens of every row of the caller's batch in whose places that one stands too.
        """
        longest, last = max(self.lengths), [tokens[-1] for tokens in self.tokens]
        starts = [0 if skipped is None else skipped[row] for row in self.rows]
        if not any(starts) and min(self.lengths) == longest:
            return self._ids_BL[:, :longest]
        starts_B1, stops_B1, last_B1 = upload([starts, self.lengths, last], self.device).unsqueeze(2)
        places_L = torch.arange(longest, device=self.device)
        is_own_BL = (places_L >= starts_B1) & (places_L < stops_B1)
        return torch.where(is_own_BL, self._ids_BL[:, :longest], last_B1)

    def join(self, tokens: Sequence[int], earlier: EarlierTexts | None = None) -> int:
        """A row more, at the end.

        Args:
            tokens: its prompt, without padding.
            earlier: see the attribute.

        Returns:
            Its number (see `rows`).
        """
        number, self.num_all_rows = self.num_all_rows, self.num_all_rows + 1
        for column, value in (
            (self.rows, number),
            (self.lengths, 0),
            (self.prompt_lengths, len(tokens)),
        ):
            column.append(value)
        self.tokens.append([])
        self.earlier.append(earlier)
        self._ids_BL = torch.nn.functional.pad(self._ids_BL, (0, 0, 0, 1))
        self.put(len(self) - 1, tokens)
        self.commit(len(self) - 1, tokens)
        return number

    def copy(self) -> Sequences:
        """The same tokens, to go on with separately."""
        other = copy.copy(self)
        other.rows, other.lengths, other.prompt_lengths = [*self.rows], [*self.lengths], [*self.prompt_lengths]
        other.earlier = [*self.earlier]
        other.tokens, other._ids_BL = [[*tokens] for tokens in self.tokens], self._ids_BL.clone()
        return other

    def row_subset(self, rows: Sequence[int]) -> Sequences:
        """Some of the rows, still numbered as they are; it holds until the next change."""
        view = copy.copy(self)
        view.select_rows(rows)
        return view

    def single_row(self, row: int) -> Sequences:
        """A view of one row, as the only one of a batch; it holds until the next change."""
        view = copy.copy(self)
        view.num_all_rows, view.rows = 1, [0]
        view.lengths, view.prompt_lengths = [self.lengths[row]], [self.prompt_lengths[row]]
        view.earlier = [self.earlier[row]]
        view.tokens, view._ids_BL = [self.tokens[row]], self._ids_BL[row : row + 1]
        return view

    def put(self, row: int, tokens: Sequence[int]) -> None:
        """Write candidates after a row's committed tokens, without committing them."""
        start = self.lengths[row]
        self._reserve(start + len(tokens))
        self._ids_BL[row, start : start + len(tokens)] = upload(list(tokens), self.device)

    def put_all(self, candidates: Sequence[Sequence[int]]) -> None:
        """`put` for every row, in one copy."""
        if self.device.type == "cpu":  # numpy takes a tenth of what an index of tensors does
            self._reserve(max(length + len(tokens) for length, tokens in zip(self.lengths, candidates, strict=True)))
            ids_BL = self._ids_BL.numpy()
            for row, (length, tokens) in enumerate(zip(self.lengths, candidates, strict=True)):
                ids_BL[row, length : length + len(tokens)] = tokens
            return
        rows = enumerate(zip(self.lengths, candidates, strict=True))
        places = [(row, slot, token) for row, (start, tokens) in rows for slot, token in enumerate(tokens, start)]
        self._reserve(max(slot for _, slot, _ in places) + 1)
        rows_N, slots_N, tokens_N = upload(places, self.device).unbind(1)
        self._ids_BL[rows_N, slots_N] = tokens_N

    def _reserve(self, length: int) -> None:
        if length > self._ids_BL.shape[1]:
            self._ids_BL = torch.nn.functional.pad(self._ids_BL, (0, length))

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """Commit the first of the candidates written by `put`."""
        self.lengths[row] += len(tokens)
        self.tokens[row].extend(tokens)

    def retract(self, row: int, count: int) -> None:
        """Take back a row's last `count` tokens, of those that were generated."""
        if count:
            self.lengths[row] -= count
            del self.tokens[row][-count:]

    def replace(self, row: int, tokens: Sequence[int]) -> int:
        """Make these a row's tokens; returns how many of those that stand there stay."""
        shared = num_shared(self.tokens[row], tokens)
        self.retract(row, len(self.tokens[row]) - shared)
        self.put(row, tokens[shared:])
        self.commit(row, tokens[shared:])
        return shared

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.rows, self.lengths, self.prompt_lengths = (
            [column[row] for row in rows] for column in (self.rows, self.lengths, self.prompt_lengths)
        )
        self.tokens = [self.tokens[row] for row in rows]
        self.earlier = [self.earlier[row] for row in rows]
        self._ids_BL = self._ids_BL.index_select(0, upload(list(rows), self.device))


def num_shared(mine: Sequence[int], text: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    shortest = min(len(mine), len(text))
    if mine[:shortest] == text[:shortest]:  # compared at once, if both are lists
        return shortest
    return next((index for index in range(shortest) if mine[index] != text[index]), shortest)
