"""Models that also read images, given text alone; and the positions that a model reads a prompt at."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

import specdec
from specdec import UnsupportedOptionError
from specdec.drafters import SmallModel
from specdec.options import check_model_inputs
from specdec.testing import ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.model import TreeModel
from specdec.tree_model.positions import next_positions, text_positions
from tests.support.images import TEXT, TOWER
from tests.support.references import PartlyWrongScript, speculate
from trees import Fixed

NUM_NEW = 20
PROMPTS = random_prompts([5, 12, 9, 18])
HALF_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "exaone4_5": {"model_type": "exaone4_5_text", **HALF_WINDOWS},
    "gemma3": HALF_WINDOWS,
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
}
"""Positions by slot, no positions of images, and positions of three planes."""


@cache
def model_of(family: str) -> PreTrainedModel:
    markers = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = AutoConfig.for_model(
        family,
        text_config={**TEXT, **FAMILIES[family]},
        vision_config=TOWER,
        **{name: 1000 + number for number, name in enumerate(markers)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_continued_as_the_model_does(family: str) -> None:
    """transformers passes an empty `mm_encoder_outputs` with every text, and positions of images may come in planes."""
    model = model_of(family)
    reference = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)
    script = PartlyWrongScript(reference)
    out = speculate(model, PROMPTS, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted == script.num_true > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_enabled_model_drafts_trees_for_itself(family: str) -> None:
    model = model_of(family)
    reference = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)
    specdec.enable(model, drafter=SmallModel(model), tree=Fixed((2, 2)))
    try:
        out = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)
    finally:
        specdec.disable(model)
    assert_same_tokens(model, reference, out, PROMPTS["attention_mask"])


@pytest.mark.parametrize("has_mask", [True, False])
def test_positions_go_on_where_the_model_read_and_not_where_it_was_told_to(
    has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    prompt = PROMPTS if has_mask else {"input_ids": PROMPTS["input_ids"]}
    prepare = model.prepare_inputs_for_generation
    for offset in (0, 3, None):  # as offered, counted from 3, and left to the decoder, which counts slots

        def moved(*args: Any, offset: int | None = offset, **inputs: Any) -> dict[str, Any]:
            prepared = prepare(*args, **inputs)
            given = prepared.get("position_ids", torch.arange(18).expand(4, -1))
            return {**prepared, "position_ids": None if offset is None else given + offset}

        monkeypatch.setattr(model, "prepare_inputs_for_generation", moved)
        target = TreeModel(model)
        with torch.no_grad():
            target.prefill(**prompt)
        lengths = PROMPTS["attention_mask"].sum(1) if has_mask and offset is not None else torch.tensor([18] * 4)
        assert target.next_positions_B.tolist() == (lengths + (offset or 0)).tolist()


def test_model_that_names_its_head_a_decoder() -> None:
    """`get_decoder()` of modernbert-decoder is its head, which is given no positions."""
    model = tiny_model("modernbert-decoder", local_attention=16, pad_token_id=258, bos_token_id=258, eos_token_id=258)
    reference = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)
    out = speculate(model, PROMPTS, ScriptedDrafter(PartlyWrongScript(reference)), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])


def planes(differ_at: int | None = None) -> torch.Tensor:
    positions = torch.arange(6).expand(3, 2, -1).clone()
    if differ_at is not None:
        positions[1, 0, differ_at] += 1
    return positions


def test_planes_that_differ_in_padding_alone_are_positions_of_text() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for differ_at, is_text in ((None, True), (1, True), (2, False)):
        assert (text_positions(planes(differ_at), mask) is not None) == is_text
    assert text_positions(planes(1), None) is None
    assert text_positions(torch.arange(6), None) is None


def test_model_inputs_that_say_something() -> None:
    model, config = tiny_model("llama"), GenerationConfig()
    given = {"position_ids": planes(), "mm_encoder_outputs": {}, "inputs_embeds": None}
    kept = check_model_inputs(model, given, config)
    assert kept.keys() == {"position_ids"}
    assert torch.equal(kept["position_ids"], planes()[0])
    kept = check_model_inputs(model, {"position_ids": planes(4), "mm_encoder_outputs": {"image": 1}}, config)
    assert kept["position_ids"].shape == (3, 2, 6)
    assert kept["mm_encoder_outputs"] == {"image": 1}
    with pytest.raises(UnsupportedOptionError, match="cross_attention_mask"):
        check_model_inputs(model, {"cross_attention_mask": torch.ones(1)}, config)


def test_next_positions_of_every_plane() -> None:
    assert next_positions(None) is None
    assert next_positions(planes()).tolist() == [[6, 6]]
    assert next_positions(planes()[0]).tolist() == [[6, 6]]
    assert next_positions(planes(5)).tolist() == [[6, 6], [7, 6], [6, 6]]
