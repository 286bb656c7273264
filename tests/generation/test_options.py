"""Every wrong call gives one clear error, and leaves the model as it was and usable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import specdec
from specdec.drafters import Plain, PromptLookup, SmallModel
from specdec.errors import DraftError, NumericalError, UnsupportedModelError, UnsupportedOptionError
from specdec.hf import CACHE
from specdec.testing import tiny_model
from trees import ROOT, Chain, TokenTree

PROMPT = torch.tensor([list(b"wrong?")])
PROMPTS = PROMPT.repeat(2, 1)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


class NeverStops(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=7)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, **GREEDY)


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a call could have left changed: both configurations, attributes, hooks and weights."""
    return (
        copy.deepcopy(model.config.to_dict()),
        copy.deepcopy(model.generation_config.to_dict()) if model.can_generate() else None,
        {name: id(value) for name, value in vars(model).items()},
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [parameter._version for parameter in model.parameters()],
    )


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=32)


def cache_of_three_rows(model: PreTrainedModel) -> DynamicCache:
    return model(torch.ones((3, 4), dtype=torch.long), use_cache=True)[CACHE]


WRONG_CALLS: dict[str, tuple[dict[str, Any] | Callable[[PreTrainedModel], dict[str, Any]], type[Exception], str]] = {
    # prompts and masks
    "ids are floats": ({"inputs": PROMPT.float()}, ValueError, "int64 token ids, got torch.float32"),
    "ids are bools": ({"input_ids": PROMPT.bool()}, ValueError, "int64 token ids, got torch.bool"),
    "ids are a list": ({"inputs": PROMPT.tolist()}, ValueError, "return_tensors='pt'"),
    "ids without rows": ({"inputs": PROMPT[0]}, ValueError, "[rows, tokens], got shape (6,)"),
    "ids with three axes": ({"inputs": PROMPT[None]}, ValueError, "[rows, tokens], got shape (1, 1, 6)"),
    "an empty prompt": ({"inputs": PROMPT[:, :0]}, ValueError, "the prompt is empty"),
    "an empty batch": ({"inputs": PROMPT[:0]}, ValueError, "the prompt is empty"),
    "an id past the vocabulary": ({"inputs": PROMPT + 200}, ValueError, "outside the model's vocabulary of 259"),
    "a negative id": ({"inputs": PROMPT - 64}, ValueError, "token id -1 is outside"),
    "a prompt past the context": (
        {"inputs": PROMPT.repeat(1, 50)},
        UnsupportedOptionError,
        "the prompt has 300 tokens but LlamaForCausalLM has 256 positions",
    ),
    "two prompts": ({"inputs": PROMPT, "input_ids": PROMPT}, ValueError, "passed alongside"),
    "right padding": (
        {"inputs": PROMPTS, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])},
        ValueError,
        "padded to the left",
    ),
    "a mask that is too short": ({"attention_mask": torch.ones(1, 5)}, ValueError, "(1, 5) but input_ids are (1, 6)"),
    "a mask of too few rows": (
        {"inputs": PROMPTS, "attention_mask": torch.ones(1, 6)},
        ValueError,
        "(1, 6) but input_ids are (2, 6)",
    ),
    "a mask of four axes": ({"attention_mask": torch.ones(1, 1, 6, 6)}, ValueError, "one entry a token"),
    "a mask of other numbers": ({"attention_mask": PROMPT}, ValueError, "something else than 0 and 1"),
    # options of transformers that contradict themselves: its own messages
    "an unknown option": ({"max_new_token": 5}, ValueError, "not used by the model: ['max_new_token']"),
    "an input of another family": ({"token_type_ids": PROMPT * 0}, ValueError, "not used by the model"),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be greater than 0"),
    "a temperature of zero": ({"do_sample": True, "temperature": 0.0}, ValueError, "`temperature`"),
    "greedy return sequences": ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
    "no generation config": ({"generation_config": {"max_new_tokens": 5}}, ValueError, "GenerationConfig, got dict"),
    # options that speculation does not honour
    "beams": ({"num_beams": 2}, UnsupportedOptionError, "beams have no draft to verify"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, UnsupportedOptionError, "use num_beams=1"),
    "groups of beams": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        UnsupportedOptionError,
        "beam",
    ),
    "beams in a config": (
        {"generation_config": GenerationConfig(num_beams=3)},
        UnsupportedOptionError,
        "beam_search is not possible",
    ),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedOptionError, "remove penalty_alpha"),
    "DoLa": ({"dola_layers": "high"}, UnsupportedOptionError, "DoLa is another decoding method"),
    "an assistant": (lambda model: {"assistant_model": model}, UnsupportedOptionError, "pass it as drafter="),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, UnsupportedOptionError, "specdec.drafters.PromptLookup("),
    "early exit": ({"assistant_early_exit": 1}, UnsupportedOptionError, "specdec.drafters.EarlyExit("),
    "prediction heads": ({"use_mtp": True}, UnsupportedOptionError, "use_mtp=True is not possible"),
    "no cache": ({"use_cache": False}, UnsupportedOptionError, "verified on a cache"),
    "a static cache by name": ({"cache_implementation": "static"}, UnsupportedOptionError, "'static'"),
    "paged generation": ({"cache_implementation": "paged"}, UnsupportedOptionError, "'paged'"),
    "a static cache": (lambda model: {CACHE: static_cache(model)}, UnsupportedOptionError, "StaticCache"),
    "a cache of other rows": (
        lambda model: {CACHE: cache_of_three_rows(model)},
        UnsupportedOptionError,
        "holds 3 rows but the input has 1",
    ),
    "guidance": ({"guidance_scale": 1.5}, UnsupportedOptionError, "guidance runs a second model pass"),
    "a negative prompt": ({"negative_prompt_ids": PROMPT}, UnsupportedOptionError, "negative_prompt_ids is not"),
    "a decoding method": ({"custom_generate": print}, UnsupportedOptionError, "custom_generate is not possible"),
    "synchronised GPUs": ({"synced_gpus": True}, UnsupportedOptionError, "synced_gpus is not possible"),
    "attentions": ({"output_attentions": True}, UnsupportedOptionError, "output_attentions=True is not possible"),
    "hidden states": ({"output_hidden_states": True}, UnsupportedOptionError, "output_hidden_states=True is not"),
    "token healing": ({"token_healing": True}, UnsupportedOptionError, "heal the prompt first"),
    "stop strings without tokenizer": ({"stop_strings": ["a"]}, ValueError, "pass tokenizer="),
    "rows without padding": (
        {"inputs": PROMPTS, "stopping_criteria": StoppingCriteriaList([NeverStops()])},
        UnsupportedOptionError,
        "pass eos_token_id=",
    ),
    # what only specdec has
    "a drafter by name": (
        {"drafter": "nonsense"},
        ValueError,
        "drafter='nonsense': pass a specdec.drafters instance",
    ),
    "a drafter's class": ({"drafter": PromptLookup}, ValueError, "pass a specdec.drafters instance"),
    "a draft of another tokenizer": (
        lambda model: {"drafter": tiny_model("llama", vocab_size=128)},
        DraftError,
        "a vocabulary of 128 and the target one of 259",
    ),
    "a draft model without ids": (
        lambda model: {
            "inputs": None,
            "inputs_embeds": model.get_input_embeddings()(PROMPT).detach(),
            "drafter": SmallModel(model),
        },
        UnsupportedOptionError,
        "pass input_ids",
    ),
    "a tree that is one": ({"tree": TokenTree.chain([1, 2])}, ValueError, "pass a growth policy"),
    "a tree that is a number": ({"tree": 5}, ValueError, "trees.Chain(5)"),
    "an unknown verification": ({"verify": "bottomup"}, ValueError, "it is 'topdown' or 'traversal'"),
    "a router": ({"router": object()}, ValueError, "pass a router such as"),
    "a seed for a generator": ({"generator": 42}, ValueError, "torch.Generator"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_and_leaves_no_trace(model: PreTrainedModel, expected: Tensor, name: str):
    options, error, fragment = WRONG_CALLS[name]
    options = options(model) if callable(options) else options
    prompt = {} if "input_ids" in options else {"inputs": PROMPT}
    before = state_of(model)
    with pytest.raises(error) as raised:
        specdec.generate(model, **{**prompt, "drafter": Plain(), **GREEDY, **options})
    assert fragment in str(raised.value)
    assert state_of(model) == before
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert torch.equal(specdec.generate(model, PROMPT, drafter=SmallModel(model), **GREEDY), expected)


@pytest.mark.parametrize("options", [{"max_new_token": 5}, {"tempratur": 0.3}, {"max_new_tokens": 0}], ids=str)
def test_what_transformers_refuses_it_refuses_in_its_own_words(model: PreTrainedModel, options: dict[str, Any]):
    messages = []
    for decode in (type(model).generate, specdec.generate):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (the messages are compared)
            decode(model, PROMPT, **{**GREEDY, **options})
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_an_input_that_drafted_tokens_would_need_too():
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedOptionError, match="continue these model inputs over drafted tokens: token_type_ids"):
        specdec.generate(model, PROMPT, token_type_ids=torch.ones_like(PROMPT), **GREEDY)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", [Plain(), PromptLookup(min_match=1)], ids=["Plain", "PromptLookup"])
def test_logits_that_are_no_numbers(model: PreTrainedModel, expected: Tensor, drafter: Any, options: dict[str, Any]):
    weight = model.lm_head.weight.data
    kept = weight[5, 5].clone()
    weight[5, 5] = torch.nan
    try:
        with pytest.raises(NumericalError, match="check the weights and the dtype"):
            specdec.generate(model, PROMPT, drafter=drafter, **{**GREEDY, **options})
    finally:
        weight[5, 5] = kept
    assert torch.equal(specdec.generate(model, PROMPT, drafter=drafter, **GREEDY), expected)


# objects that cannot be made


WRONG_OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "lookup of nothing": (lambda: PromptLookup(num_tokens=0), "num_tokens is a positive integer"),
    "lookup without match": (lambda: PromptLookup(min_match=0), "min_match is a positive integer"),
    "lookup without room": (lambda: PromptLookup(tokens_per_match=0), "tokens_per_match is a positive integer"),
    "lookup of fractions": (lambda: PromptLookup(num_tokens=2.5), "PromptLookup(num_tokens=2.5)"),
    "lookup in text": (lambda: PromptLookup(corpus=["some text"]), "tokenizer(text).input_ids"),
    "lookup in negative ids": (lambda: PromptLookup(corpus=[[1, -1]]), "sequence of token ids"),
    "an empty chain": (lambda: Chain(0), "length is a positive integer"),
    "a chain by name": (lambda: Chain("5"), "Chain(length='5')"),
    "a parent after its child": (lambda: TokenTree(tokens=[1, 2], parents=[1, ROOT]), "before their children"),
    "its own parent": (lambda: TokenTree(tokens=[1], parents=[0]), "node 0 names parent 0"),
    "a parent before the root": (lambda: TokenTree(tokens=[1], parents=[-2]), "names parent -2"),
    "too few parents": (lambda: TokenTree(tokens=[1, 2], parents=[ROOT]), "a tree of 2 tokens needs as many parents"),
    "too many probabilities": (lambda: TokenTree.chain([1], probs=[0.5, 0.5]), "needs as many probs, got 2"),
    "an empty draft": (lambda: SmallModel(tiny_model("llama"), num_tokens=0), "length is a positive integer"),
}


@pytest.mark.parametrize("name", WRONG_OBJECTS)
def test_an_object_that_cannot_work_is_not_made(name: str):
    make, fragment = WRONG_OBJECTS[name]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is looked at)
        make()
    assert fragment in str(raised.value)


# models that cannot be decoded by tree


def rwkv() -> PreTrainedModel:
    config = AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    return AutoModelForCausalLM.from_config(config).eval()


def t5() -> PreTrainedModel:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def bloom() -> PreTrainedModel:
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config).eval()


def headless() -> PreTrainedModel:
    return AutoModel.from_config(tiny_model("llama").config).eval()


def flash() -> PreTrainedModel:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    return model


def compressed() -> PreTrainedModel:
    return tiny_model("deepseek_v4", head_dim=8)


UNSUPPORTED_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "recurrent": (rwkv, "RwkvForCausalLM keeps a recurrent state"),
    "encoder-decoder": (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    "ALiBi": (bloom, "BloomForCausalLM derives its ALiBi positions"),
    "without head": (headless, "LlamaModel has no language-modelling head: load it with AutoModelForCausalLM"),
    "flash attention": (flash, "load the model with attn_implementation='sdpa'"),
    "compressed": (compressed, "keeps a DeepseekV4HCACache"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_MODELS)
def test_a_model_that_cannot_be_decoded_by_tree(name: str):
    make, fragment = UNSUPPORTED_MODELS[name]
    unsupported, target = make(), tiny_model("llama", vocab_size=64)
    before = state_of(unsupported)
    for call in (
        lambda: specdec.generate(unsupported, PROMPT % 64, **GREEDY),
        lambda: specdec.enable(unsupported),
        lambda: specdec.generate(target, PROMPT % 64, drafter=unsupported, **GREEDY),
    ):
        with pytest.raises(UnsupportedModelError) as raised:
            call()
        assert fragment in str(raised.value)
    assert state_of(unsupported) == before


@pytest.mark.parametrize("thing", ["gpt2", None, torch.nn.Linear(2, 2)], ids=["name", "None", "module"])
def test_something_that_is_no_model(thing: Any):
    with pytest.raises(ValueError, match="model is a transformers PreTrainedModel"):
        specdec.generate(thing, PROMPT)


# what looks wrong but is not


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": None},
        {"synced_gpus": False},
        {"assistant_model": None},
        {"cache_implementation": "dynamic"},
        {"num_beams": 1},
        {"output_attentions": False},
        {"attention_mask": None},
        {"streamer": None, "stopping_criteria": None, "logits_processor": None},
        {"attention_mask": torch.ones_like(PROMPT).bool()},
        {"attention_mask": torch.ones_like(PROMPT).float()},
        {"tokenizer": object()},
        {"use_cache": True},
        {"drafter": "auto"},
        {"generator": torch.Generator()},
    ],
    ids=lambda options: ", ".join(f"{name}={value!r:.20}" for name, value in options.items()),
)
def test_a_harmless_option_is_accepted(model: PreTrainedModel, expected: Tensor, options: dict[str, Any]):
    assert torch.equal(specdec.generate(model, PROMPT, **GREEDY, **options), expected)
