"""Every supported family says the same with every drafter, alone and in a ragged batch; others are checked or refused."""

from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.testing import FAMILIES, assert_same_tokens, random_prompts, tiny_model

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])
"""The longest runs end at 42 tokens, far past the windows of 16."""

GREEDY = {"max_new_tokens": NUM_NEW, "do_sample": False}


@lru_cache(maxsize=1)
def target_and_reference(family: str) -> tuple[PreTrainedModel, Tensor]:
    """A model and, for each row of `PROMPTS`, the tokens that it generates when the row is alone."""
    model = tiny_model(family)
    rows = [
        model.generate(ids[mask.bool()][None], attention_mask=mask[mask.bool()][None], **GREEDY)[0, -NUM_NEW:]
        for ids, mask in zip(PROMPTS["input_ids"], PROMPTS["attention_mask"], strict=True)
    ]
    return model, torch.cat([PROMPTS["input_ids"], torch.stack(rows)], 1)


def almost(model: PreTrainedModel) -> PreTrainedModel:
    """A draft model that often agrees with the target: the target with a little noise on its weights."""
    draft = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in draft.parameters():
            weights += 0.02 * torch.randn(weights.shape, generator=generator)
    return draft


def almost_right(reference: Tensor) -> list[list[int]]:
    """Texts to copy from that contain each row's output with every seventh token replaced."""
    wrong = reference.clone()
    wrong[:, ::7] = 9
    return wrong.tolist()


DRAFTERS = {
    "plain": lambda model, reference: Plain(),
    "lookup": lambda model, reference: PromptLookup(min_match=1),
    "lookup-corpus": lambda model, reference: PromptLookup(corpus=almost_right(reference)),
    "stranger": lambda model, reference: SmallModel(tiny_model("llama", seed=1, hidden_size=16)),
    "almost": lambda model, reference: SmallModel(almost(model)),
    "itself": lambda model, reference: SmallModel(model, num_tokens=5),
}


def speculate(model: PreTrainedModel, prompts: dict[str, Tensor], drafter: Drafter, **options: Any) -> Any:
    return specdec.generate(model, **prompts, drafter=drafter, return_dict_in_generate=True, **{**GREEDY, **options})


@pytest.mark.parametrize("drafter_name", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_plain_decoding(family: str, drafter_name: str) -> None:
    model, reference = target_and_reference(family)
    drafter = DRAFTERS[drafter_name](model, reference)
    first_row = {name: tensor[3:] for name, tensor in PROMPTS.items()}
    alone = speculate(model, first_row, drafter)
    together = speculate(model, PROMPTS, drafter)
    assert_same_tokens(model, reference[3:], alone.sequences, first_row["attention_mask"])
    assert_same_tokens(model, reference, together.sequences, PROMPTS["attention_mask"])
    print(family, drafter_name, together.stats)
    if drafter_name == "itself":
        full_rounds, rest = divmod(NUM_NEW - 1, 5 + 1)
        assert alone.stats.accepted_histogram == {5: full_rounds, rest - 1: 1}
        assert together.stats.accepted_histogram == {5: 4 * full_rounds, rest - 1: 4}
    elif drafter_name == "plain":
        assert together.stats.num_drafted == 0
        assert together.stats.target_forwards == NUM_NEW
    else:
        assert 0 < together.stats.num_drafted > together.stats.num_accepted
