"""EAGLE-3 heads and MTP layers are trained on what they compute while drafting, and are written as others read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from specdec import UnsupportedModelError
from specdec.cli.app import app
from specdec.drafters import DraftHead
from specdec.drafters.head.runner import HeadRunner
from specdec.testing import ByteTokenizer, assert_same_tokens, tiny_model
from specdec.training.heads.chains import ChainTrainer, by_chain
from specdec.training.heads.collect import Collector, self_generation
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.export import save_head
from specdec.training.heads.head_report import measure_head
from specdec.training.heads.recipes import EagleRecipe, JumpRecipe, MtpRecipe
from specdec.training.heads.run import HeadTraining, Source
from specdec.tree_model.model import TreeModel
from tests.support.references import plain_alone, speculate

LENGTH, ROWS, NUM_LAYERS = 48, 4, 3
LAYERS = {"eagle3": (1, 2, 3), "mtp": (NUM_LAYERS,), "jump": (1, 2)}
RECIPES = {
    "eagle3": EagleRecipe(vocabulary=60, reach=3, num_layers=2),
    "mtp": MtpRecipe(reach=3),
    "jump": JumpRecipe(vocabulary=60, reach=3),
}
KINDS = tuple(RECIPES)


@pytest.fixture(scope="module", autouse=True)
def _short_turns() -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("specdec.training.heads.collect.OPENINGS", ("a", "", "bc"))
        monkeypatch.setattr("specdec.training.heads.collect.MAX_QUESTION", 3)
        monkeypatch.setattr("specdec.training.heads.collect.MAX_ANSWER", 12)
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def corpora(model: PreTrainedModel, _short_turns: None) -> dict[str, Corpus]:
    collector = Collector(model, (1, 2), self_generation(ByteTokenizer()), LENGTH, ROWS)
    shards = [shard for seed in range(2) for shard in collector.shard(seed) if shard is not None]
    return {kind: Corpus(model, shards, layers) for kind, layers in LAYERS.items()}


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel, corpora: dict[str, Corpus]) -> dict[str, tuple[ChainTrainer, list[float]]]:
    made = {}
    for kind, recipe in RECIPES.items():
        trainer = ChainTrainer(model, corpora[kind], replace(recipe, epochs=25, learning_rate=1e-2))
        made[kind] = trainer, [trainer.advance()[0] for _ in range(trainer.num_steps)]
    return made


def test_steps_of_a_chain_stand_side_by_side() -> None:
    parts = [torch.tensor([[True, True, False]]), torch.tensor([[False, True, False]])]
    assert by_chain(parts).tolist() == [[[True, True], [True, False], [False, False]]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_drafted(kind: str, model: PreTrainedModel, corpora: dict[str, Corpus]) -> None:
    trainer, batch = ChainTrainer(model, corpora[kind], RECIPES[kind]), corpora[kind].batch(torch.arange(2))
    with torch.inference_mode():
        steps = list(trainer._chain.steps(batch, 3))
        for row, last in ((0, 5), (1, 0), (1, 30)):
            for step, drafted_C in enumerate(drafted(trainer, model, batch, row, last)):
                torch.testing.assert_close(steps[step][row, last + step], drafted_C, atol=1e-5, rtol=1e-4)


def drafted(trainer: ChainTrainer, model: PreTrainedModel, batch: Batch, row: int, last: int) -> list[Tensor]:
    """What the drafter's own network says after the pairs up to this, and after two more tokens."""
    runner = HeadRunner(trainer.head, TreeModel(model))
    runner.begin_rows([0])
    tokens_1T, count = batch.tokens_BT[row : row + 1], last + 1
    states_1TX = torch.cat([batch.hidden[layer] for layer in trainer.head.head_config.layers_read(NUM_LAYERS)], -1)[
        row : row + 1, :count
    ]
    outputs = [runner.read_pairs(tokens_1T[:, 1 : count + 1], states_1TX, [count])]
    for step in range(2):
        token_11, offset_11 = tokens_1T[:, count + 1 + step :][:, :1], torch.full((1, 1), step)
        outputs.append(runner.run_head(token_11, outputs[-1].states_BTC, offset_11, None))
    return [output.normed_BTC[0, 0] for output in outputs]


def test_rows_without_answers_teach_nothing(model: PreTrainedModel, corpora: dict[str, Corpus]) -> None:
    """The mean of nothing was shown, which is no number."""
    trainer, batch = ChainTrainer(model, corpora["eagle3"], RECIPES["eagle3"]), corpora["eagle3"].batch(torch.arange(2))
    batch.learned_BT[:] = False
    ((loss, shown),) = trainer._losses(batch)
    assert (loss.item(), shown.item()) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_are_right(kind: str, model: PreTrainedModel, trained: dict[str, Any]) -> None:
    _, accepted = trained[kind]
    assert sum(accepted[-5:]) > sum(accepted[:5]) + 2.5
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_and_accepted(
    kind: str, model: PreTrainedModel, corpora: dict[str, Corpus], trained: dict[str, Any], tmp_path: Path
) -> None:
    written = trained[kind][0].head
    save_head(tmp_path / "head", written, model, "tiny", {"seed": 7}, 3)
    drafter = DraftHead(tmp_path / "head", num_tokens=3)
    assert (drafter.model.lm_head is None) == (kind != "eagle3")  # others take the target's
    for name, weight in written.named_parameters():
        if name != "lm_head.weight" or kind == "eagle3":
            assert torch.equal(drafter.model.get_parameter(name), weight.bfloat16()), name
    assert drafter.model.head_config.layers_read(NUM_LAYERS) == written.head_config.layers_read(NUM_LAYERS)
    batch, num_accepted = corpora[kind].batch(torch.arange(6)), 0
    for tokens_T, learned_T in zip(batch.tokens_BT, batch.learned_BT, strict=True):
        answer = int(learned_T.long().argmax()) + 1
        prompt = {"input_ids": tokens_T[None, :answer], "attention_mask": torch.ones(1, answer, dtype=torch.long)}
        out = speculate(model, prompt, drafter, max_new_tokens=8)
        assert_same_tokens(model, plain_alone(model, prompt, 8), out.sequences, prompt["attention_mask"])
        num_accepted += out.stats.num_accepted
    assert num_accepted >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_what_training_shows(
    kind: str, model: PreTrainedModel, corpora: dict[str, Corpus], trained: dict[str, Any]
) -> None:
    trainer, accepted = trained[kind]
    report = measure_head(model, model, trainer.head, corpora[kind], 3)
    assert len(report.steps) == 3
    assert abs(report.accepted - sum(accepted[-4:]) / 4) < 0.3
    assert report.coverage > (0.99 if kind == "mtp" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_trainer_goes_on_exactly(
    kind: str, model: PreTrainedModel, corpora: dict[str, Corpus], tmp_path: Path
) -> None:
    whole, first, second = (ChainTrainer(model, corpora[kind], RECIPES[kind]) for _ in range(3))
    first.advance()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    second.advance()
    for _ in range(2):
        whole.advance()
    expected = whole.head.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in second.head.state_dict().items())


def test_a_model_without_weights_to_read_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    packed = tiny_model("llama")
    packed.set_input_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="load the model in float32"):
        HeadTraining(packed, "tiny", Source("", self_generation(ByteTokenizer()), 99), RECIPES["mtp"], tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma3_text", "mistral"])
def test_models_whose_layers_take_no_jump_are_refused(family: str, tmp_path: Path) -> None:
    source = Source("", self_generation(ByteTokenizer()), 99)
    with pytest.raises(UnsupportedModelError, match=r"the layers 2 to 2 of .* train a head of another kind"):
        HeadTraining(tiny_model(family), "tiny", source, RECIPES["jump"], tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="fewer --head-layers"):
        HeadTraining(tiny_model("llama"), "tiny", source, JumpRecipe(num_layers=2), tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_from_end_to_end(kind: str, model: PreTrainedModel, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "head"
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    size: tuple[Any, ...] = ("--length", LENGTH, "--rows", 2, "--epochs", 1, "--batch-rows", 2, "--steps", 2)
    size += ("--vocabulary", 40) if kind != "mtp" else ()
    arguments = ("--kind", kind, "--model", folder, "--self-generate", 100, "--out", out, *size)
    result = CliRunner().invoke(app, ["train-head", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "speed-up" in result.stdout
    config = json.loads((out / "config.json").read_text())
    if kind == "jump":
        assert "speculators_model_type" not in config
    else:
        assert config["speculators_model_type"] == kind
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2
    assert DraftHead(out).model.head_config.kind == kind
