"""The attention that graphs call: its twin against attention to the slots that are seen, its kernels against it."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from specdec.cuda import attention
from specdec.cuda.seen import Seen
from tests.support.interpreter import interpreted, run_interpreted
from tests.support.tree_attention import SHAPES, given


@pytest.mark.parametrize("name", SHAPES)
def test_the_twin(name: str) -> None:
    """Against each query alone, with the slots that it sees and no others."""
    inputs = given(name)
    output_BWQD = attention.tree_attention(**inputs)
    group = inputs["queries_BQWD"].shape[1] // inputs["keys_BHSD"].shape[1]
    seen = inputs["seen"]
    for row, length in enumerate(seen.lengths_B.tolist()):
        for slot, (first, bits) in enumerate(
            zip(seen.firsts_BW[row].tolist(), seen.bits_BW[row].tolist(), strict=True)
        ):
            slots = [*range(first, length), *(length + place for place in range(64) if bits >> place & 1)]
            for head in range(inputs["queries_BQWD"].shape[1]):
                keys, values = (inputs[part][row, head // group, slots] for part in ("keys_BHSD", "values_BHSD"))
                weights = (keys @ inputs["queries_BQWD"][row, head, slot] * inputs["scale"]).softmax(0)
                torch.testing.assert_close(output_BWQD[row, slot, head], weights @ values)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    """The tests below, in a minute."""
    run_interpreted(__file__)


@pytest.fixture
def kernels() -> ModuleType:
    return importlib.import_module("specdec.cuda.kernels")


# the interpreter multiplies no bfloat16
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels(name: str, dtype: torch.dtype, kernels: ModuleType) -> None:
    inputs = given(name, dtype)
    bound = {torch.float32: 2e-6, torch.float16: 4e-3}[dtype]
    expected = attention.reference(**inputs)
    torch.testing.assert_close(kernels.tree_attention(**inputs), expected, rtol=bound, atol=bound)


@interpreted
def test_nothing_but_what_a_query_sees_changes_its_bits(kernels: ModuleType) -> None:
    """Neither a row beside it, nor the bound of a graph, nor what lies in slots that it does not see."""
    inputs = given("ragged")
    output_BWQD = kernels.tree_attention(**inputs)
    one = {name: part[1:2] if isinstance(part, Tensor) else part for name, part in inputs.items()}
    one["seen"] = Seen(*(part[1:2] for part in inputs["seen"]))
    assert torch.equal(kernels.tree_attention(**{**one, "num_slots": 512}), output_BWQD[1:2])
    for part in ("keys_BHSD", "values_BHSD"):
        inputs[part][0, :, 255 + 64 :] = torch.nan
        inputs[part][1, :, : int(inputs["seen"].firsts_BW[1].min())] = torch.nan
    again_BWQD = kernels.tree_attention(**inputs)
    assert torch.equal(again_BWQD, output_BWQD)


@interpreted
def test_a_query_alone_has_the_same_bits_as_among_others(kernels: ModuleType) -> None:
    inputs = given("odd head")
    output_BWQD = kernels.tree_attention(**inputs)
    firsts_BW, lengths_B, bits_BW = inputs["seen"]
    alone = Seen(firsts_BW[:, 1:2], lengths_B, bits_BW[:, 1:2])
    few = {**inputs, "queries_BQWD": inputs["queries_BQWD"][:, :, 1:2], "seen": alone}
    assert torch.equal(kernels.tree_attention(**few), output_BWQD[:, 1:2])
