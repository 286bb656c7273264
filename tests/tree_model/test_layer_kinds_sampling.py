"""Sampled output has the target's processed distribution for every kind of layer, by chains and trees.

Thousands of rows are decoded in one batch, and what they drew is compared with the enumerated distribution
(`tests/support/sampled_rows.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specdec.drafters import Drafter, SmallModel
from specdec.testing import ScriptedDrafter, tiny_model
from tests.support.families import CHUNKED, INDEXED, UNLISTED
from tests.support.recurrent_models import RECURRENT
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact, draw_fork
from trees import DySpec

KINDS: dict[str, dict[str, Any]] = {
    "lfm2": RECURRENT["lfm2"],
    "mamba2": RECURRENT["mamba2"],
    "deepseek_v32": {**INDEXED, "index_topk": 2},
    "llama4_text": {**CHUNKED, "attention_chunk_size": 3},
    "gemma3n_text": {**UNLISTED["gemma3n_text"], "sliding_window": 3, "vocab_size_per_layer_input": VOCAB_SIZE},
}
"""A convolution, a recurrence, attention to what an indexer selects and in chunks, and keys shared between layers: what
they see ends within the few tokens that are enumerated."""


def tiny(family: str, seed: int) -> PreTrainedModel:
    settings = {"vocab_size": VOCAB_SIZE, "seed": seed, "initializer_range": 0.5}
    return tiny_model(family, **{**KINDS[family], **settings})


def drafter(name: str, family: str) -> tuple[Drafter, dict[str, Any]]:
    q_V = torch.tensor([0.3, 0.05, 0.1, 0.2, 0.05, 0.3])
    return {
        "chain": (SmallModel(tiny(family, seed=2), num_tokens=2), {}),
        "grown tree": (SmallModel(tiny(family, seed=2)), {"tree": DySpec(4), "verify": "traversal"}),
        "drawn tree": (ScriptedDrafter(lambda sequences: draw_fork(sequences, q_V), q=q_V), {}),
    }[name]


@pytest.mark.rotated
@pytest.mark.parametrize("name", ["chain", "grown tree", "drawn tree"])
@pytest.mark.parametrize("family", KINDS)
def test_samples_follow_the_processed_distribution(family: str, name: str) -> None:
    draft, options = drafter(name, family)
    assert_ragged_rows_are_exact(tiny(family, seed=1), draft, **options)
