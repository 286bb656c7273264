"""`enable` makes `model.generate` speculative for whoever calls it; `disable` undoes it."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList, pipeline

import specdec
from specdec.drafters import Plain, PromptLookup, SmallModel
from specdec.errors import UnsupportedOptionError
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from tests.support.conformance import Recording, RecordsCalls
from trees import Chain

PROMPT = torch.tensor([list(b"round and round and")])
GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=9)


@pytest.fixture
def expected(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, **GREEDY)


def stats(out: Any) -> specdec.DecodingStats:
    assert isinstance(out, specdec.SpeculativeOutput)
    return out.stats


def with_stats(model: PreTrainedModel, **options: Any) -> specdec.DecodingStats:
    return stats(model.generate(PROMPT, return_dict_in_generate=True, **GREEDY, **options))


def test_enable_and_disable(model: PreTrainedModel, expected: Tensor):
    attributes = set(vars(model))
    assert specdec.enable(model, drafter=SmallModel(model, num_tokens=4)) is model
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert with_stats(model).tokens_per_round > 4
    assert specdec.disable(model) is model
    assert set(vars(model)) == attributes
    assert not isinstance(model.generate(PROMPT, return_dict_in_generate=True, **GREEDY), specdec.SpeculativeOutput)


def test_twice_is_fine_and_the_last_one_counts(model: PreTrainedModel, expected: Tensor):
    specdec.enable(model, drafter=SmallModel(model, num_tokens=4))
    specdec.enable(model, drafter=Plain())
    assert with_stats(model).num_drafted == 0
    specdec.disable(model)
    specdec.disable(model)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)


def test_a_call_overrides(model: PreTrainedModel):
    specdec.enable(model, drafter=SmallModel(model, num_tokens=4))
    assert with_stats(model, drafter=Plain()).num_drafted == 0
    assert set(with_stats(model, tree=Chain(2)).accepted_histogram) <= {0, 1, 2}
    assert with_stats(model).tokens_per_round > 4


def test_a_smaller_model_as_drafter(model: PreTrainedModel, expected: Tensor):
    draft = tiny_model("llama", seed=9, num_hidden_layers=1)
    specdec.enable(model, drafter=draft, tree=Chain(3))
    out = model.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert out.stats.draft_forwards > 0


def test_the_arguments_of_generate_by_position(model: PreTrainedModel, expected: Tensor):
    config = copy.deepcopy(model.generation_config)
    config.update(**GREEDY)
    specdec.enable(model)
    assert torch.equal(model.generate(PROMPT, config), expected)
    assert torch.equal(model.generate(PROMPT, config, None, None), expected)
    assert torch.equal(specdec.generate(model, PROMPT, **GREEDY), expected)


def test_the_signature_is_that_of_transformers(model: PreTrainedModel):
    names = list(inspect.signature(model.generate).parameters)
    specdec.enable(model)
    assert list(inspect.signature(model.generate).parameters) == names
    assert model.generate.__doc__ == type(model).generate.__doc__


def test_what_is_refused_is_refused_at_once(model: PreTrainedModel):
    attributes = set(vars(model))
    for options in ({"drafter": "nonsense"}, {"tree": 3}, {"verify": "bottomup"}, {"unsupported": "guess"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            specdec.enable(model, **options)
    assert set(vars(model)) == attributes
    specdec.enable(model, unsupported="error")
    with pytest.raises(UnsupportedOptionError, match="beam_search is not possible"):
        model.generate(PROMPT, num_beams=2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "max_new_tokens": 8},
        {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY},
        {"cache_implementation": "static", **GREEDY},
        {"use_cache": False, **GREEDY},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_possible_is_left_to_the_model(
    model: PreTrainedModel, options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    expected = model.generate(PROMPT, **options)
    specdec.enable(model, drafter=SmallModel(model))
    for _ in range(3):
        out = model.generate(PROMPT, drafter=PromptLookup(), **options)
        assert type(out) is type(expected)
        for ids in (expected, out):
            assert isinstance(ids, Tensor) or len(ids.hidden_states) == 20
        assert torch.equal(getattr(out, "sequences", out), getattr(expected, "sequences", expected))
    with pytest.raises(UnsupportedOptionError):
        specdec.generate(model, PROMPT, **options)
    (warning,) = (record for record in caplog.records if record.name == "specdec")
    assert warning.getMessage().endswith("This call is left to the model's own generate(), not sped up")


def test_a_reason_is_told_once(model: PreTrainedModel, caplog: pytest.LogCaptureFixture):
    specdec.enable(model, drafter=PromptLookup())
    for options in ({"num_beams": 2}, {"use_cache": False}, {"num_beams": 3}, {"use_cache": False}):
        model.generate(PROMPT, max_new_tokens=4, **options)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["beam_search", "use_cache=False:"]


def test_a_prompt_is_streamed_once_also_by_a_call_that_is_left_to_the_model(model: PreTrainedModel):
    prompts = torch.tensor([[5, 7], [6, 8]])
    options = {"max_new_tokens": 3, "stopping_criteria": StoppingCriteriaList([RecordsCalls()]), "do_sample": False}
    plain, ours = Recording(), Recording()
    model.generate(prompts, streamer=plain, **options)
    specdec.enable(model, drafter=Plain()).generate(prompts, streamer=ours, **options)
    with pytest.raises(UnsupportedOptionError, match="rows of a batch"):
        specdec.generate(model, prompts, **options)
    assert ours.calls == plain.calls


def test_embeddings_that_the_draft_model_cannot_read(model: PreTrainedModel, expected: Tensor):
    embeds = model.get_input_embeddings()(PROMPT).detach()
    specdec.enable(model, drafter=SmallModel(model))
    out = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(out, expected[:, PROMPT.shape[1] :])


def test_what_only_specdec_has_is_never_dropped(model: PreTrainedModel):
    specdec.enable(model)
    beams = {"num_beams": 2, "max_new_tokens": 8}
    with pytest.raises(UnsupportedOptionError, match="beam_search"):
        model.generate(PROMPT, generator=torch.Generator().manual_seed(0), **beams)
    assert torch.equal(model.generate(PROMPT, generator=None, **beams), type(model).generate(model, PROMPT, **beams))


def test_wrong_arguments_are_told_as_ever(model: PreTrainedModel):
    specdec.enable(model)
    with pytest.raises(ValueError, match="prompts are padded to the left"):
        model.generate(PROMPT, attention_mask=torch.tensor([[1] * 18 + [0]]), **GREEDY)


def test_other_models_of_the_class_are_left_alone(model: PreTrainedModel):
    other = tiny_model("llama", seed=10)
    specdec.enable(model)
    out = other.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    assert not isinstance(out, specdec.SpeculativeOutput)


def test_a_copy_of_an_enabled_model_decodes_with_its_own_weights(model: PreTrainedModel, expected: Tensor):
    specdec.enable(model, drafter=PromptLookup(min_match=1))
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(PROMPT, **GREEDY), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5).add_(0.1)
    changed = specdec.disable(copy.deepcopy(twin)).generate(PROMPT, **GREEDY)
    assert not torch.equal(changed, expected)
    assert torch.equal(twin.generate(PROMPT, **GREEDY), changed)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)


def test_an_enabled_model_can_be_saved_and_loaded(model: PreTrainedModel, expected: Tensor, tmp_path: Any):
    specdec.enable(model, drafter=PromptLookup(min_match=1))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "generate" not in vars(loaded)
    assert torch.equal(loaded.generate(PROMPT, **GREEDY), expected)


# pipelines


def test_text_generation_pipeline(model: PreTrainedModel):
    prompts = ["round and round and", "up and down and up"]
    tokenizer = ByteTokenizer()
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = [plain(prompt, **GREEDY) for prompt in prompts]
    num_rounds = []

    def watched(sequences: Any) -> list[list[int]]:
        num_rounds.append(len(sequences))
        return [[1, 2]] * len(sequences)

    specdec.enable(model, drafter=ScriptedDrafter(watched))
    accelerated = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert [accelerated(prompt, **GREEDY) for prompt in prompts] == expected
    assert num_rounds, "the drafter was asked"


def test_a_pipeline_with_a_batch_and_a_conversation(model: PreTrainedModel):
    prompts = ["round and round and", "up", "once more unto the"]
    conversation = [{"role": "user", "content": "hi"}]
    options = {**GREEDY, "eos_token_id": 257, "pad_token_id": 256}

    def replies() -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            speaker = pipeline("text-generation", model=model, tokenizer=ByteTokenizer())
            return [speaker(prompts, batch_size=3, **options), speaker(conversation, **options)]

    expected = replies()
    specdec.enable(model, drafter=PromptLookup(min_match=1))
    assert replies() == expected


# what a call did


def test_the_statistics_of_the_last_call(model: PreTrainedModel):
    assert specdec.last_stats(model) is None
    specdec.enable(model, drafter=Plain())
    model.generate(PROMPT, **GREEDY)
    told = specdec.last_stats(model)
    assert told is not None
    assert (told.num_new_tokens, told.num_drafted) == (20, 0)
    model.generate(PROMPT, **GREEDY, num_beams=2)  # left to transformers
    assert specdec.last_stats(model) is None


def test_the_statistics_after_a_pipeline(model: PreTrainedModel):
    generator = pipeline("text-generation", model=specdec.enable(model), tokenizer=ByteTokenizer())
    generator("round and round", max_new_tokens=5, do_sample=False)
    stats = specdec.last_stats(generator.model)
    assert stats is not None
    assert stats.num_new_tokens == 5


def test_verbose_says_a_line_for_each_call(model: PreTrainedModel, capsys: pytest.CaptureFixture[str]):
    specdec.enable(model, verbose=True)
    model.generate(PROMPT, **GREEDY)
    model.generate(PROMPT, **GREEDY)
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("specdec: 20 tokens in ") for line in lines] == [True, True]


@pytest.mark.parametrize("name", ["prompt-lookup", "prompt-lookup:num_tokens=8", "plain", "quantized-self", "auto"])
def test_a_drafter_by_its_name(model: PreTrainedModel, expected: Tensor, name: str):
    assert torch.equal(specdec.generate(model, PROMPT, **GREEDY, drafter=name), expected)


def test_a_name_that_needs_a_model(model: PreTrainedModel):
    with pytest.raises(ValueError, match="pass the model itself"):
        specdec.generate(model, PROMPT, drafter="small-model")


def test_drafters_are_shown_by_the_names_of_the_commands(model: PreTrainedModel):
    shown = {
        "plain": Plain(),
        "prompt-lookup": PromptLookup(),
        "small-model": SmallModel(model),
        "auto": specdec.drafters.Auto(),
        "auto(small-model)": specdec.drafters.Auto(SmallModel(model)),
        "mixed(prompt-lookup, small-model)": specdec.drafters.Mixed([PromptLookup(), SmallModel(model)]),
        "quantized-self": specdec.drafters.QuantizedSelf(),
    }
    assert [repr(drafter) for drafter in shown.values()] == list(shown)
