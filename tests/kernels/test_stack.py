"""Fused layers called without the model's own forward: the same states to the last bit, or not at all."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec.drafters import EarlyExit, Plain
from specdec.kernels import native
from specdec.kernels.model import linear as linears
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_views import LayerViews
from specdec.tree_model.model import TreeModel
from trees import ROOT, TokenTree, TreeBatch

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}
TREE = TokenTree(tokens=[5, 6, 7, 8], parents=[ROOT, ROOT, 1, 0])


@pytest.fixture(autouse=True)
def _native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float layers are fused where native products won a race: on a busy machine they may lose it."""
    monkeypatch.setattr(
        "specdec.kernels.model.prepare.calibrate", lambda _: dict.fromkeys(linears.BANDS, linears.NATIVE)
    )


def prepared(family: str = "llama", weights: str | None = None) -> PreTrainedModel:
    return specdec.prepare(tiny_model(family, **SIZES), weights)


@pytest.mark.parametrize("weights", [None, "int8"], ids=["float", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("lengths", [[9], [9, 4]], ids=["alone", "ragged"])
def test_logits_and_states_are_those_of_the_models_own_forward(
    family: str, weights: str | None, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = prepared(family, weights), random_prompts(lengths)
    trees, roots_B1 = TreeBatch.stack([TREE] * len(lengths)), torch.full((len(lengths), 1), 3)
    results = []
    for is_fused in (True, False):
        target = EarlyExitModel(model)
        if not is_fused:
            monkeypatch.setattr("specdec.tree_model.layer_views.stacks", lambda *_: False)
        assert target.views.uses_fused_layers == is_fused
        target.keep_states([2, 4])
        target.prefill(prompts["input_ids"], attention_mask=prompts["attention_mask"])
        logits = target.verify(trees, roots_B1)
        target.forget_tail()
        target.forward_below(2, roots_B1, torch.zeros_like(roots_B1), None)
        results.append([logits, target.verify(trees, roots_B1), *target.states.values()])
    assert all(map(torch.equal, *results))


def test_only_plain_stacks_of_fused_layers_are_called_directly() -> None:
    assert not LayerViews(tiny_model("llama", **SIZES)).uses_fused_layers, "nothing was prepared"
    assert not LayerViews(prepared("gemma2")).uses_fused_layers, "its layers are not fused"
    model = prepared()
    hook = model.register_forward_hook(lambda *_: None)
    assert not LayerViews(model).uses_fused_layers, "the hook would not run"
    hook.remove()
    assert LayerViews(model).uses_fused_layers


def test_a_model_that_does_more_than_its_layers_is_found_out() -> None:
    model = prepared()
    forward = model.forward
    model.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))

    def scaled(outputs):
        outputs.logits = outputs.logits * 0.5
        return outputs

    assert not LayerViews(model).uses_fused_layers


def test_positions_past_the_first_table() -> None:
    model = prepared()
    rotations = LayerViews(model)._rotations
    own = model.get_decoder().rotary_emb
    hidden_BTC = torch.zeros(1, 2, 128)
    for start in (0, 700, 3, 5000):
        position_ids = torch.tensor([[start, start + 1]])
        assert all(map(torch.equal, rotations(hidden_BTC, position_ids), own(hidden_BTC, position_ids)))


@pytest.mark.parametrize("weights", [None, "int8"], ids=["float", "int8"])
def test_generation_is_the_models_own(weights: str | None) -> None:
    model, prompts = prepared(weights=weights), random_prompts([9, 4, 12, 1])
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**prompts, **settings)
    for drafter in (Plain(), EarlyExit(2)):
        out = specdec.generate(model, **prompts, drafter=drafter, **settings)
        assert_same_tokens(model, expected, out, prompts["attention_mask"])


@pytest.mark.skipif(native.library() is None, reason="fused layers are native")
@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_weights_that_move_in_a_run_stay_readable_and_count_in_the_next(weights: str | None) -> None:
    model = specdec.prepare(tiny_model("llama", num_hidden_layers=2, hidden_size=64, head_dim=32), weights=weights)
    prompt, token, at_once = torch.tensor([[1, 2, 3]]), torch.tensor([[4]]), torch.zeros(1, 1, dtype=torch.long)

    def begun() -> TreeModel:
        target = TreeModel(model)
        target.prefill(prompt)
        return target

    def said(target: TreeModel) -> torch.Tensor:
        logits = target.forward(token, at_once, None)
        target.forget_tail()
        return logits

    running = begun()
    before = said(running)
    for norm in (layer.input_layernorm for layer in model.model.layers):
        norm.weight.data = norm.weight.data * 2
    refill = [torch.full_like(layer.input_layernorm.weight, 1e3) for layer in model.model.layers]  # what was freed
    assert torch.equal(said(running), before), f"{len(refill)} tensors lie where the old weights were"
    expected = model(torch.cat([prompt, token], 1)).logits[:, -1:]
    assert not torch.equal(said(begun()), before)
    assert torch.allclose(said(begun()), expected, atol=2e-3 if weights is None else 0.1)
