"""Quantised layers are native for any number of rows: how a prompt is cut, and who comes with it, changes no bit.

Forwards of more than 1,024 rows went to transformers' layers, which round otherwise: answers of a batch of 16 differed
from those one by one.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import Plain
from specdec.kernels import native
from specdec.kernels.model.quantized_linear import LINEARS
from specdec.kernels.model.stack import is_fused
from specdec.testing import random_prompts, tiny_model
from specdec.tree_model.model import TreeModel

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())


@pytest.fixture(params=native.INSTRUCTION_SETS)
def library(request):
    best = native.library().instruction_set
    try:
        native.library().select(request.param)
    except OSError as error:
        pytest.skip(str(error))
    yield native.library()
    native.library().select(best)


@cache
def quantized_model(weights: str = "int8") -> PreTrainedModel:
    model = tiny_model(
        "llama",
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    specdec.prepare(model, weights=weights)
    assert all(map(is_fused, model.model.layers))
    return model


@torch.no_grad()
def read(prompt_1P: Tensor, chunks: list[int], weights: str) -> list[Tensor]:
    """Keys and values of a prompt that is read in these chunks, and the logits after one token more."""
    target = TreeModel(quantized_model(weights))
    target.begin(1)
    for chunk_1T in prompt_1P.split(chunks, 1):
        target.read(chunk_1T)
    states = [part.clone() for layer in target.cache.row_views(0).slots for part in layer]
    none_11 = torch.zeros((1, 1), dtype=torch.long)
    return [*states, target.forward(none_11 + 5, none_11, None)]


@pytest.mark.parametrize("weights", LINEARS)
def test_a_prompt_in_one_forward_is_the_prompt_in_chunks(library, weights):
    prompt_1P = random_prompts([1500], vocab_size=64)["input_ids"]
    whole = read(prompt_1P, [1500], weights)
    for chunks in ([1499, 1], [512, 512, 476], [100] * 15, [700, 16, 17, 3, 64, 700]):
        for ours, expected in zip(read(prompt_1P, chunks, weights), whole, strict=True):
            assert torch.equal(ours, expected), chunks


@torch.no_grad()
def test_what_the_model_itself_says_of_a_long_prompt_is_the_same(library):
    """transformers' own forward, which `generate()` runs, calls the same layers."""
    input_ids = random_prompts([1500], vocab_size=64)["input_ids"]
    model = quantized_model()
    whole_1PV = model(input_ids).logits
    assert torch.equal(whole_1PV[:, :40], model(input_ids[:, :40]).logits)
    assert torch.equal(whole_1PV[:, -1:], model(input_ids, logits_to_keep=1).logits)


@torch.no_grad()
def test_a_long_forward_of_several_padded_rows(library):
    """Blocks of rows begin and end within a row of the batch, and each row has a mask of its own."""
    model, inputs = quantized_model(), random_prompts([700, 650, 41], vocab_size=64)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits_BPV = model(**inputs, position_ids=position_ids).logits
    for row, length in enumerate((700, 650, 41)):
        alone_1P = inputs["input_ids"][row : row + 1, -length:]
        assert torch.equal(logits_BPV[row : row + 1, -length:], model(alone_1P).logits)


@pytest.mark.parametrize("weights", LINEARS)
def test_a_batch_of_16_says_what_each_says_alone(weights):
    model, lengths = quantized_model(weights), [90 + 3 * row for row in range(16)]
    inputs = random_prompts(lengths, vocab_size=64)
    assert inputs["input_ids"].numel() > 1024
    settings = {"max_new_tokens": 12, "do_sample": False, "drafter": Plain()}
    together = specdec.generate(model, **inputs, **settings)[:, -12:]
    for row, length in enumerate(lengths):
        alone = specdec.generate(model, inputs["input_ids"][row : row + 1, -length:], **settings)
        assert torch.equal(together[row], alone[0, -12:])


@pytest.mark.parametrize("weights", LINEARS)
@pytest.mark.parametrize("num_rows", [15, 16, 17, 63, 64, 65, 200])
def test_products_of_many_rows_are_those_of_each(library, num_rows, weights):
    """AVX2 widens weights and rows to 16 bits where they are many."""
    linear, x_MK = LINEARS[weights](torch.nn.Linear(350, 90)), torch.randn(num_rows, 350)
    assert torch.equal(linear(x_MK), torch.cat([linear(row_K[None]) for row_K in x_MK]))


MASKS = {
    "causal": lambda B, H, T, S: None,
    "bool": lambda B, H, T, S: torch.rand(B, 1, T, S) < 0.5,
    "by head": lambda B, H, T, S: torch.rand(B, H, T, S) < 0.5,
    "padded": lambda B, H, T, S: torch.ones(B, 1, T, S).tril(S - T).bool() & (torch.arange(S) >= 5),
    "blind queries": lambda B, H, T, S: torch.rand(B, 1, T, S).lt(0.5) & (torch.arange(T) % 3 > 0).unsqueeze(1),
    "additive": lambda B, H, T, S: torch.where(torch.rand(B, 1, T, S) < 0.5, 0.0, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("num_tokens", "num_keys"), [(5, 200), (15, 141), (16, 16), (33, 40), (70, 257)])
def test_attention_of_many_queries_is_that_of_each(library, kind, num_tokens, num_keys):
    """Many have queries in the lanes of their vectors, a few have keys there."""
    B, K, H, D = 2, 2, 6, 64
    query_BTHD = torch.randn(B, num_tokens, H, D)
    key_BKSD, value_BKSD = torch.randn(2, B, num_keys, K, D).transpose(2, 3)
    mask = MASKS[kind](B, H, num_tokens, num_keys)

    def attend(token: slice, num_seen: int) -> Tensor:
        part = query_BTHD[:, token].contiguous()
        key, value = key_BKSD[:, :, :num_seen], value_BKSD[:, :, :num_seen]
        own_mask = None if mask is None else mask[:, :, token]
        return library.attend(part, native.attention(part, key, value, own_mask, 0.125))

    whole = attend(slice(None), num_keys)
    for token in range(num_tokens):
        num_seen = num_keys if mask is not None else num_keys - num_tokens + token + 1
        assert torch.equal(attend(slice(token, token + 1), num_seen), whole[:, token : token + 1])


@pytest.mark.parametrize("num_tokens", [1, 3, 200])
def test_tiles_of_several_threads_do_not_meet(library, num_tokens):
    """Nor do slices of the values that a few queries mix."""
    before = torch.get_num_threads()
    query_BTHD, key_BKSD, value_BKSD = (
        torch.randn(2, num_tokens, 10, 64),
        torch.randn(2, 2, 300, 64),
        torch.randn(2, 2, 300, 64),
    )
    native.library().use_all_threads(True)
    try:
        outputs = []
        for num_threads in (1, 2, 3, 16, 2):
            torch.set_num_threads(num_threads)
            attention = native.attention(query_BTHD, key_BKSD, value_BKSD, None, 0.125)
            outputs.append(library.attend(query_BTHD, attention))
    finally:
        native.library().use_all_threads(False)
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
