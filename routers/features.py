"""What is known of a drafted step without another forward, as numbers."""

from __future__ import annotations

import numpy as np

from routers.base import DraftedStep

NAMES = (
    "first entropy",
    "mean entropy",
    "highest entropy",
    "mean log p",
    "lowest log p",
    "sum log p",
    "mean margin",
    "lowest margin",
    "share of unsure tokens",
    "place of the least sure token",
    "log tokens",
    "step",
    "steps by the target",
    "last step by the target",
    "is last",
    "digits",
    "has an equation",
    "seen before",
)
"""Of the features, in order. Changing them makes trained routers unreadable: `LightRouter` compares."""

_UNSURE = 0.5
"""Margin below which a token counts as unsure."""


def features(step: DraftedStep) -> np.ndarray:
    """float32 [len(NAMES)], all finite."""
    signals, count, text = step.signals, max(1, len(step.tokens)), step.text
    log_probs, entropies, margins = (
        column if len(column) else np.zeros(1, np.float32)
        for column in (signals.log_probs, signals.entropies, signals.margins)
    )
    by_target = [writer == "target" for writer in step.writers]
    values = (
        entropies[0],
        entropies.mean(),
        entropies.max(),
        log_probs.mean(),
        log_probs.min(),
        log_probs.sum(),
        margins.mean(),
        margins.min(),
        (margins < _UNSURE).mean(),
        margins.argmin() / len(margins),
        np.log(count),
        step.index,
        np.mean(by_target) if by_target else 0.0,
        bool(by_target and by_target[-1]),
        step.is_last,
        sum(char.isdigit() for char in text) / max(1, len(text)),
        "=" in text,
        any(text.strip() == previous.strip() for previous in step.previous_texts),
    )
    return np.nan_to_num(np.array(values, np.float32), nan=0.0, posinf=50.0, neginf=-50.0)
