"""What OpenAI's API asks of the scores, as processors that are functions of the prefix.

A draft is verified with the same processors on each node's own prefix, so that speculation stays exact under them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class RepetitionPenalties(LogitsProcessor):
    """Lowers the score of what the reply already says: score - presence * [count > 0] - frequency * count.

    The prompt does not count. Source: OpenAI's API reference, "frequency and presence penalties".

    Args:
        prompt_length: tokens at the beginning that are no part of the reply, padding included.
    """

    def __init__(self, *, presence: float, frequency: float, prompt_length: int):
        self._presence = presence
        self._frequency = frequency
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts
