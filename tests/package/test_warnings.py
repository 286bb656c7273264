"""Nothing that specdec does warns by itself, and the cache goes under the name of the installed transformers.

5.24 took the old name of the cache with a warning, which `python -W error` makes an error; of outputs it logs.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import specdec
from specdec.hf import CACHE
from specdec.kernels.model.layer import FusedLayer
from specdec.testing import tiny_model

PROMPT = torch.tensor([list(b"a rose is a rose is a")])
GREEDY = {"max_new_tokens": 8, "do_sample": False}
NAMES = ("cache", "past_key_values")

PUBLIC_PATH = """
import torch
from transformers import DynamicCache, GenerationConfig, pipeline

import specdec
from specdec.cli.chat.conversation import Conversation
from specdec.drafters import EarlyExit, PromptLookup, SmallModel
from specdec.engine import Engine, Request
from specdec.testing import ByteTokenizer, tiny_model

torch.set_num_threads(1)
tokenizer = ByteTokenizer()
ids = torch.tensor([list(b"a rose is a rose is a")])
greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}

def decode(model, **options):
    return specdec.generate(model, ids, attention_mask=torch.ones_like(ids), **greedy, **options)

model = tiny_model("llama", num_hidden_layers=3, hidden_size=128, intermediate_size=192)  # layers that can be fused
expected = decode(model)
for name in ("cache", "past_key_values"):
    out = decode(model, drafter=SmallModel(model), return_dict_in_generate=True, **{name: DynamicCache()})
    assert torch.equal(out.sequences, expected)
assert torch.equal(decode(model, drafter=EarlyExit(exit_layer=1)), expected)

specdec.enable(model, drafter=PromptLookup())
pipeline("text-generation", model=model, tokenizer=tokenizer)("a rose is", **greedy)
specdec.disable(model)

engine = Engine(model, drafter=SmallModel(model), tokenizer=tokenizer)
generation = engine.submit(Request(prompt=ids[0].tolist(), config=GenerationConfig(**greedy)))
engine.run()
assert generation.tokens == expected[0, ids.shape[1]:].tolist()

conversation = Conversation(model, tokenizer, drafter=PromptLookup())
for _ in range(2):
    conversation.say("hi", max_new_tokens=8, generation_kwargs={"do_sample": False}, show=lambda pieces: None)

specdec.prepare(model, weights="int8")
for drafter in ("auto", EarlyExit(exit_layer=1)):
    decode(model, drafter=drafter)
print("done")
"""


def test_no_warnings():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PUBLIC_PATH], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    ours = [line for line in done.stderr.splitlines() if "_pytree.py" not in line]  # torchao's, where it is installed
    assert "deprecated" not in "\n".join(ours)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_under_either_name(model: PreTrainedModel, name: str):
    expected = model.generate(PROMPT, **GREEDY)
    for decode in (specdec.generate, lambda model, *args, **kwargs: specdec.enable(model).generate(*args, **kwargs)):
        ours = DynamicCache(config=model.config)
        out = decode(model, PROMPT, **{name: ours}, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, expected)
        assert out[CACHE] is out.past_key_values is ours
        assert ours.get_seq_length() == expected.shape[1] - 1
    specdec.disable(model)


def test_none_under_one_of_the_names(model: PreTrainedModel):
    ours = DynamicCache(config=model.config)
    out = specdec.generate(model, PROMPT, cache=None, past_key_values=ours, **GREEDY)
    assert ours.get_seq_length() == out.shape[1] - 1
    assert torch.equal(specdec.generate(model, PROMPT, cache=None, past_key_values=None, **GREEDY), out)


def test_two_caches_are_refused(model: PreTrainedModel):
    with pytest.raises(ValueError, match="two names of one argument"):
        specdec.generate(model, PROMPT, cache=DynamicCache(), past_key_values=DynamicCache(), **GREEDY)


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_layer_takes_the_cache_under_either_name(name: str):
    """As the layer's own forward does in 5.24: code of other people's may still say `past_key_values`."""
    model = specdec.prepare(tiny_model("llama", hidden_size=128, intermediate_size=192))
    fused = [layer.forward for layer in model.model.layers if isinstance(layer.__dict__.get("forward"), FusedLayer)]
    if not fused:
        pytest.skip("no native kernels")
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    rotation = torch.ones(1, 1, head_dim), torch.zeros(1, 1, head_dim)
    cache = DynamicCache()
    fused[0](torch.zeros(1, 1, model.config.hidden_size), position_embeddings=rotation, **{name: cache})
    assert cache.get_seq_length() == 1
