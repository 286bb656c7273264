"""What a run did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DecodingStats:
    """Counts and times of one `generate()` call.

    The prefill yields the first token of every row; rounds yield the others. `num_rounds`, `num_drafted` and the
    like count *row rounds* (a round of a batch of 4 unfinished rows counts 4), so that ratios mean the same at
    every batch size; `target_forwards` counts forwards of the whole batch. `other_seconds` is the run without
    prefill, drafting and verification: sampling, stopping, streaming and book-keeping.
    """

    num_rounds: int = 0
    num_drafted: int = 0
    """Nodes verified (the root is not drafted)."""
    num_accepted: int = 0
    """Drafted tokens kept."""
    num_committed: int = 0
    """Tokens committed by rounds: accepted, and the bonus or the correction."""
    num_new_tokens: int = 0
    """Tokens generated in all, the prefill's included."""
    accepted_histogram: Counter[int] = field(default_factory=Counter)
    """accepted tokens in a round -> number of rounds."""
    row_rounds: list[int] = field(default_factory=list)
    """Rounds of each row of the batch."""
    row_committed: list[int] = field(default_factory=list)
    """Tokens committed by rounds, for each row of the batch."""
    target_forwards: int = 0
    draft_forwards: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    total_seconds: float = 0.0
    ttft_seconds: float = 0.0
    """Time to the first token."""
    token_seconds: list[float] = field(default_factory=list)
    """For every token in the order of commitment the time since the start."""

    @classmethod
    def for_rows(cls, num_rows: int) -> DecodingStats:
        """Empty statistics of a batch."""
        return cls(row_rounds=[0] * num_rows, row_committed=[0] * num_rows)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens in a round of a row, the bonus included; 1.0 is plain decoding."""
        return self.num_committed / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time, prefill included."""
        return self.num_new_tokens / self.total_seconds if self.total_seconds else 0.0

    def note_round(
        self,
        rows: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
        committed: Sequence[int],
    ) -> None:
        """Count one round of a batch.

        Args:
            rows: index of each row in the caller's batch; the other arguments are in the same order.
        """
        self.num_rounds += len(rows)
        self.num_drafted += sum(drafted)
        self.num_accepted += sum(accepted)
        self.num_committed += sum(committed)
        self.accepted_histogram.update(accepted)
        for row, count in zip(rows, committed, strict=True):
            self.row_rounds[row] += 1
            self.row_committed[row] += count

    def note_tokens(self, count: int, seconds: float) -> None:
        """Count tokens that were committed this long after the start."""
        if not self.token_seconds:
            self.ttft_seconds = seconds
        self.num_new_tokens += count
        self.token_seconds.extend([seconds] * count)

    def finish(self, total_seconds: float) -> None:
        """Settle what only the end tells."""
        self.total_seconds = total_seconds
        known = self.prefill_seconds + self.draft_seconds + self.verify_seconds
        self.other_seconds = total_seconds - known

    def __str__(self) -> str:
        return (
            f"{self.num_new_tokens} tokens in {self.total_seconds:.2f} s "
            f"({self.tokens_per_second:.1f} tokens/s): {self.tokens_per_round:.2f} tokens per round, "
            f"{self.num_accepted}/{self.num_drafted} drafted tokens accepted ({self.acceptance_rate:.0%})"
        )
