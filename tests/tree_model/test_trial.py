"""The trial of families that nobody tests: what it finds out, when it runs, and what it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import specdec
from specdec import UnsupportedModelError, UnsupportedOptionError
from specdec.engine import Engine, Request
from specdec.hf import CACHE
from specdec.kernels.model.profile import profile_of
from specdec.testing import tiny_model
from specdec.tree_model import compatibility, masks
from specdec.tree_model import model as target
from specdec.tree_model.compatibility import PassedTrials, check_model
from specdec.tree_model.trial import trial_logits
from tests.support.families import CHUNKED, INDEXED, UNLISTED


def window_model(window: int = 16) -> PreTrainedModel:
    return tiny_model("cohere2", sliding_window=window)


def shapes_of_inputs(model: PreTrainedModel) -> list[torch.Size]:
    """Of every forward of a trial."""
    shapes: list[torch.Size] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    check_model(model)
    hook.remove()
    return shapes


@pytest.mark.parametrize("size", [16, 100])
@pytest.mark.parametrize("reach", ["within_window", "within_chunk"])
def test_text_reaches_past_what_the_model_sees(reach: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of 7 tokens passed every model whose window, chunk or top-k was not cut."""
    settings = {**CHUNKED, "attention_chunk_size": size}
    model = window_model(size) if reach == "within_window" else tiny_model("llama4_text", **settings)
    check_model(model)
    profile_of(model).part(PassedTrials).by_tree = False
    monkeypatch.setattr(masks, reach, lambda _, offsets_BT, *__: torch.ones(()).bool())
    with pytest.raises(UnsupportedModelError, match="other logits"):
        check_model(model)


def test_indexers_have_more_to_choose_from_than_they_take() -> None:
    model = tiny_model("deepseek_v32", **{**INDEXED, "index_topk": 32})
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    check_model(model)
    assert max(lengths) > 32


def test_padded_rows_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """exaone4_5 reads a padded prompt at other positions than it is offered: an unpadded row did not show it."""

    @contextmanager
    def nothing_read(_: Any) -> Iterator[list[Any]]:
        yield []

    model = tiny_model("glm")
    prepare = model.prepare_inputs_for_generation
    monkeypatch.setattr(
        model, "prepare_inputs_for_generation", lambda *args, **given: {**prepare(*args, **given), "position_ids": None}
    )
    check_model(model)
    profile_of(model).part(PassedTrials).by_tree = False
    monkeypatch.setattr(target, "positions_read", nothing_read)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        check_model(model)


def test_trial_comes_with_enable_and_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def counted(*args: Any) -> Any:
        runs.append(args)
        return trial_logits(*args)

    monkeypatch.setattr(compatibility, "trial_logits", counted)
    model = window_model()
    specdec.enable(model)
    for _ in range(2):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert len(runs) == 1
    specdec.disable(model)
    check_model(tiny_model("llama"))
    assert len(runs) == 1


def test_trial_is_short() -> None:
    model = window_model(4096)
    assert sum(shape.numel() for shape in shapes_of_inputs(model)) < 100


@pytest.mark.parametrize("num_positions", [8, 12, 20])
def test_trial_keeps_to_the_positions_that_there_are(num_positions: int) -> None:
    check_model(tiny_model("biogpt", max_position_embeddings=num_positions))


def test_message_does_not_end_in_the_words_of_python() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        check_model(tiny_model("openai-gpt", n_positions=256))
    assert str(raised.value).startswith("OpenAIGPTLMHeadModel failed a trial of tree decoding (")
    assert str(raised.value).endswith("the cause of this error): use model.generate()")
    assert raised.value.__cause__ is not None


def test_refusals_of_layers_have_one_ending() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        check_model(tiny_model("deepseek_v4", head_dim=8))
    assert str(raised.value).count("use model.generate()") == 1
    assert "trial" not in str(raised.value)


@pytest.mark.parametrize("family", ["deepseek_v32", "llama4_text"])
def test_requests_that_begin_alike_get_what_they_get_alone(family: str) -> None:
    """What an indexer keeps is read, shared and joined as keys are; chunks count from a row's first token."""
    model = tiny_model(family, **UNLISTED[family])
    prompts = [[*range(3, 40), last] for last in (7, 8)] + [[5, 6]]
    engine = Engine(model, max_rows=2, prefill_chunk=8)
    settings = {"max_new_tokens": 20, "do_sample": False}
    generations = [engine.submit(Request(prompt=prompt, config=GenerationConfig(**settings))) for prompt in prompts]
    engine.run()
    for prompt, generation in zip(prompts, generations, strict=True):
        plain = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
        assert generation.tokens == plain.tolist()


@pytest.mark.parametrize("family", ["deepseek_v32", "gemma4_text"])
def test_returned_cache_goes_on_where_it_ended(family: str) -> None:
    model = tiny_model(family, **UNLISTED[family])
    prompt = torch.tensor([list(range(3, 20))])
    whole = model.generate(prompt, max_new_tokens=24, do_sample=False)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = specdec.generate(model, prompt, drafter=specdec.drafters.PromptLookup(), max_new_tokens=10, **settings)
    for continued in (model.generate, lambda *args, **given: specdec.generate(model, *args, **given)):
        cache = copy.deepcopy(first[CACHE])
        out = continued(first.sequences, **{CACHE: cache}, max_new_tokens=14, **settings)
        assert torch.equal(out.sequences, whole)


def test_chunked_model_stays_away_from_slots_that_it_scales() -> None:
    """Llama 4 scales queries by their place in the cache, which for drafted tokens is not their position."""
    model = tiny_model("llama4_text", **CHUNKED, floor_scale=300, max_position_embeddings=512)
    prompt = torch.tensor([list(range(3, 20))])
    specdec.generate(model, prompt, max_new_tokens=26, do_sample=False)
    with pytest.raises(UnsupportedOptionError, match="scales its attention from 300 tokens on"):
        specdec.generate(model, prompt, max_new_tokens=27, do_sample=False)
