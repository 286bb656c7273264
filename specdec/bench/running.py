"""One timed call: what is noted of it, and who makes it."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import specdec
from routers import Router
from specdec.drafters import Drafter
from trees import GrowthPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCounts:
    """The part of `DecodingStats` that can be learnt about a peer, under the same names; None: it does not tell."""

    num_new_tokens: int
    num_rounds: int | None = None
    num_committed: int | None = None
    num_accepted: int | None = None
    num_drafted: int | None = None
    target_forwards: int | None = None
    accepted_histogram: dict[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed call on one batch.

    `tokens` are each row's new tokens, the end-of-sequence token among them (none where a peer gives only `text`);
    `token_seconds` holds for every new token, in ascending order, when it was there, counted from the start of the
    call. `stats` are those of `specdec.generate`, `peer_counts` what is known of anyone else.
    """

    seconds: float
    tokens: list[list[int]]
    token_seconds: list[float]
    stats: "specdec.DecodingStats | None" = None
    peer_counts: PeerCounts | None = None
    text: str | None = None
    peak_memory_mib: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_seconds)

    @property
    def counts(self) -> "specdec.DecodingStats | PeerCounts | None":
        return self.peer_counts if self.stats is None else self.stats


class Peer(ABC):
    """A way of decoding that is not specdec's. It may fail or lack something: it is then reported as not available.

    `family`: whose it is. Where a family `has_own_weights`, what it says is compared with its own first method instead
    of the reference. `settle_seconds`: how long everyone waits before a call, because its idle workers spin on.
    """

    family: ClassVar[str]
    has_own_weights: ClassVar[bool] = False
    settle_seconds: ClassVar[float] = 0.0

    def lacks(self, *, batch_size: int, sample: bool) -> str | None:
        """Why it cannot take part; None if it can."""
        return None

    @abstractmethod
    def decode(self, inputs: BatchEncoding, generation_kwargs: dict[str, Any]) -> Run:
        """Decode a left-padded batch with the options of `model.generate()`."""


def decode(
    model: PreTrainedModel,
    inputs: BatchEncoding,
    generation_kwargs: dict[str, Any],
    *,
    drafter: Drafter | str,
    tree: GrowthPolicy | None,
    verify: str,
    router: Router | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Run:
    """`specdec.generate`, timed; a router needs the tokenizer."""
    routed: dict[str, Any] = {} if router is None else {"router": router, "tokenizer": tokenizer}
    start = time.perf_counter()
    out = specdec.generate(
        model,
        **inputs,
        **generation_kwargs,
        drafter=drafter,
        tree=tree,
        verify=verify,
        **routed,
        return_dict_in_generate=True,
    )
    assert isinstance(out, specdec.SpeculativeOutput)
    assert out.stats is not None
    new_ids = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    return Run(
        seconds=seconds,
        tokens=trim(model, new_ids),
        token_seconds=out.stats.token_seconds,
        stats=out.stats,
    )


class StepClock(BaseStreamer):
    """Stamps every step of transformers' own loops, which put the prompt first and then each step's tokens."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stamps: list[float] = []
        self._sizes: list[int] = []

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def put(self, value: torch.Tensor) -> None:
        self._stamps.append(self.seconds())
        self._sizes.append(value.shape[-1] if value.dim() == 2 else 1)

    def end(self) -> None:
        pass

    @property
    def step_sizes(self) -> list[int]:
        """Tokens of a row in each step."""
        return self._sizes[1:]

    def token_seconds(self, tokens: list[list[int]]) -> list[float]:
        stamps = [stamp for stamp, size in zip(self._stamps[1:], self.step_sizes, strict=True) for _ in range(size)]
        return sorted(stamps[index] for row in tokens for index in range(len(row)))


def trim(model: PreTrainedModel, new_ids: list[list[int]]) -> list[list[int]]:
    """Each row of `generate()`'s output without what only fills it up."""
    return [without_padding(row, eos_ids(model), pad_id(model)) for row in new_ids]


def without_padding(row: list[int], eos_ids: list[int], pad_id: int | None) -> list[int]:
    """The row up to and including its first end-of-sequence token, if nothing but padding follows it.

    Anything else after that token is a decoding error, which stays visible to the comparison.
    """
    end = next((index + 1 for index, token in enumerate(row) if token in eos_ids), len(row))
    return row[:end] if all(token == pad_id for token in row[end:]) else row


def eos_ids(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def pad_id(model: PreTrainedModel) -> int | None:
    """What `generate()` fills finished rows with."""
    pad = model.generation_config.pad_token_id
    return next(iter(eos_ids(model)), None) if pad is None else pad
