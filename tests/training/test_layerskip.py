"""The LayerSkip recipe: its formulas, what it does to a model, and that it can be interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import EarlyExit
from specdec.testing import assert_same_tokens, tiny_model
from specdec.training.heads.layerskip import LayerSkipRecipe, LayerSkipTrainer

NUM_LAYERS = 4


def new_model(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, num_hidden_layers=NUM_LAYERS, initializer_range=0.02)


def cycles(step: int) -> Tensor:
    """Rows that count to 9 and begin again: int64 [B, T]."""
    starts_B = torch.randint(10, (8,), generator=torch.Generator().manual_seed(step))
    return (starts_B[:, None] + torch.arange(24)) % 10


def test_weights_of_the_losses_follow_the_paper() -> None:
    # all exits in every step: 1, 1 + 2, 1 + 2 + 3 and, for the last layer, L - 1 more than the one before it
    recipe = LayerSkipRecipe(num_steps=1, exit_period=1, exit_scale=1.0)
    assert recipe.exit_weights(0, 4) == pytest.approx({1: 1 / 19, 2: 3 / 19, 3: 6 / 19, 4: 9 / 19})
    without_exits = LayerSkipRecipe(num_steps=1, exit_period=1, exit_scale=0.0).exit_weights(0, 4)
    assert without_exits == {1: 0, 2: 0, 3: 0, 4: 1}


def test_every_exit_has_its_turn() -> None:
    recipe = LayerSkipRecipe(num_steps=1, exit_period=3)
    turns = [set(recipe.exit_weights(step, 8)) - {8} for step in range(3)]
    assert set.union(*turns) == set(range(1, 8))
    assert sum(map(len, turns)) == 7, "each once in a period"
    assert recipe.exit_weights(0, 8) == recipe.exit_weights(3, 8)


def test_dropout_grows_with_depth() -> None:
    recipe = LayerSkipRecipe(num_steps=1, max_dropout=0.2)
    chances = [recipe.dropout(depth, 16) for depth in range(1, 17)]
    assert chances[0] == 0
    assert chances[-1] == pytest.approx(0.2)
    assert chances[8] == pytest.approx(0.2 * (2 ** (8 / 15) - 1))


def test_loss_is_that_of_each_exit_through_the_models_own_head() -> None:
    model, tokens_BT = new_model(), cycles(0)
    recipe = LayerSkipRecipe(num_steps=1, exit_period=1, max_dropout=0.0)
    with torch.no_grad():
        states = model(tokens_BT, output_hidden_states=True).hidden_states
        expected = {}
        for depth in range(1, NUM_LAYERS):
            logits_BTV = model.lm_head(model.model.norm(states[depth]))
            expected[depth] = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).item()
        last = model(tokens_BT, labels=tokens_BT).loss.item()
    losses = LayerSkipTrainer(model, recipe).advance(tokens_BT)
    assert losses.last == pytest.approx(last, rel=1e-2)  # the training may run in bfloat16
    assert losses.exits == pytest.approx(expected, rel=1e-2)


def test_skipped_layers_leave_a_row_as_it_was() -> None:
    model, tokens_BT = new_model(), cycles(0)
    recipe = LayerSkipRecipe(num_steps=1, exit_period=1, max_dropout=0.999)
    last = model.model.layers[-1]
    seen: list[Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        for part in (last, model.model.norm)
    ]
    LayerSkipTrainer(model, recipe).advance(tokens_BT)
    for hook in hooks:
        hook.remove()
    before_BTC, after_BTC = seen[:2]
    assert torch.equal(before_BTC, after_BTC), "all rows skip the last layer with this seed"
    assert not last._forward_hooks, "nothing is left on the model"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_early_exits_learn_to_draft(family: str) -> None:
    model = new_model(family)
    trainer = LayerSkipTrainer(model.train(), LayerSkipRecipe(num_steps=60, learning_rate=1e-2, exit_period=2))
    for step in range(60):
        losses = trainer.advance(cycles(step))
    assert losses.last < 0.3
    model.eval().requires_grad_(False)
    prompt = cycles(0)[:1, :12]
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    out = specdec.generate(
        model, prompt, drafter=EarlyExit(1, num_tokens=4), max_new_tokens=24, return_dict_in_generate=True
    )
    assert_same_tokens(model, plain, out.sequences)
    assert out.stats.acceptance_rate > 0.9


def test_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    recipe = LayerSkipRecipe(num_steps=6)
    whole = LayerSkipTrainer(new_model().train(), recipe)
    for step in range(6):
        expected = whole.advance(cycles(step))
    first = LayerSkipTrainer(new_model().train(), recipe)
    for step in range(3):
        first.advance(cycles(step))
    first.save(tmp_path / "state.safetensors")
    second = LayerSkipTrainer(new_model().train(), recipe)
    second.load(tmp_path / "state.safetensors")
    assert second.step == 3
    for step in range(3, 6):
        actual = second.advance(cycles(step))
    assert actual == expected


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"exit_period": 0}, {"max_dropout": 1.0}])
def test_impossible_recipes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LayerSkipRecipe(**{"num_steps": 1, **wrong})
