"""Drafting with quantised copies: the float model's output, whatever the copy says."""

from __future__ import annotations

import pytest
import torch

import specdec
from specdec.drafters import QuantizedSelf, SmallModel
from specdec.testing import random_prompts, tiny_model
from trees import DySpec

NEW = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=64)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tree", [None, DySpec(budget=12)], ids=["chain", "tree"])
@pytest.mark.parametrize("lengths", [[9], [9, 4, 12, 1]])
def test_the_output_is_the_float_models(model, lengths, tree, weights):
    prompts = random_prompts(lengths, vocab_size=60)
    expected = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
    drafter = QuantizedSelf(weights=weights)
    for _ in range(2):
        out = specdec.generate(
            model,
            **prompts,
            max_new_tokens=NEW,
            do_sample=False,
            drafter=drafter,
            tree=tree,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, expected)
        assert out.stats.num_accepted > 0


def test_the_target_keeps_its_float_weights(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    specdec.generate(model, **random_prompts([5], vocab_size=60), max_new_tokens=4, drafter=QuantizedSelf())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_copy_is_made_once(model, monkeypatch):
    from specdec.drafters.model import quantized_copy

    made = []
    original = quantized_copy.quantized_copy
    monkeypatch.setattr(
        quantized_copy, "quantized_copy", lambda target, weights: made.append(target) or original(target, weights)
    )
    drafter = QuantizedSelf(num_tokens=2)
    assert not made
    for _ in range(3):
        specdec.generate(model, **random_prompts([5], vocab_size=60), max_new_tokens=4, drafter=drafter)
    assert made == [model]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_small_model_with_quantised_weights(model, weights):
    draft = tiny_model("llama", vocab_size=64, seed=1)
    prompts = random_prompts([7, 3], vocab_size=60)
    expected = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
    drafter = SmallModel(draft, weights=weights)
    assert drafter.model is not draft
    out = specdec.generate(model, **prompts, max_new_tokens=NEW, do_sample=False, drafter=drafter)
    assert torch.equal(out, expected)


def test_wrong_settings(model):
    for drafter in (lambda: SmallModel(model, weights="int3"), lambda: QuantizedSelf(weights="int3")):
        with pytest.raises(ValueError, match=r"weights='int3'.*: weights is 'int8' or 'int4'"):
            drafter()
    with pytest.raises(ValueError, match="positive integer"):
        QuantizedSelf(num_tokens=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_target_of_another_dtype_is_left_as_it_is(dtype):
    """The copy shares norms and embeddings; turning it to float32 used to turn the target's to float32 with it."""
    target, prompts = tiny_model("llama", vocab_size=64, dtype=dtype), random_prompts([9], vocab_size=60)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = target.generate(**prompts, **options)
    assert torch.equal(specdec.generate(target, **prompts, drafter=QuantizedSelf(), **options), expected)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert {parameter.dtype for parameter in target.parameters()} == {dtype}
