"""What comes back, and what may go in: dictionaries, caches and embeddings, as in plain decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.hf import CACHE
from specdec.testing import tiny_model

PROMPT = torch.tensor([list(b"a rose is a rose is a")])
PROMPTS = torch.tensor([list(b"a rose is a"), [0, 0, 0, *b"or a rose"[:8]], [0] * 6 + [*b"roses"]])
MASKS = (PROMPTS > 0).long()
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
FAMILIES = ("llama", "gpt2", "mistral", "gemma3_text")  # the last two have sliding windows of 16 tokens


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: tiny_model(family, seed=6) for family in FAMILIES}


@pytest.fixture(scope="module")
def model(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


def make_drafter(name: str, model: PreTrainedModel) -> Drafter:
    return {
        "target": lambda: SmallModel(model, num_tokens=5),
        "PromptLookup": lambda: PromptLookup(min_match=1),
        "Plain": Plain,
    }[name]()


DRAFTERS = ("target", "PromptLookup", "Plain")


def assert_same_vectors(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], num_new: list[int]) -> None:
    """Compare scores or logits of the tokens that each row has."""
    assert len(actual) == len(expected) == max(num_new)
    for place, (ours_BV, plain_BV) in enumerate(zip(actual, expected, strict=True)):
        assert (ours_BV.shape, ours_BV.dtype) == (plain_BV.shape, plain_BV.dtype)
        alive = [row for row, count in enumerate(num_new) if place < count]
        torch.testing.assert_close(ours_BV[alive], plain_BV[alive], rtol=1e-4, atol=1e-4)


def assert_same_cache(actual: DynamicCache, expected: DynamicCache) -> None:
    assert type(actual) is type(expected)
    assert actual.get_seq_length() == expected.get_seq_length()
    for ours, plain in zip(actual.layers, expected.layers, strict=True):
        assert type(ours) is type(plain)
        torch.testing.assert_close(ours.keys, plain.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, plain.values, rtol=1e-4, atol=1e-4)


# dictionaries


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dictionary_holds_what_plain_decoding_puts_there(
    models: dict[str, PreTrainedModel], family: str, drafter: str
):
    model = models[family]
    options = {**GREEDY, **EVERYTHING, "repetition_penalty": 1.2}
    expected = model.generate(PROMPT, **options)
    out = specdec.generate(model, PROMPT, drafter=make_drafter(drafter, model), **options)
    assert isinstance(out, specdec.SpeculativeOutput)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_vectors(out.scores, expected.scores, [24])
    assert_same_vectors(out.logits, expected.logits, [24])
    assert_same_cache(out[CACHE], expected[CACHE])
    assert out.attentions is out.hidden_states is None


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_dictionary_of_ragged_rows(model: PreTrainedModel, drafter: str):
    options = {**GREEDY, **EVERYTHING, "attention_mask": MASKS}
    free = model.generate(PROMPTS, **{**options, "return_dict_in_generate": False})[:, PROMPTS.shape[1] :]
    options["eos_token_id"] = [int(row[place]) for row, place in zip(free, (5, 13, 20), strict=True)]
    expected = model.generate(PROMPTS, **options)
    out = specdec.generate(model, PROMPTS, drafter=make_drafter(drafter, model), **options)
    assert torch.equal(out.sequences, expected.sequences)
    num_new = [int((row != 0).sum()) for row in expected.sequences[:, PROMPTS.shape[1] :]]
    assert len(set(num_new)) == 3, "rows stop at different places"
    assert_same_vectors(out.scores, expected.scores, num_new)
    assert_same_vectors(out.logits, expected.logits, num_new)
    assert out[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    for ours, plain in zip(out[CACHE].layers, expected[CACHE].layers, strict=True):
        for row, count in enumerate(num_new):
            real = slice(PROMPTS.shape[1] - int(MASKS[row].sum()), PROMPTS.shape[1] + count - 1)
            for ours_BHSD, plain_BHSD in ((ours.keys, plain.keys), (ours.values, plain.values)):
                torch.testing.assert_close(ours_BHSD[row, :, real], plain_BHSD[row, :, real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", ["output_scores", "output_logits", None])
def test_only_what_was_asked_for_is_kept(model: PreTrainedModel, flag: str | None):
    out = specdec.generate(model, PROMPT, return_dict_in_generate=True, **({flag: True} if flag else {}), **GREEDY)
    assert (out.scores is not None) == (flag == "output_scores")
    assert (out.logits is not None) == (flag == "output_logits")


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_transition_scores(model: PreTrainedModel, drafter: str):
    options = {**GREEDY, **EVERYTHING, "temperature": 0.7, "do_sample": True, "top_k": 20}
    out = specdec.generate(model, PROMPT, drafter=make_drafter(drafter, model), **options)
    log_probs = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert log_probs.shape == (1, 24)
    logits_1TV = model(out.sequences[:, :-1]).logits[:, PROMPT.shape[1] - 1 :] / 0.7
    kept = logits_1TV >= logits_1TV.topk(20).values[..., -1:]
    expected = logits_1TV.masked_fill(~kept, -torch.inf).log_softmax(-1)
    new_ids = out.sequences[:, PROMPT.shape[1] :]
    torch.testing.assert_close(log_probs, expected.gather(2, new_ids.unsqueeze(2)).squeeze(2), rtol=1e-3, atol=1e-3)


def test_logits_of_a_bfloat16_model_come_back_in_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    out = specdec.generate(model, PROMPT, drafter=Plain(), **GREEDY, **EVERYTHING)
    assert {vector.dtype for vector in (*out.scores, *out.logits)} == {torch.float32}
    assert out[CACHE].layers[0].keys.dtype == torch.bfloat16


def test_num_return_sequences_repeats_the_prompt(model: PreTrainedModel):
    options = {"do_sample": True, "max_new_tokens": 9, "num_return_sequences": 3}
    out = specdec.generate(model, PROMPTS, attention_mask=MASKS, **options)
    assert out.shape == (9, PROMPTS.shape[1] + 9)
    assert torch.equal(out[:, : PROMPTS.shape[1]], PROMPTS.repeat_interleave(3, 0))


# caches


@pytest.mark.parametrize("family", FAMILIES)
def test_both_continue_from_a_returned_cache(models: dict[str, PreTrainedModel], family: str):
    model = models[family]
    options = {**GREEDY, "return_dict_in_generate": True}
    out = specdec.generate(model, PROMPT, drafter=make_drafter("target", model), **options)
    question = torch.cat([out.sequences, torch.tensor([list(b" so?")])], 1)
    options = {**GREEDY, "attention_mask": torch.ones_like(question)}
    expected = model.generate(question, **options)
    for decode in (type(model).generate, specdec.generate):
        cache = copy.deepcopy(out[CACHE])
        assert torch.equal(decode(model, question, **{CACHE: cache}, **options), expected)


def prompt_cache(model: PreTrainedModel, num_tokens: int) -> DynamicCache:
    return model(PROMPT[:, :num_tokens], use_cache=True)[CACHE]


@pytest.mark.rotated
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("only_new_ids", [False, True], ids=["all ids", "only new ids"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_the_callers(models: dict[str, PreTrainedModel], family: str, only_new_ids: bool, drafter: str):
    """It is used, and afterwards holds what plain decoding leaves in it."""
    model, num_cached = models[family], 12
    input_ids = PROMPT[:, num_cached:] if only_new_ids else PROMPT
    options = {**GREEDY, "attention_mask": torch.ones_like(PROMPT)}
    plain, ours = prompt_cache(model, num_cached), prompt_cache(model, num_cached)
    expected = model.generate(input_ids, **{CACHE: plain}, **options)
    out = specdec.generate(model, input_ids, past_key_values=ours, drafter=make_drafter(drafter, model), **options)
    assert torch.equal(out, expected)
    assert_same_cache(ours, plain)


def test_an_empty_cache_of_the_callers_is_filled(model: PreTrainedModel):
    plain, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = model.generate(PROMPT, **{CACHE: plain}, **GREEDY)
    out = specdec.generate(model, PROMPT, past_key_values=ours, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert out[CACHE] is ours
    assert_same_cache(ours, plain)


def test_turns_of_a_conversation_share_a_cache(model: PreTrainedModel):
    """Three turns on one cache give what three turns without any cache give."""
    cache = DynamicCache(config=model.config)
    with_cache = without = torch.tensor([list(b"user: hi")])
    for turn in (b" and?", b" then?", b" so?"):
        options = {**GREEDY, "attention_mask": torch.ones_like(without)}
        with_cache = specdec.generate(model, with_cache, past_key_values=cache, **options)
        without = model.generate(without, **options)
        assert torch.equal(with_cache, without)
        assert cache.get_seq_length() == with_cache.shape[1] - 1
        with_cache = without = torch.cat([with_cache, torch.tensor([list(turn)])], 1)


# other inputs


@pytest.mark.parametrize("drafter", ["PromptLookup", "Plain"])
def test_embeddings_instead_of_ids(model: PreTrainedModel, drafter: str):
    """As in transformers, the output then holds the new tokens only."""
    embeds = model.get_input_embeddings()(PROMPTS)
    options = {**GREEDY, "attention_mask": MASKS}
    expected = model.generate(inputs_embeds=embeds, **options)
    out = specdec.generate(model, inputs_embeds=embeds, drafter=make_drafter(drafter, model), **options)
    assert torch.equal(out, expected)
    assert out.shape == (3, 24)


def test_embeddings_beside_ids(model: PreTrainedModel):
    """The ids are returned, the embeddings are read."""
    embeds = model.get_input_embeddings()(PROMPT.flip(1))
    expected = model.generate(PROMPT, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(specdec.generate(model, PROMPT, inputs_embeds=embeds, drafter=Plain(), **GREEDY), expected)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_inputs_by_position_and_by_either_name(model: PreTrainedModel, drafter: str):
    expected = model.generate(PROMPT, **GREEDY)
    options = {"drafter": make_drafter(drafter, model), **GREEDY}
    for out in (
        specdec.generate(model, PROMPT, **options),
        specdec.generate(model, inputs=PROMPT, **options),
        specdec.generate(model, input_ids=PROMPT, **options),
        specdec.generate(model, PROMPT.int(), **options),
    ):
        assert torch.equal(out, expected)


def test_no_prompt_starts_from_bos(model: PreTrainedModel):
    options: dict[str, Any] = {**GREEDY, "bos_token_id": 258}
    assert torch.equal(specdec.generate(model, **options), model.generate(**options))


def test_position_ids_of_the_callers(model: PreTrainedModel):
    positions = torch.arange(PROMPT.shape[1]).unsqueeze(0) + 7
    expected = model.generate(PROMPT, position_ids=positions, **GREEDY)
    for drafter in DRAFTERS:
        options = {"drafter": make_drafter(drafter, model), **GREEDY}
        assert torch.equal(specdec.generate(model, PROMPT, position_ids=positions, **options), expected)
    assert not torch.equal(expected, model.generate(PROMPT, position_ids=positions * 2, **GREEDY))
