"""How far a speed-up can be trusted: a bootstrap over prompts and repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 0
"""The interval of the same measurements is the same interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One batch: a method beside plain, in seconds of each repetition (the same turn, the same place) and in tokens."""

    stratum: str
    seconds: Sequence[float]
    num_tokens: int
    plain_seconds: Sequence[float]
    num_plain_tokens: int


def speedup_interval(timings: Sequence[Timing]) -> tuple[float, float] | None:
    """The middle 95 % of the speed-ups that resampled measurements give; None where there is nothing to resample.

    Within each stratum (category) batches are drawn with replacement, and for each drawn batch its repetitions, those
    of both sides together because they ran in turns; a percentile interval (Efron and Tibshirani 1993, chapter 13).
    """
    if len(timings) < 2 and len(timings[0].seconds) < 2:
        return None
    generator = np.random.default_rng(_SEED)
    totals_4S = np.zeros((4, NUM_RESAMPLES))
    for stratum in dict.fromkeys(timing.stratum for timing in timings):
        totals_4S += _resample([timing for timing in timings if timing.stratum == stratum], generator)
    tokens, seconds, plain_tokens, plain_seconds = totals_4S
    ratios = (tokens / seconds) / (plain_tokens / plain_seconds)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return float(low), float(high)


def _resample(timings: Sequence[Timing], generator: np.random.Generator) -> np.ndarray:
    """[4, S]: tokens and seconds of the method and of plain, in each of the S resamples of these batches.

    B = batches, R = repetitions.
    """
    num_batches, num_repetitions = len(timings), len(timings[0].seconds)
    drawn_SB = generator.integers(num_batches, size=(NUM_RESAMPLES, num_batches))
    turns_SBR = generator.integers(num_repetitions, size=(NUM_RESAMPLES, num_batches, num_repetitions))
    seconds_BR, plain_BR = (
        np.array([getattr(timing, name) for timing in timings]) for name in ("seconds", "plain_seconds")
    )
    tokens_B, plain_tokens_B = (
        np.array([getattr(timing, name) for timing in timings]) for name in ("num_tokens", "num_plain_tokens")
    )
    return np.stack(
        [
            tokens_B[drawn_SB].sum(axis=1),
            np.median(seconds_BR[drawn_SB[:, :, None], turns_SBR], axis=2).sum(axis=1),
            plain_tokens_B[drawn_SB].sum(axis=1),
            np.median(plain_BR[drawn_SB[:, :, None], turns_SBR], axis=2).sum(axis=1),
        ]
    )
