"""Each supported family says the same with every drafter, alone and in a ragged batch; others are tried or refused."""

from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from specdec import UnsupportedModelError
from specdec.drafters import Plain, PromptLookup, SmallModel, SparseSelf
from specdec.testing import FAMILIES, ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.compatibility import VERIFIED_FAMILIES, check_model
from tests.support.families import REFUSED, UNLISTED
from tests.support.references import PartlyWrongScript, plain_alone, rows_of, speculate, with_noise

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])
"""The longest row ends at 42 tokens, far past the windows of 16."""


@lru_cache(maxsize=1)
def target_and_reference(family: str) -> tuple[PreTrainedModel, Tensor]:
    model = tiny_model(family)
    return model, plain_alone(model, PROMPTS, NUM_NEW)


def almost_right(reference: Tensor) -> list[list[int]]:
    """Texts that hold each row's output with every seventh token replaced."""
    texts = reference.clone()
    texts[:, ::7] = 9
    return texts.tolist()


DRAFTERS = {
    "plain": lambda model, reference: Plain(),
    "lookup": lambda model, reference: PromptLookup(min_match=1),
    "lookup-in-corpus": lambda model, reference: PromptLookup(corpus=almost_right(reference)),
    "stranger": lambda model, reference: SmallModel(tiny_model("llama", seed=1, hidden_size=16), num_tokens=2),
    "relative": lambda model, reference: SmallModel(with_noise(model)),
    "itself": lambda model, reference: SmallModel(model, num_tokens=5),
    "sparse": lambda model, reference: SparseSelf(budget=8),
}


@pytest.mark.rotated
@pytest.mark.parametrize("drafter_name", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_plain_decoding(family: str, drafter_name: str) -> None:
    model, reference = target_and_reference(family)
    drafter = DRAFTERS[drafter_name](model, reference)
    alone_prompt = rows_of(PROMPTS, [1])
    alone = speculate(model, alone_prompt, drafter, max_new_tokens=NUM_NEW)
    together = speculate(model, PROMPTS, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference[1:2, -NUM_NEW - 12 :], alone.sequences, alone_prompt["attention_mask"])
    assert_same_tokens(model, reference, together.sequences, PROMPTS["attention_mask"])
    check_pattern(drafter_name, alone.stats, together.stats)


def check_pattern(drafter_name: str, alone: Any, together: Any) -> None:
    """That the drafter did what makes its case worth testing."""
    if drafter_name == "plain":
        assert together.num_drafted == 0
        assert together.target_forwards == NUM_NEW
    elif drafter_name == "itself":  # 1 token by the prefill, 3 rounds of 5 + 1, then 4 + 1
        assert alone.accepted_histogram == {5: 3, 4: 1}
        assert together.accepted_histogram == {5: 12, 4: 4}
    elif drafter_name in ("relative", "lookup-in-corpus"):
        assert 0 < together.num_accepted < together.num_drafted
    else:
        assert together.num_drafted > 0


def test_verified_families_are_the_tested_ones() -> None:
    assert set(FAMILIES) == VERIFIED_FAMILIES
    assert {tiny_model(family).config.model_type for family in FAMILIES} == VERIFIED_FAMILIES


@pytest.mark.parametrize("family", UNLISTED)
def test_unlisted_family_passes_its_trial_and_says_the_same(family: str) -> None:
    assert family not in VERIFIED_FAMILIES
    model = tiny_model(family, **UNLISTED[family])
    reference = plain_alone(model, PROMPTS, NUM_NEW)
    script = PartlyWrongScript(reference)
    out = speculate(model, PROMPTS, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted == script.num_true > 0


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_cannot_be_decoded_by_tree_is_refused(family: str) -> None:
    settings, reason = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=reason):
        check_model(tiny_model(family, **settings))


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_trial_finds_out_a_model_that_ignores_what_trees_need(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_model(tiny_model("glm"))
    model = tiny_model("glm")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: forward(**{**inputs, ignored: None}))
    with pytest.raises(UnsupportedModelError, match="as a tree"):
        check_model(model)
