"""What a run did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from transformers.generation import GenerateDecoderOnlyOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of a routed run.

    Args:
        row: of the caller's batch.
        writer: "draft" or "target".
        score: what the router decided on; None if it did not need one.
        reason: of a decision that was not by score.
        num_tokens: of the step.
        num_discarded: tokens written in vain: of a rejected draft those that the target did not take over.
        seconds: wall time; rows of a batch go through it together.
    """

    row: int
    writer: str
    score: float | None
    reason: str
    num_tokens: int
    num_discarded: int
    seconds: float


_BARS = "▁▂▃▄▅▆▇█"
_TOLD_SECONDS = 0.05
"""Less one-off work is not worth a word."""


@dataclass(kw_only=True, repr=False)
class DecodingStats:
    """Counts and times of one `generate()` call.

    The prefill yields the first token of every row; rounds yield the others. `num_rounds`, `num_drafted` and the
    like count *row rounds* (a round of a batch of 4 unfinished rows counts 4), so that ratios mean the same at
    every batch size; `num_batch_rounds`, `target_forwards` and `draft_forwards` count work on the whole batch.
    `other_seconds` is the run without prefill, drafting and verification: sampling, stopping, streaming and
    book-keeping. In a routed run rounds are the target's; `draft_seconds` is all the time of the draft, whether its
    steps were kept or not, and reading the prompts is part of each model's time.
    """

    num_rounds: int = 0
    num_batch_rounds: int = 0
    num_drafted: int = 0
    """Nodes verified (the root is not drafted)."""
    num_levels: int = 0
    """Depths of the trees verified, added up: on a chain each node is a level, on a tree siblings share one."""
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
    target_requests: int = 0
    """Of a routed run: requests to the target's endpoint, if it has one; its forwards are not known."""
    draft_requests: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0
    total_seconds: float = 0.0
    setup_seconds: float = 0.0
    """Spent on what later calls find done: forwards timed, an int8 copy made, kernels built; a part of
    `total_seconds`."""
    ttft_seconds: float = 0.0
    """Time to the first token."""
    control_seconds: float = 0.0
    """Spent on comparing candidates that did not draft, a part of `other_seconds`."""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """For every round of a drafter that chooses: what it chose and why, and the nodes and tokens of each row."""
    steps: list[StepRecord] = field(default_factory=list)
    """Of a routed run: its steps, in the order of commitment."""
    router_seconds: float = 0.0
    """Spent on decisions, without what the target was asked to do for them; a part of `other_seconds`."""
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
    def is_lossy(self) -> bool:
        """Whether a router has kept steps of the draft: they are not the target's."""
        return any(step.writer == "draft" for step in self.steps)

    @property
    def escalation_rate(self) -> float:
        """Steps that the target wrote, over all steps of a routed run."""
        return sum(step.writer == "target" for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def mean_size(self) -> float:
        """Nodes of a row's tree; a round without a draft counts as an empty tree."""
        return self.num_drafted / self.num_rounds if self.num_rounds else 0.0

    @property
    def mean_depth(self) -> float:
        """Depth of a row's tree; a round without a draft counts as depth 0."""
        return self.num_levels / self.num_rounds if self.num_rounds else 0.0

    @property
    def draft_forwards_per_round(self) -> float:
        """Forwards of the draft model, its prefill included, to one verification of the batch."""
        return self.draft_forwards / self.num_batch_rounds if self.num_batch_rounds else 0.0

    @property
    def tokens_per_target_forward(self) -> float:
        """New tokens of all rows to one forward of the target, prefill included; plain decoding of a row: 1.0."""
        return self.num_new_tokens / self.target_forwards if self.target_forwards else 0.0

    @property
    def decoding_seconds(self) -> float:
        """The whole time, prefill included, without what is done only once."""
        return self.total_seconds - self.setup_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens over `decoding_seconds`."""
        return self.num_new_tokens / self.decoding_seconds if self.decoding_seconds > 0 else 0.0

    @property
    def estimated_speedup(self) -> float | None:
        """Over plain decoding, prefill left out: what a drafter that chooses (`Auto`) expects of plain rounds, against
        the rounds as they were. None: there is no such estimate."""
        rounds = [choice for choice in self.trace if "plain_ms" in choice and choice.get("committed")]
        spent = sum(choice["ms"] for choice in rounds)
        plain = sum(choice["plain_ms"] * sum(choice["committed"]) / len(choice["committed"]) for choice in rounds)
        return plain / spent if spent > 0 else None

    def record_round(
        self,
        rows: Sequence[int],
        drafted: Sequence[int],
        depths: Sequence[int],
        accepted: Sequence[int],
        committed: Sequence[int],
    ) -> None:
        """Count one round of a batch.

        Args:
            rows: index of each row in the caller's batch; the other arguments are in the same order.
            depths: of the trees of `drafted` nodes.
        """
        self.num_rounds += len(rows)
        self.num_batch_rounds += 1
        self.num_drafted += sum(drafted)
        self.num_levels += sum(depths)
        self.num_accepted += sum(accepted)
        self.num_committed += sum(committed)
        self.accepted_histogram.update(accepted)
        for row, count in zip(rows, committed, strict=True):
            self.row_rounds[row] += 1
            self.row_committed[row] += count

    def record_tokens(self, count: int, seconds: float) -> None:
        """Count tokens that were committed this long after the start."""
        if not self.token_seconds:
            self.ttft_seconds = seconds
        self.num_new_tokens += count
        self.token_seconds.extend([seconds] * count)

    def finish(self, total_seconds: float, setup_seconds: float = 0.0) -> None:
        """Settle what only the end tells."""
        self.total_seconds, self.setup_seconds = total_seconds, setup_seconds
        known = self.prefill_seconds + self.draft_seconds + self.verify_seconds
        self.other_seconds = total_seconds - known

    def __str__(self) -> str:
        further = f"; {self.escalation_rate:.0%} of {len(self.steps)} steps by the target" if self.steps else ""
        further += " (lossy)" if self.is_lossy else ""
        if (speedup := self.estimated_speedup) is not None:
            further += f"; about {speedup:.1f}x plain decoding (estimated)"
        if self.setup_seconds >= _TOLD_SECONDS:
            further += f"; one-off setup {self.setup_seconds:.2f} s"
        return (
            f"{self.num_new_tokens} tokens in {self.decoding_seconds:.2f} s "
            f"({self.tokens_per_second:.1f} tokens/s): {self.tokens_per_round:.2f} tokens per round, "
            f"{self.num_accepted}/{self.num_drafted} drafted tokens accepted ({self.acceptance_rate:.0%}){further}"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: a small table."""
        rows = {
            "tokens": f"{self.num_new_tokens} in {self.decoding_seconds:.2f} s",
            "tokens/s": f"{self.tokens_per_second:.1f}",
            "tokens per round": f"{self.tokens_per_round:.2f}",
            "drafted tokens accepted": f"{self.num_accepted} of {self.num_drafted} ({self.acceptance_rate:.0%})",
            "over plain decoding (estimated)": "-"
            if self.estimated_speedup is None
            else f"{self.estimated_speedup:.1f}x",
            "first token after": f"{self.ttft_seconds:.2f} s",
            "one-off setup": f"{self.setup_seconds:.2f} s",
            "accepted in a round": _histogram(self.accepted_histogram),
        }
        cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(cells)}</table>"


def _histogram(counts: Counter[int]) -> str:
    """Bars from no accepted token on."""
    most = max(counts.values(), default=0)
    if not most:
        return "-"
    return "".join(_BARS[round((len(_BARS) - 1) * counts[number] / most)] for number in range(max(counts) + 1))


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `model.generate(return_dict_in_generate=True)` returns, and `stats`."""

    stats: DecodingStats | None = None
