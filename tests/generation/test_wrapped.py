"""Adapters, quantised weights, compiled and offloaded parts: exact, or refused as docs/compatibility.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import Auto, Drafter, QuantizedSelf, SmallModel
from specdec.testing import ScriptedDrafter, random_prompts, tiny_model
from tests.support.references import PartlyWrongScript, speculate
from tests.support.wrapped import EXACT, WRAPPED, add_lora, bare, peft_model, prompt_tuned
from trees import Fixed

NUM_NEW = 16
PROMPTS = random_prompts([5, 12, 9])


def said(model: Any, drafter: Drafter, reference: Tensor) -> str:
    try:
        out = speculate(model, PROMPTS, drafter, max_new_tokens=NUM_NEW)
    except ValueError as error:
        return str(error)
    return EXACT if torch.equal(out.sequences, reference) else "wrong"


def plain(model: Any) -> Tensor:
    return model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)


@pytest.mark.filterwarnings("ignore")
@torch._dynamo.config.patch(recompile_limit=1)  # other sizes go on uncompiled: all of them take a minute
@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_wrapped_around_a_model(name: str) -> None:
    wrapped = WRAPPED[name]
    model = wrapped.build()
    reference = plain(model)
    assert said(model, ScriptedDrafter(PartlyWrongScript(reference)), reference) == wrapped.says
    if wrapped.says == EXACT:
        assert said(model, QuantizedSelf(), reference) == wrapped.copy_says
        assert said(model, Auto(), reference) == EXACT


@pytest.mark.parametrize("prepared", [False, True])
def test_adapters_that_are_switched_between_calls(prepared: bool) -> None:
    """Of one model, one drafter and one copy: nothing that was made before may be believed."""
    model, drafter, texts = bare(), QuantizedSelf(), []
    for seed, name in enumerate("ab"):
        add_lora(model, name, seed)
    if prepared:
        specdec.prepare(model)
    for switch in (
        lambda: model.set_adapter("a"),
        lambda: model.set_adapter("b"),
        model.disable_adapters,
        model.enable_adapters,
        lambda: model.delete_adapter("b"),
    ):
        switch()
        texts.append(plain(model))
        for each in (drafter, Auto()):
            assert said(model, each, texts[-1]) == EXACT
        rates = [
            speculate(model, PROMPTS, each, max_new_tokens=NUM_NEW).stats.acceptance_rate
            for each in (drafter, QuantizedSelf())
        ]
        assert rates[0] == rates[1]
    assert not torch.equal(texts[0], texts[1])
    assert torch.equal(texts[1], texts[3])


def test_an_adapter_that_is_put_into_a_prepared_model() -> None:
    expected = plain(add_lora(bare()))
    model = specdec.prepare(bare())
    specdec.generate(model, **PROMPTS, max_new_tokens=4)
    add_lora(model)
    assert torch.equal(plain(model), expected)
    for drafter in (Auto(), QuantizedSelf()):
        assert said(model, drafter, expected) == EXACT


@pytest.fixture
def accelerated() -> dict[str, Any]:
    return {"drafter": SmallModel(tiny_model("llama")), "tree": Fixed((2, 2))}


def test_enabled_inside_a_peft_model(accelerated: dict[str, Any]) -> None:
    model = peft_model()
    expected = plain(model)
    specdec.enable(model.get_base_model(), **accelerated)
    out = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out, specdec.SpeculativeOutput)
    assert torch.equal(out.sequences, expected)


def test_learned_prompts_are_left_to_plain_decoding(
    accelerated: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """They come before the text at every step: an enabled model inside wrote another text."""
    model = prompt_tuned()
    inside: PreTrainedModel = model.get_base_model()
    expected, without = plain(model), plain(inside)
    assert not torch.equal(expected, without)
    specdec.enable(inside, **accelerated)
    assert torch.equal(plain(model), expected)
    assert "PeftModelForCausalLM prepares the inputs of every step" in caplog.text
    assert torch.equal(plain(inside), without)
