"""Speculation on prepared models: the prepared model's own greedy output, with every drafter, alone and in batches."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from trees import DySpec, GrowthPolicy

NUM_NEW = 24
SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192}


def target() -> PreTrainedModel:
    return tiny_model("llama", **SIZES)


@pytest.fixture(scope="module", params=["float", "int8", "int4"])
def prepared(request: pytest.FixtureRequest) -> PreTrainedModel:
    return specdec.prepare(target(), weights=request.param)


def drafters() -> dict[str, tuple[Drafter, GrowthPolicy | None]]:
    draft = tiny_model("llama", seed=1, **SIZES)
    return {
        "plain": (Plain(), None),
        "prompt lookup": (PromptLookup(min_match=1), None),
        "small int8 model": (SmallModel(draft, weights="int8"), None),
        "small int4 model, tree": (SmallModel(draft, weights="int4"), DySpec(budget=12)),
        "small model, tree": (SmallModel(specdec.prepare(draft)), DySpec(budget=12)),
    }


@pytest.mark.parametrize("lengths", [[9], [9, 4, 12, 1]], ids=["alone", "ragged"])
@pytest.mark.parametrize("name", drafters())
def test_greedy_output_is_the_prepared_models(prepared: PreTrainedModel, name: str, lengths: list[int]):
    drafter, tree = drafters()[name]
    prompts = random_prompts(lengths)
    expected = prepared.generate(**prompts, max_new_tokens=NUM_NEW, do_sample=False)
    out = specdec.generate(prepared, **prompts, max_new_tokens=NUM_NEW, do_sample=False, drafter=drafter, tree=tree)
    assert_same_tokens(prepared, expected, out, attention_mask=prompts["attention_mask"])


@pytest.mark.parametrize("lengths", [[9], [9, 4, 12, 1]], ids=["alone", "ragged"])
def test_float_products_leave_the_output_as_it_was(lengths: list[int]):
    model, prompts = target(), random_prompts(lengths)
    expected = model.generate(**prompts, max_new_tokens=NUM_NEW, do_sample=False)
    specdec.prepare(model)
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "drafter": QuantizedSelf()}
    assert_same_tokens(model, expected, specdec.generate(model, **prompts, **options), prompts["attention_mask"])
    specdec.unprepare(model)
    assert torch.equal(expected, model.generate(**prompts, max_new_tokens=NUM_NEW, do_sample=False))


def test_a_target_that_drafts_for_itself_is_always_accepted(prepared: PreTrainedModel):
    prompts = random_prompts([9, 4, 12, 1])
    out = specdec.generate(
        prepared,
        **prompts,
        max_new_tokens=NUM_NEW,
        do_sample=False,
        drafter=SmallModel(prepared),
        return_dict_in_generate=True,
    )
    assert out.stats.num_accepted == out.stats.num_drafted > 0


def test_nothing_to_prepare_is_said_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "specdec")
    model = tiny_model("llama").half()
    for _ in range(2):
        specdec.prepare(model)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("prepare() has changed nothing: LlamaForCausalLM is float16 on cpu")
    caplog.clear()
    specdec.prepare(tiny_model("llama"))
    assert any(record.getMessage().startswith("prepared LlamaForCausalLM: ") for record in caplog.records)
