"""Speculation on a quantised model says what that model itself says, whatever its layers look like.

Gemma 3 in int8 once gave another text in five of twelve prompts as soon as anything was drafted: its attention rounds
differently for four tokens than for one, and quantised activations turned a difference of 4e-7 into one of 1.4.
"""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import specdec
from specdec.drafters import PromptLookup, SmallModel
from specdec.hf import CACHE
from specdec.kernels import native
from specdec.kernels.model.prepared import prepared
from specdec.kernels.model.quantized_linear import LINEARS, QuantizedLinear
from specdec.testing import tiny_model
from trees import DySpec

FOREIGN_LAYERS = ("gemma3_text", "phi3", "olmo2", "gpt_neox", "cohere2")
NATIVE_LAYERS = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}

needs_native = pytest.mark.skipif(native.library() is None, reason=native.describe())


def ragged():
    ids = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 12:] = ids[0, :12]  # something for prompt lookup to find
    mask = torch.ones_like(ids)
    for row, num_padded in ((1, 15), (2, 4)):
        ids[row, :num_padded], mask[row, :num_padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def gap_between_widths(model):
    """The largest difference between the logits of four tokens together and of the same tokens one by one."""
    ids, past, ahead = ragged()["input_ids"][:1], DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (past, ahead):
            model(ids[:, :20], **{CACHE: cache})
        together = model(ids[:, 20:], **{CACHE: ahead}).logits
        steps = [model(ids[:, i : i + 1], **{CACHE: past}).logits for i in range(20, 24)]
    return (together - torch.cat(steps, 1)).abs().max().item()


@pytest.mark.parametrize("weights", LINEARS)
@pytest.mark.parametrize("family", FOREIGN_LAYERS)
def test_four_tokens_together_differ_from_four_alone_by_rounding_only(family, weights):
    model = specdec.prepare(tiny_model(family), weights=weights)
    assert prepared(model).activations == "float"
    assert gap_between_widths(model) < 1e-4


@pytest.mark.parametrize("weights", LINEARS)
def test_the_same_without_native_kernels(monkeypatch, weights):
    monkeypatch.setattr(native, "library", lambda: None)
    assert gap_between_widths(specdec.prepare(tiny_model("gemma3_text"), weights=weights)) < 1e-4


@needs_native
@pytest.mark.parametrize("weights", LINEARS)
def test_native_models_keep_quantised_activations_because_their_rows_are_bit_identical(weights):
    model = specdec.prepare(tiny_model("llama", **NATIVE_LAYERS), weights=weights)
    assert prepared(model).activations == "int8"
    assert prepared(model).num_fused_layers == 2
    assert gap_between_widths(model) == 0


@needs_native
@pytest.mark.parametrize("weights", LINEARS)
def test_one_foreign_product_is_enough_to_keep_all_activations_float(weights):
    model = tiny_model("llama", **NATIVE_LAYERS)
    model.model.layers[1].mlp.act_fn = nn.GELU()
    specdec.prepare(model, weights=weights)
    assert prepared(model).activations == "float"
    assert prepared(model).num_fused_layers == 0
    assert all(part.weight_only for part in model.modules() if isinstance(part, QuantizedLinear))


class Adapted(nn.Module):
    """A linear with an adapter of rank one."""

    def __init__(self, linear: nn.Module, size: int):
        super().__init__()
        self.linear = linear
        self.adapter = nn.Parameter(torch.randn(size, 1, generator=torch.Generator().manual_seed(2)) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.adapter) * self.adapter.sum()


@needs_native
@pytest.mark.parametrize("weights", LINEARS)
def test_an_adapter_in_one_layer_ends_quantised_activations_in_all(weights):
    model = specdec.prepare(tiny_model("llama", **NATIVE_LAYERS), weights=weights)
    model(ragged()["input_ids"])
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj, NATIVE_LAYERS["hidden_size"])
    model(ragged()["input_ids"])
    assert 0 < gap_between_widths(model) < 1e-4


DRAFTERS = {
    "prompt lookup": lambda: (PromptLookup(), None),
    "small model": lambda: (SmallModel(tiny_model("llama", seed=5)), None),
    "small model, tree": lambda: (SmallModel(tiny_model("llama", seed=5)), DySpec(budget=12)),
}
"""Drafters, and their trees."""


@pytest.mark.parametrize("weights", LINEARS)
@pytest.mark.parametrize(
    ("family", "sizes"), [("gemma3_text", {}), ("phi3", {}), ("llama", {}), ("qwen3", NATIVE_LAYERS)]
)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("rows", [slice(1), slice(3)], ids=["alone", "ragged"])
def test_greedy_output_is_the_quantised_models_own(family, sizes, weights, name, rows):
    model = specdec.prepare(tiny_model(family, **sizes), weights=weights)
    drafter, tree = DRAFTERS[name]()
    prompts = {key: value[rows] for key, value in ragged().items()}
    settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.1, "pad_token_id": 0}
    expected = model.generate(**prompts, **settings)
    assert torch.equal(specdec.generate(model, **prompts, **settings, drafter=drafter, tree=tree), expected)


@needs_native
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", LINEARS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1, 1), (17, 70), (130, 201)])
def test_weight_only_products_are_right_and_the_same_bits_in_every_batch(instruction_set, weights, n, k):
    library, best = native.library(), native.library().instruction_set
    try:
        library.select(instruction_set)
    except OSError as error:
        pytest.skip(str(error))
    try:
        linear, x_MK = nn.Linear(k, n), torch.randn(23, k, generator=torch.Generator().manual_seed(1))
        matrix = LINEARS[weights](linear).matrix()
        weight_NK = (library.linear(matrix, torch.eye(k), weight_only=True) - linear.bias).T
        assert (weight_NK - linear.weight).norm() < {"int8": 0.01, "int4": 0.1}[weights] * linear.weight.norm()
        expected_MN = x_MK @ weight_NK.T + linear.bias
        whole_MN = library.linear(matrix, x_MK, weight_only=True)
        torch.testing.assert_close(whole_MN, expected_MN, rtol=1e-5, atol=1e-5)
        for num_rows in (1, 2, 3, 4, 5, 9, 16):
            part_MN = library.linear(matrix, x_MK[7 : 7 + num_rows].contiguous(), weight_only=True)
            assert torch.equal(part_MN, whole_MN[7 : 7 + num_rows])
    finally:
        library.select(best)
