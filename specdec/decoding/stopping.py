"""Where each row stops: the stopping criteria, applied to every committed token in order.

End-of-sequence tokens and the length limit are looked up on the host. Any other criterion is called the way plain
decoding calls it: on the whole batch, every row at its own index, one prefix length a call. Rows that have no prefix
of that length (they are ahead, behind or finished) are filled with another row's, and their verdict is ignored.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from specdec.decoding.sequences import Sequences

Scores = tuple[Tensor, ...] | None


class StopChecker:
    """Finds the token at which plain decoding would have stopped.

    Args:
        criteria: as `model.generate()` has prepared them.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_length = min(limits, default=sys.maxsize)
        self._eos = {int(token) for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.flatten()}
        self.has_eos = any(hasattr(c, "eos_token_id") for c in criteria)
        self._others = StoppingCriteriaList(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens with which a text ends."""
        return self._eos

    @property
    def calls_criteria(self) -> bool:
        """Whether more is asked than a token and a length."""
        return bool(self._others)

    @property
    def stops_rows_apart(self) -> bool:
        """Whether rows of a batch can stop at different lengths."""
        return bool(self._eos or self._others)

    def limits(self, sequences: Sequences) -> list[int]:
        """The length at which each row stops at the latest."""
        return [self.max_length] * len(sequences)

    def stops_early(self, sequences: Sequences) -> bool:
        """Whether the only row of these, which has stopped, has done so for another reason than its length."""
        if sequences.tokens[0][-1] in self._eos:
            return True
        return bool(self._others) and bool(self._others(sequences.prefix(0).unsqueeze(0), None).all())

    def cut(
        self, sequences: Sequences, candidates: Sequence[Sequence[int]], scores_of: Callable[[int], Scores]
    ) -> tuple[list[int], list[bool]]:
        """How many of the candidates each row keeps, and whether it stops with the last of them.

        Args:
            sequences: with the candidates already `put` behind the committed tokens.
            candidates: for each row its new tokens, at least one.
            scores_of: the recorded scores of the first so many new tokens, None if they are not recorded.
        """
        counts, stopped = [], []
        for row, tokens in enumerate(candidates):
            count, stops = self.cut_by_token(sequences.lengths[row], tokens)
            counts.append(count)
            stopped.append(stops)
        if self._others:
            self._cut_by_call(sequences, counts, stopped, scores_of)
        return counts, stopped

    def cut_by_token(self, length: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """What `cut` finds for a row of this length, where no criterion has to be called."""
        for count, token in enumerate(tokens, start=1):
            if token in self._eos or length + count >= self.max_length:
                return count, True
        return len(tokens), False

    def _cut_by_call(
        self,
        sequences: Sequences,
        counts: list[int],
        stopped: list[bool],
        scores_of: Callable[[int], Scores],
    ) -> None:
        rows_of_length = defaultdict(list)
        for row, (length, count) in enumerate(zip(sequences.lengths, counts, strict=True)):
            for new_length in range(length + 1, length + count + 1):
                rows_of_length[new_length].append(row)
        done: set[int] = set()
        for length, rows in sorted(rows_of_length.items()):
            rows = [row for row in rows if row not in done]
            if not rows:
                continue
            input_ids = sequences.prefix(rows[0], length).repeat(sequences.num_all_rows, 1)
            for row in rows:
                input_ids[sequences.rows[row]] = sequences.prefix(row, length)
            verdicts = self._others(input_ids, scores_of(length - sequences.prompt_lengths[rows[0]])).tolist()
            for row in rows:
                if verdicts[sequences.rows[row]]:
                    done.add(row)
                    counts[row], stopped[row] = length - sequences.lengths[row], True
