"""The capacity model: its memory is what the cache takes, its arithmetic is what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specdec.control.capacity import Capacity, RowTimer, best_rows, measure_rows, slot_bytes, weight_bytes
from specdec.testing import FAMILIES, tiny_model
from specdec.tree_model.model import TreeModel


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_of_a_slot(family: str, dtype: torch.dtype) -> None:
    """Those that the cache holds for one more token of one row."""
    # configurations of these name no key-value heads, and tiny ones are given some that the models do not look at
    named = {"num_key_value_heads": 4} if family in ("gpt2", "gpt_neox", "opt") else {}
    model = tiny_model(family, dtype=dtype, **named)
    target = TreeModel(model)
    target.prefill(torch.zeros((2, 5), dtype=torch.long))
    held = sum(
        layer.keys[0, :, 0].numel() * layer.keys.element_size()
        + layer.values[0, :, 0].numel() * layer.values.element_size()
        for layer in target.cache.layers
    )
    assert slot_bytes(model.config, dtype) == held


def test_the_bytes_of_the_weights() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    untied = tiny_model("llama")
    assert weight_bytes(untied) - weight_bytes(tied) == untied.lm_head.weight.numel() * 4


def test_rows_and_tokens_per_second() -> None:
    capacity = Capacity(slot_bytes=1000, kv_bytes=30_000_000, row_seconds={1: 0.1, 2: 0.1, 4: 0.2, 8: 0.4})
    assert capacity.most_rows(1000) == 20
    assert capacity.tokens_per_second(1) == pytest.approx(10)
    assert capacity.tokens_per_second(2) == pytest.approx(20)
    assert capacity.tokens_per_second(8) == pytest.approx(20)
    assert capacity.tokens_per_second(2, num_committed=1.5) == pytest.approx(30)


def test_a_job_on_many_machines() -> None:
    capacity = Capacity(slot_bytes=1000, kv_bytes=10**9, row_seconds={1: 0.1, 2: 0.1})
    one = capacity.job_seconds(1000, num_rows=2)
    assert one == pytest.approx(50)
    assert capacity.job_seconds(1000, num_rows=2, num_machines=1000, start_seconds=7) == pytest.approx(7.05)


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [
        (lambda rows: 1.0, 64, 64),
        (lambda rows: 1.0, 24, 24),
        (lambda rows: float(rows), 64, 1),
        (lambda rows: max(1.0, rows / 8), 64, 8),
        (lambda rows: 1.0 + 0.5 * rows, 64, 32),
    ],
)
def test_the_best_number_of_rows(seconds: Callable[[int], float], most: int, expected: int) -> None:
    asked: list[int] = []

    def measured(rows: int) -> float:
        asked.append(rows)
        return seconds(rows)

    assert best_rows(measured, most=most) == expected
    assert asked == sorted(asked)
    assert asked[-1] <= 2 * expected, "more was measured than it took"


def test_rows_are_timed_as_the_engine_runs_them() -> None:
    """As many rows as asked for, each with as many tokens, and nothing of it is left in the model."""
    model = tiny_model("llama")
    shapes: list[tuple[int, int]] = []
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    seconds = measure_rows(model, most=4, length=20)
    hook.remove()
    assert list(seconds) == [1, 2, 4]
    assert all(value > 0 for value in seconds.values())
    assert shapes == [(1, 20), *[(1, 1)] * 3, *[(2, 1)] * 3, *[(4, 1)] * 3]
    timer = RowTimer(tiny_model("llama", max_position_embeddings=16))
    timer.seconds(3)
    assert timer._scratch.cache.lengths == [15, 14, 15]
