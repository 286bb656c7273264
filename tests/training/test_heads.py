"""DSpark heads are trained on what they compute while drafting, and are written as others read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from specdec import DraftError
from specdec.cli.app import app
from specdec.drafters import DraftHead
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.runner import HeadRunner
from specdec.testing import ByteTokenizer, assert_same_tokens, tiny_model
from specdec.training.heads import collect
from specdec.training.heads.blocks import BlockTrainer, block_logits, draw_anchors, run_blocks, run_lengths
from specdec.training.heads.collect import Collector, self_generation
from specdec.training.heads.corpus import Corpus
from specdec.training.heads.export import save_head
from specdec.training.heads.recipes import BlockRecipe
from specdec.training.heads.run import HeadTraining, Source
from specdec.tree_model.model import TreeModel
from tests.support.references import plain_alone, speculate

LENGTH, ROWS, LAYERS = 48, 4, (1, 3)
RECIPE = BlockRecipe(vocabulary=60, anchors=8, reach=4, markov_rank=8)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "OPENINGS", ("a", "", "bc"))
    monkeypatch.setattr(collect, "MAX_QUESTION", 3)
    monkeypatch.setattr(collect, "MAX_ANSWER", 12)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def corpus(model: PreTrainedModel) -> Corpus:
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch)
        collector = Collector(model, LAYERS[:1], self_generation(ByteTokenizer()), LENGTH, ROWS)
        shards = [list(collector.shard(seed))[-1] for seed in range(2)]
    return Corpus(model, [shard for shard in shards if shard is not None], LAYERS)


class Trained(NamedTuple):
    trainer: BlockTrainer
    accepted: list[float]


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel, corpus: Corpus) -> Trained:
    trainer = BlockTrainer(model, corpus, replace(RECIPE, epochs=30, learning_rate=3e-3))
    return Trained(trainer, [trainer.advance()[0] for _ in range(trainer.num_steps)])


class TestBlocks:
    def test_what_is_trained_is_what_is_drafted(self, model: PreTrainedModel, corpus: Corpus) -> None:
        head, batch = BlockTrainer(model, corpus, RECIPE).head, corpus.batch(torch.arange(2))
        anchors_BA = torch.tensor([[3, 20], [11, 12]])
        embedding_VC = model.get_input_embeddings().weight
        with torch.inference_mode():
            blocks_BASC = run_blocks(head, embedding_VC, batch, anchors_BA)
            for row, anchors in enumerate(anchors_BA.tolist()):
                for index, anchor in enumerate(anchors):
                    drafted_SC = drafted(head, model, batch.hidden, batch.tokens_BT, row, anchor)
                    torch.testing.assert_close(blocks_BASC[row, index], drafted_SC, atol=1e-5, rtol=1e-4)

    def test_anchors_are_tokens_before_learned_ones(self) -> None:
        learned_BT = torch.zeros(2, 9, dtype=torch.bool)
        learned_BT[0, [0, 3, 5, 8]] = True
        learned_BT[1, 2:] = True
        anchors_BA = draw_anchors(learned_BT, 3, torch.Generator().manual_seed(0))
        assert anchors_BA[0].tolist() == [3, 5, 8]
        assert learned_BT[1, anchors_BA[1]].all()
        assert anchors_BA[1].diff().min() > 0

    def test_run_lengths_end_at_the_first_wrong_slot(self) -> None:
        right_N = torch.tensor([True, True, False, True, False, True])
        blocks_N, depths_N = torch.tensor([0, 0, 2, 2, 5, 5]), torch.tensor([0, 1, 0, 1, 0, 1])
        assert run_lengths(right_N, blocks_N, depths_N).tolist() == [2, 0, 0]

    def test_a_block_of_the_last_token_learns_from_what_there_is(self, model: PreTrainedModel, corpus: Corpus) -> None:
        trainer, batch = BlockTrainer(model, corpus, RECIPE), corpus.batch(torch.arange(ROWS))
        batch.learned_BT[:] = False
        batch.learned_BT[:, -1] = True
        slots = trainer._slots(batch, torch.full((ROWS, 1), LENGTH - 1))
        assert (slots.depths_N.tolist(), slots.positions_N.tolist()) == ([0] * ROWS, [LENGTH - 1] * ROWS)


def drafted(
    head: DSpark, model: PreTrainedModel, hidden: dict[int, Tensor], tokens_BT: Tensor, row: int, anchor: int
) -> Tensor:
    """What the drafter's own network says of the slots after a token."""
    runner = HeadRunner(head, TreeModel(model))
    runner.begin_rows([0])
    states_1TX = torch.cat([hidden[layer] for layer in LAYERS], -1)[row : row + 1, :anchor]
    runner.read_states(states_1TX, [anchor])
    return runner.run_block(tokens_BT[row : row + 1, anchor : anchor + 1])[0]


class TestTraining:
    def test_more_tokens_are_right(self, model: PreTrainedModel, trained: Trained) -> None:
        assert sum(trained.accepted[-5:]) > sum(trained.accepted[:5]) + 2.5
        assert all(weight.grad is None for weight in model.parameters())

    def test_confidence_is_the_share_that_is_accepted(
        self, model: PreTrainedModel, corpus: Corpus, trained: Trained
    ) -> None:
        untrained = BlockTrainer(model, corpus, RECIPE)
        assert self.confidence_error(trained.trainer, corpus) < self.confidence_error(untrained, corpus) / 2

    def confidence_error(self, trainer: BlockTrainer, corpus: Corpus) -> float:
        batch = corpus.batch(torch.arange(ROWS))
        with torch.no_grad():
            slots = trainer._slots(batch, draw_anchors(batch.learned_BT, 8, torch.Generator().manual_seed(1)))
            at = slots.rows_N, slots.positions_N
            targets_NK, p_NK = trainer._labels(batch.best_ids_BTK[at], batch.best_p_BTK[at])
            q_NV = block_logits(trainer.head, slots.normed_NC, slots.tokens_N).softmax(-1)
            accepted_N = torch.minimum(q_NV.gather(1, targets_NK.clamp_min(0)), p_NK).sum(1)
            said_N = trainer.head.confidence(slots.normed_NC, slots.tokens_N)
            assert said_N is not None
            return (said_N.sigmoid() - accepted_N).abs().mean().item()

    def test_a_loaded_trainer_goes_on_exactly(self, model: PreTrainedModel, corpus: Corpus, tmp_path: Path) -> None:
        whole, first, second = (BlockTrainer(model, corpus, RECIPE) for _ in range(3))
        first.advance()
        first.save(tmp_path / "state.safetensors")
        second.load(tmp_path / "state.safetensors")
        second.advance()
        for _ in range(2):
            whole.advance()
        expected = whole.head.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in second.head.state_dict().items())


class TestExport:
    def test_what_is_written_is_read(self, model: PreTrainedModel, corpus: Corpus, tmp_path: Path) -> None:
        trainer = BlockTrainer(model, corpus, RECIPE)
        trainer.advance()
        save_head(tmp_path / "head", trainer.head, model, "tiny", {"seed": 7}, 4)
        drafter = DraftHead(tmp_path / "head")
        read, written = drafter.model, trainer.head
        assert (read.head_config.block_size, read.head_config.state_layers) == (4, LAYERS)
        assert torch.equal(read.vocab_ids, written.vocab_ids)  # type: ignore[arg-type]
        for name, weight in written.named_parameters():
            assert torch.equal(read.get_parameter(name), weight.bfloat16()), name
        assert json.loads((tmp_path / "head" / "training.json").read_text()) == {"seed": 7}

    def test_layers_may_be_written_in_8_bits(self, model: PreTrainedModel, corpus: Corpus, tmp_path: Path) -> None:
        written = BlockTrainer(model, corpus, RECIPE).head
        for name, is_small in (("large", False), ("small", True)):
            save_head(tmp_path / name, written, model, "tiny", {}, 4, quantize=is_small)
        large, small = (load_file(tmp_path / name / "model.safetensors") for name in ("large", "small"))
        assert small["fc.weight"].equal(large["fc.weight"])
        assert {name for name, tensor in small.items() if tensor.dtype is torch.int8} == {
            name.removesuffix("_scale") for name in small.keys() - large.keys()
        }
        read = DraftHead(tmp_path / "small").model
        for name, weight in written.named_parameters():
            step = weight.abs().amax(-1, keepdim=True) / 127
            assert ((read.get_parameter(name) - weight).abs() <= 2 * step).all(), name

    def test_scales_of_nothing_are_refused(self, model: PreTrainedModel, corpus: Corpus, tmp_path: Path) -> None:
        save_head(tmp_path / "head", BlockTrainer(model, corpus, RECIPE).head, model, "tiny", {}, 4)
        path = tmp_path / "head" / "model.safetensors"
        save_file({**load_file(path), "layers.9.weight_scale": torch.ones(3, 1)}, path)
        with pytest.raises(DraftError, match="fit none of its weights"):
            DraftHead(tmp_path / "head")

    def test_its_drafts_are_accepted_and_output_is_the_models(
        self, model: PreTrainedModel, corpus: Corpus, trained: Trained, tmp_path: Path
    ) -> None:
        save_head(tmp_path / "head", trained.trainer.head, model, "tiny", {}, 4)
        drafter, batch = DraftHead(tmp_path / "head"), corpus.batch(torch.arange(6))
        num_accepted = 0
        for tokens_T, learned_T in zip(batch.tokens_BT, batch.learned_BT, strict=True):
            answer = int(learned_T.long().argmax()) + 1
            prompt = {"input_ids": tokens_T[None, :answer], "attention_mask": torch.ones(1, answer, dtype=torch.long)}
            out = speculate(model, prompt, drafter, max_new_tokens=8)
            assert_same_tokens(model, plain_alone(model, prompt, 8), out.sequences, prompt["attention_mask"])
            num_accepted += out.stats.num_accepted
        assert num_accepted >= 8


class TestRun:
    def run(self, model: PreTrainedModel, out: Path, stop_after: int | None = None) -> Any:
        source = Source("test", self_generation(ByteTokenizer()), ROWS * LENGTH * 2)
        recipe = BlockRecipe(vocabulary=60, anchors=4, reach=4, markov_rank=8, epochs=2, batch_rows=2)
        training = HeadTraining(model, "tiny", source, recipe, out, length=LENGTH)
        for _ in training.collect():
            pass
        for state in training.train():
            if stop_after == state.done:
                return None
        return training.finish()

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(
        self, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("specdec.training.heads.run._SAVE_EVERY_S", 0)
        report = self.run(model, tmp_path / "whole")
        self.run(model, tmp_path / "broken", stop_after=2)
        assert (tmp_path / "broken.work" / "trainer.safetensors").exists()
        self.run(model, tmp_path / "broken")
        whole, broken = (DraftHead(tmp_path / name).model.state_dict() for name in ("whole", "broken"))
        assert all(torch.equal(weight, broken[name]) for name, weight in whole.items())
        facts = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "broken")]
        assert facts[0]["curve"] == facts[1]["curve"]
        assert [point["tokens"] for point in facts[0]["curve"]] == [96 * step for step in (1, 2, 4, 8)]
        assert len(report.steps) == 4
        assert 0 <= report.accepted <= 4
        assert not (tmp_path / "broken.work").exists()

    def test_an_output_that_exists_is_refused(self, model: PreTrainedModel, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="exists"):
            self.run(model, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


def test_the_command_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    size = ("--length", LENGTH, "--rows", 2, "--epochs", 1, "--vocabulary", 40, "--batch-rows", 2)
    size += ("--head-layers", 1, "--block", 3, "--anchors", 4, "--markov-rank", 0)
    arguments = ("--kind", "dspark", "--model", folder, "--self-generate", 100, "--out", out, *size)
    result = CliRunner().invoke(app, ["train-head", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "speed-up" in result.stdout
    assert "learning curve" in result.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert DraftHead(out).model.head_config.markov_rank == 0
