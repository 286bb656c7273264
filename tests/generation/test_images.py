"""Models that read images: transformers encodes them and reads the prompt, we decode. Rows have different pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import routers
import specdec
from specdec import UnsupportedOptionError
from specdec.drafters import Auto, Drafter, EarlyExit, PromptLookup, QuantizedSelf, SmallModel
from specdec.hf import CACHE
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from specdec.tree_model.layer_kinds import keeps_states
from specdec.tree_model.model import TreeModel
from tests.support.images import IMAGE, model_of
from tests.support.references import PartlyWrongScript, speculate
from trees import Chain, Fixed

NUM_NEW = 24


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def of_grids(heights: Sequence[int]) -> dict[str, Tensor]:
    """Rows with one picture each, of different heights."""
    grids = torch.tensor([[1, height, 4] for height in heights])
    rows = [[5, 6, 7][: 1 + row] + [252] + [IMAGE] * height + [253, 1, 2, 3] for row, height in enumerate(heights)]
    text = padded(rows)
    return {
        **text,
        "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
        "pixel_values": picture(4 * sum(heights), 3 * 2 * 8 * 8),
        "image_grid_thw": grids,
    }


def of_squares(num_tokens: int, *, has_types: bool) -> dict[str, Tensor]:
    text = padded([[5] + [IMAGE] * num_tokens + [1, 2, 3], [6, 7, 5, 4] + [IMAGE] * num_tokens + [2, 1]])
    types = {"token_type_ids": (text["input_ids"] == IMAGE).long()} if has_types else {}
    return {**text, **types, "pixel_values": picture(2, 3, 32, 32)}


def of_several() -> dict[str, Tensor]:
    """One picture, and two of which one is narrower."""
    pixels, mask = picture(2, 2, 3, 32, 32), torch.ones(2, 2, 32, 32, dtype=torch.bool)
    pixels[0, 1], mask[0, 1] = 0, False
    mask[1, 1, :, 16:] = False
    text = padded([[5] + [IMAGE] * 4 + [1, 2, 3], [6] + [IMAGE] * 4 + [7] + [IMAGE] * 4 + [2, 1]])
    return {**text, "pixel_values": pixels, "pixel_attention_mask": mask}


def of_prefixes() -> dict[str, Tensor]:
    """Every token of them sees every other."""
    prompts = of_squares(16, has_types=False)
    return {**prompts, "token_type_ids": torch.zeros_like(prompts["input_ids"])}


PROMPTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "gemma3": lambda: of_squares(4, has_types=True),
    "llava": lambda: of_squares(16, has_types=False),
    "paligemma": of_prefixes,
    "qwen2_5_vl": lambda: of_grids((4, 8)),
    "qwen3_5": lambda: of_grids((4, 8)),
    "qwen3_vl": lambda: of_grids((8, 4)),
    "smolvlm": of_several,
}


def plain(model: PreTrainedModel, prompts: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**prompts, **{"max_new_tokens": NUM_NEW, "do_sample": False, **options})


@pytest.mark.parametrize("family", sorted(PROMPTS))
def test_what_follows_different_pictures_is_what_the_model_says(family: str) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    reference = plain(model, prompts)
    script = PartlyWrongScript(reference)
    out = speculate(model, prompts, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert torch.equal(out.sequences, reference)
    assert out.stats.num_accepted == script.num_true > 0


@pytest.mark.parametrize("family", sorted(PROMPTS))
def test_pictures_are_seen(family: str) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    other = {**prompts, "pixel_values": prompts["pixel_values"].flip(-1)}
    assert not torch.equal(plain(model, prompts), plain(model, other))


@pytest.mark.parametrize("family", sorted(PROMPTS))
@pytest.mark.parametrize(
    "drafter",
    [PromptLookup(), Auto(), QuantizedSelf(), EarlyExit(exit_layer=1)],
    ids=lambda value: type(value).__name__,
)
def test_drafters(family: str, drafter: Drafter) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    if isinstance(drafter, EarlyExit) and keeps_states(model.config):
        pytest.skip("an exit would leave states between two tokens")
    out = specdec.generate(model, **prompts, drafter=drafter, max_new_tokens=NUM_NEW, do_sample=False)
    assert torch.equal(out, plain(model, prompts))


@pytest.mark.parametrize("family", sorted(PROMPTS))
@pytest.mark.parametrize("tree", [Chain(3), Fixed((2, 2))], ids=["chain", "tree"])
def test_draft_model_reads_text_alone(family: str, tree: Any) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    out = specdec.generate(
        model, **prompts, drafter=SmallModel(tiny_model("llama")), tree=tree, max_new_tokens=NUM_NEW, do_sample=False
    )
    assert torch.equal(out, plain(model, prompts))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "options",
    [{"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"prefill_chunk_size": 5}],
    ids=["two", "chunks"],
)
def test_options(family: str, options: dict[str, Any]) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    out = specdec.generate(model, **prompts, drafter=PromptLookup(), max_new_tokens=NUM_NEW, **options)
    assert torch.equal(out, plain(model, prompts, **options))


@pytest.mark.parametrize("family", sorted(PROMPTS))
def test_conversation_goes_on_from_a_cache(family: str) -> None:
    model, prompts = model_of(family), PROMPTS[family]()
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    texts = []
    for generate in (model.generate, partial(specdec.generate, model)):
        said = generate(**prompts, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        asked = {"input_ids": torch.cat([said.sequences, torch.tensor([[9, 8, 7]] * 2)], 1), "attention_mask": mask}
        texts.append(generate(**asked, past_key_values=said[CACHE], max_new_tokens=NUM_NEW, do_sample=False))
    assert torch.equal(*texts)


def test_positions_go_on_in_every_plane() -> None:
    """The text after a picture of 4 x 1 merged patches begins 4 positions after its first one; slots count 8."""
    model, prompts = model_of("qwen2_5_vl"), of_grids((8,))
    model.generate(**prompts, max_new_tokens=1)
    positions = model._prepare_position_ids_for_generation(prompts["input_ids"], prompts)
    target = TreeModel(model)
    with torch.no_grad():
        target.prefill(**prompts, position_ids=positions)
    assert target.next_positions_AB.tolist() == (positions[..., -1] + 1).tolist() == [[14], [10], [10], [10]]


def test_router_takes_text_alone() -> None:
    model = model_of("llava")
    with pytest.raises(UnsupportedOptionError, match=r"text alone, and these have images \(mm_encoder_outputs\)"):
        specdec.generate(
            model,
            **of_squares(16, has_types=False),
            drafter=tiny_model("llama"),
            router=routers.AlwaysTarget(),
            tokenizer=ByteTokenizer(),
            max_new_tokens=4,
        )


def test_inputs_that_every_step_needs_are_refused() -> None:
    """GPT-2 embeds the types of its tokens, those that are drafted too."""
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(UnsupportedOptionError, match="token_type_ids"):
        specdec.generate(tiny_model("gpt2"), prompt, token_type_ids=torch.ones_like(prompt), max_new_tokens=4)


def test_enabled_model_takes_what_a_processor_returns() -> None:
    """A pipeline calls `model.generate(**processor(...), **generate_kwargs)`."""
    model, prompts = model_of("qwen2_5_vl"), PROMPTS["qwen2_5_vl"]()
    reference = plain(model, prompts)
    specdec.enable(model, drafter=SmallModel(tiny_model("llama")), tree=Fixed((2, 2)))
    try:
        assert torch.equal(plain(model, prompts), reference)
    finally:
        specdec.disable(model)


def test_prompt_that_ends_in_a_picture() -> None:
    """Its planes of positions go on each for itself, as they do in plain decoding."""
    model, prompts = model_of("qwen2_5_vl"), PROMPTS["qwen2_5_vl"]()
    ends = ("input_ids", "attention_mask", "mm_token_type_ids")
    prompts |= {name: prompts[name][:, :-4] for name in ends}
    assert prompts["input_ids"][:, -1].tolist() == [IMAGE, IMAGE]
    reference = plain(model, prompts)
    out = speculate(model, prompts, ScriptedDrafter(PartlyWrongScript(reference)), max_new_tokens=NUM_NEW)
    assert torch.equal(out.sequences, reference)
