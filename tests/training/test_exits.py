"""Exits: the module and its file, what they are trained on, and the command from end to end."""

from __future__ import annotations

import itertools
import json
import random
from importlib.resources import files

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from typer.testing import CliRunner

from specdec.cli.app import app
from specdec.errors import DraftError
from specdec.exits.module import Exit, fingerprint, load_exits, read_metadata, save_exits
from specdec.hf import CACHE
from specdec.kernels import prepare, quantized_copy
from specdec.testing import ByteTokenizer, tiny_model
from specdec.training.heads import collect
from specdec.training.heads.collect import Collector, Template, converse, given_texts, self_generation
from specdec.training.heads.corpus import Corpus
from specdec.training.heads.exits import ExitRecipe, ExitTrainer, Unroller, pass_mask
from specdec.training.heads.run import ExitTraining, Source
from specdec.tree_model.layer_views import LayerViews

LENGTH, ROWS = 48, 4
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "olmo", "gpt2")


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(collect, "OPENINGS", ("a", "", "bc"))
    monkeypatch.setattr(collect, "MAX_QUESTION", 3)
    monkeypatch.setattr(collect, "MAX_ANSWER", 12)


def shards(model, count=2, depths=(1,)):
    collector = Collector(model, depths, self_generation(ByteTokenizer()), LENGTH, ROWS)
    return [list(collector.shard(seed))[-1] for seed in range(count)]


def corpus(model, layers=(0, 1), count=2):
    return Corpus(model, shards(model, count), layers)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


class TestCollecting:
    def test_states_are_those_of_an_ordinary_forward(self, model):
        (shard,) = shards(model, 1)
        with torch.no_grad():
            out = model(shard.tokens_BT.long(), output_hidden_states=True)
            last = model.get_decoder().norm(shard.states[2].float())
        torch.testing.assert_close(shard.states[1].float(), out.hidden_states[1], atol=0.05, rtol=0.02)
        torch.testing.assert_close(last, out.hidden_states[2], atol=0.05, rtol=0.02)
        assert torch.equal(shard.best_ids_BTK[..., 0].long(), out.logits.argmax(-1))

    def test_states_that_were_not_kept_are_made_again(self, model):
        (kept,), (bare,) = (shards(model, 1, depths) for depths in ((1,), None))
        assert (kept.states.keys(), bare.states) == ({1, 2}, {})
        assert all(torch.equal(*parts) for parts in zip(kept[:4], bare[:4], strict=True))
        rows = torch.tensor([2, 0])
        expected, actual = (Corpus(model, [shard], (0, 1)).batch(rows) for shard in (kept, bare))
        for layer in (0, 1):
            torch.testing.assert_close(actual.hidden[layer], expected.hidden[layer], atol=0.05, rtol=0.02)
        torch.testing.assert_close(actual.final_BTC, expected.final_BTC, atol=0.05, rtol=0.02)

    def test_learned_tokens_are_the_models_choices(self, model):
        (shard,) = shards(model, 1)
        learned_BT = shard.learned_BT[:, 1:]
        assert learned_BT.any()
        assert torch.equal(shard.tokens_BT[:, 1:][learned_BT], shard.best_ids_BTK[:, :-1, 0][learned_BT])

    def test_a_conversation_follows_the_template(self, monkeypatch):
        monkeypatch.setattr(collect, "MAX_QUESTION", 2)
        monkeypatch.setattr(collect, "MAX_ANSWER", 3)
        script = converse(Template([1], [2, 3], [4, 5]), itertools.repeat([9]), are_complete=False)
        said = [next(script)]
        # question of the sampled 7s, cut off; an answer of greedy 8s that the model ends itself with a 4
        said += [script.send((7, greedy)) for greedy in (0, 0, 0, 0, 0, 8, 8, 4, 0, 0)]
        assert [token for token, _ in said] == [1, 9, 7, 7, 2, 3, 8, 8, 4, 5, 9]
        assert [token for token, learned in said if learned] == [8, 8, 4]

    def test_the_template_is_the_tokenizers(self):
        tokenizer = ByteTokenizer()
        template = Template.of(tokenizer)
        parts = [tokenizer.decode(part) for part in (template.opening, template.reply, template.again)]
        assert parts == ["user: ", "\nassistant: ", "\nuser: "]

    def test_a_file_of_prompts_or_of_texts(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "ab"}\n{"text": "c"}\n')
        make, num_tokens = given_texts(ByteTokenizer(), path)
        script = make(random.Random(0))
        assert num_tokens == 3
        assert sorted(chr(next(script)[0]) for _ in range(3)) == ["a", "b", "c"]
        path.write_text('{"prompt": "ab"}\n{"turns": ["c"]}\n')
        assert given_texts(ByteTokenizer(), path)[1] == 3 + 2 * collect.MAX_ANSWER
        path.write_text('{"question": "?"}\n')
        with pytest.raises(ValueError, match="line 1"):
            given_texts(ByteTokenizer(), path)


class TestUnrolling:
    def test_masks(self):
        expected = [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
        assert pass_mask(3, 1).int().tolist() == expected
        assert pass_mask(4, 2)[3].int().tolist() == [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_passes_are_what_drafting_computes(self, family):
        model = tiny_model(family, num_hidden_layers=3)
        data = corpus(model)
        exit_ = ExitTrainer(model, data, ExitRecipe(layers=(0, 1))).exits[1]
        batch = data.batch(torch.arange(2))
        with torch.no_grad():
            passes = list(Unroller(model, exit_).outputs(batch.hidden[1], batch.final_BTC, 3))
            for start in (5, 12):
                drafted = draft(model, exit_, batch.hidden[1], batch.final_BTC, start, 3)
                for index, normed_BC in enumerate(drafted):
                    torch.testing.assert_close(passes[index][:, start + index], normed_BC, atol=1e-4, rtol=1e-3)


def draft(model, exit_, hidden_BTC, final_BTC, start, count):
    """Reads true states up to `start`, then goes on alone, a position at a time; what goes into the head."""
    view, cache = LayerViews(model).block(exit_.block), DynamicCache()
    known_BTC = torch.nn.functional.pad(final_BTC[:, :start], (0, 0, 1, 0))
    fed_BTC = torch.cat([hidden_BTC[:, : start + 1], known_BTC], -1)
    outputs = []
    for position in range(start + 1, start + count + 1):
        fused_BTC = exit_.fuse(fed_BTC)
        view.set_input_states(fused_BTC)
        outputs.append(view.model(inputs_embeds=fused_BTC, **{CACHE: cache}, use_cache=True).last_hidden_state[:, -1])
        fed_BTC = torch.cat([hidden_BTC[:, position : position + 1], view.states[0][:, -1:]], -1)
    return outputs


class TestTraining:
    def test_the_loss_falls_and_every_exit_learns(self, model):
        trainer = ExitTrainer(model, corpus(model), ExitRecipe(layers=(0, 1), epochs=25, learning_rate=3e-3))
        agreements = [trainer.advance() for _ in range(trainer.num_steps)]
        for index in (0, 1):
            first, last = ([step[index] for step in part] for part in (agreements[:4], agreements[-4:]))
            assert sum(last) > sum(first) + 1

    def test_the_model_is_left_as_it_was(self, model):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        trainer = ExitTrainer(model, corpus(model), ExitRecipe(layers=(1,)))
        trainer.advance()
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert all(weight.grad is None for weight in model.parameters())

    def test_a_loaded_trainer_goes_on_exactly(self, model, tmp_path):
        data, recipe = corpus(model), ExitRecipe(layers=(0, 1))
        whole, first, second = (ExitTrainer(model, data, recipe) for _ in range(3))
        whole._use_bfloat16 = first._use_bfloat16 = True
        for _ in range(2):
            first.advance()
        first.save(tmp_path / "state.safetensors")
        second.load(tmp_path / "state.safetensors")
        for _ in range(2):
            second.advance()
        for _ in range(4):
            whole.advance()
        for expected, actual in zip(whole.exits, second.exits, strict=True):
            assert all(torch.equal(actual.state_dict()[name], weight) for name, weight in expected.state_dict().items())


class TestFile:
    @pytest.fixture
    def exits(self, model):
        torch.manual_seed(0)
        return [Exit(model, layer, torch.arange(0, 200, 3), window=LENGTH) for layer in (0, 1)]

    def test_round_trip(self, model, exits, tmp_path):
        path = tmp_path / "exits.safetensors"
        save_exits(path, exits, model, {"seed": 7})
        loaded = load_exits(path, model)
        assert json.loads(read_metadata(path)["training"]) == {"seed": 7}
        assert [exit_.layer for exit_ in loaded] == [0, 1]
        for before, after in zip(exits, loaded, strict=True):
            assert torch.equal(after.vocab_ids, before.vocab_ids)
            assert torch.equal(after.head.weight, model.lm_head.weight[before.vocab_ids])
            assert after.norm is model.model.norm
            for name, weight in before.state_dict().items():
                torch.testing.assert_close(after.state_dict()[name], weight, atol=weight.abs().max() / 200, rtol=0)

    def test_saving_what_was_loaded_changes_nothing(self, model, exits, tmp_path):
        first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
        save_exits(first, exits, model, {})
        save_exits(second, load_exits(first, model), model, {})
        before, after = load_file(first), load_file(second)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    def test_an_offloaded_model_is_refused(self, model, exits, tmp_path):
        path = tmp_path / "exits.safetensors"
        save_exits(path, exits, model, {})
        offloaded = cpu_offload(tiny_model("llama"), execution_device="cpu")
        assert fingerprint(offloaded) == fingerprint(model)
        with pytest.raises(DraftError, match="offloaded"):
            load_exits(path, offloaded)

    @pytest.mark.parametrize("tied", [False, True])
    def test_an_int8_model_takes_the_same_file(self, tied, tmp_path):
        model = tiny_model("llama", hidden_size=64, head_dim=32, tie_word_embeddings=tied)
        path = tmp_path / "exits.safetensors"
        save_exits(path, [Exit(model, 1, torch.arange(50), window=LENGTH)], model, {})
        (plain,), (fast,) = load_exits(path, model), load_exits(path, quantized_copy(model))
        torch.testing.assert_close(fast.head.weight, plain.head.weight, atol=0.01, rtol=0)
        assert torch.equal(fast.fuse.weight, plain.fuse.weight)

    @pytest.mark.parametrize("weights", [None, "int8"])
    def test_exits_can_be_prepared(self, weights, tmp_path):
        model = tiny_model("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
        exit_ = Exit(model, 1, torch.arange(50), window=LENGTH)
        fused_BTC = torch.randn(1, 5, 64)
        view = LayerViews(model).block(exit_.block)
        view.set_input_states(fused_BTC)
        with torch.inference_mode():
            expected = exit_.head(view.model(inputs_embeds=fused_BTC).last_hidden_state)
            prepare(exit_, weights)
            actual = exit_.head(view.model(inputs_embeds=fused_BTC).last_hidden_state)
        assert torch.dist(actual, expected) < (0.05 if weights else 1e-4) * expected.norm()

    def test_another_model_is_refused(self, model, exits, tmp_path):
        path = tmp_path / "exits.safetensors"
        save_exits(path, exits, model, {})
        other = tiny_model("llama")
        other.model.norm.weight.data[3] += 1
        with pytest.raises(DraftError, match="trained on another model"):
            load_exits(path, other)
        with pytest.raises(DraftError, match="trained on another model"):
            load_exits(path, tiny_model("llama", vocab_size=300))

    def test_what_is_no_file_of_exits_is_refused(self, model, tmp_path):
        with pytest.raises(DraftError, match="cannot read"):
            load_exits(tmp_path / "missing.safetensors", model)
        model.save_pretrained(tmp_path)
        with pytest.raises(DraftError, match="holds no exits"):
            load_exits(tmp_path / "model.safetensors", model)

    def test_the_fingerprint_outlives_dtype_and_preparation(self, model):
        assert fingerprint(tiny_model("llama", dtype=torch.bfloat16)) == fingerprint(model)
        assert fingerprint(quantized_copy(model)) == fingerprint(model)


def test_the_shipped_exits_say_what_they_are():
    (path,) = (files("specdec") / "exits").glob("*.safetensors")
    facts = read_metadata(path)
    training = json.loads(facts["training"])
    assert path.stat().st_size < 10_000_000
    assert (training["data"], training["seed"], training["model"]) == ("self-generated", 0, facts["fingerprint"])
    assert [report["layer"] for report in training["held_out"]] == json.loads(facts["layers"])


class TestRun:
    def run(self, model, out, *, stop_after=None):
        """The whole work, or until some steps of training are done."""
        source = Source("test", self_generation(ByteTokenizer()), ROWS * LENGTH * 2)
        training = ExitTraining(model, source, ExitRecipe(layers=(0, 1), epochs=2, batch_rows=2), out, length=LENGTH)
        for _ in training.collect():
            pass
        for state in training.train():
            if stop_after is not None and state.done == stop_after:
                return None
        return training.finish()

    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("specdec.training.heads.run._SAVE_EVERY_S", 0)
        self.run(model, tmp_path / "whole.safetensors")
        self.run(model, tmp_path / "broken.safetensors", stop_after=3)
        assert (tmp_path / "broken.safetensors.work" / "trainer.safetensors").exists()
        self.run(model, tmp_path / "broken.safetensors")
        whole, broken = (load_exits(tmp_path / f"{name}.safetensors", model) for name in ("whole", "broken"))
        for first, second in zip(whole, broken, strict=True):
            assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())
        assert not (tmp_path / "broken.safetensors.work").exists()

    def test_a_collection_goes_on_with_the_missing_shards(self, model, tmp_path):
        source = Source("test", self_generation(ByteTokenizer()), ROWS * LENGTH * 3)
        make = lambda: ExitTraining(model, source, ExitRecipe(layers=(1,)), tmp_path / "x.safetensors", length=LENGTH)  # noqa: E731
        for state in make().collect():
            if state.done == LENGTH + 3:
                break
        assert next(iter(make().collect())).done == LENGTH

    def test_work_with_other_settings_is_refused(self, model, tmp_path):
        source = Source("test", self_generation(ByteTokenizer()), ROWS * LENGTH)
        ExitTraining(model, source, ExitRecipe(layers=(1,)), tmp_path / "x.safetensors", length=LENGTH)
        with pytest.raises(ValueError, match="seed was 0"):
            ExitTraining(model, source, ExitRecipe(layers=(1,), seed=1), tmp_path / "x.safetensors", length=LENGTH)

    @pytest.mark.parametrize(("layers", "out"), [((2,), "x.safetensors"), ((-1,), "x.safetensors"), ((1,), "x.bin")])
    def test_impossible_settings_are_refused(self, model, tmp_path, layers, out):
        source = Source("test", self_generation(ByteTokenizer()), 100)
        with pytest.raises(ValueError, match=r"exit layer|\.safetensors"):
            ExitTraining(model, source, ExitRecipe(layers=layers), tmp_path / out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(app, ["train-head", *map(str, arguments)])

    def test_from_end_to_end(self, folder, tmp_path):
        out = tmp_path / "exits.safetensors"
        size = ("--length", LENGTH, "--rows", 2, "--epochs", 1, "--vocabulary", 40)
        size += ("--batch-rows", 2, "--learning-rate", 0.002, "--passes", 3)
        result = self.invoke(
            "--kind", "exit", "--model", folder, "--self-generate", 100, "--exits", "0,1", "--out", out, *size
        )
        assert result.exit_code == 0, result.output
        assert "tokens/s" in result.stdout
        exits = load_exits(out, tiny_model("llama"))
        assert [exit_.layer for exit_ in exits] == [0, 1]
        training = json.loads(read_metadata(out)["training"])
        held_out = training["held_out"]
        settings = ("num_tokens", "rows", "batch_rows", "learning_rate", "num_passes", "vocabulary")
        assert [training[name] for name in settings] == [2 * LENGTH * 2, 2, 2, 0.002, 3, 40]
        assert [report["layer"] for report in held_out] == [0, 1]
        assert all(0 <= share <= 1 for report in held_out for share in report["steps"])

    def test_from_a_file(self, folder, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text('{"text": "to be, or not to be, that is the question"}\n' * 3)
        out = tmp_path / "exits.safetensors"
        result = self.invoke(
            "--kind", "exit", "--model", folder, "--data", data, "--exits", "1", "--out", out, "--length", LENGTH
        )
        assert result.exit_code == 0, result.output
        assert out.exists()

    def test_a_whole_model(self, folder, tmp_path):
        out = tmp_path / "trained"
        size = ("--length", LENGTH, "--epochs", 1, "--self-generate", 4 * LENGTH)
        result = self.invoke("--kind", "layerskip", "--model", folder, "--out", out, *size)
        assert result.exit_code == 0, result.output
        before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
        assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
        assert AutoTokenizer.from_pretrained(out).chat_template
        result = self.invoke("--kind", "layerskip", "--model", folder, "--out", out, *size)
        assert (result.exit_code, "exists" in result.stderr) == (2, True)

    @pytest.mark.parametrize(
        "arguments",
        [
            ("exit", "--self-generate", 10, "--data", "x"),
            ("exit",),
            ("exit", "--self-generate", 10, "--exits", "two"),
            ("layerskip", "--self-generate", 10, "--exits", "2"),
            ("dspark", "--self-generate", 10, "--passes", 3),
            ("medusa", "--self-generate", 10),
        ],
        ids=["two sources", "no source", "no number", "exits of a whole model", "passes of a block", "no kind"],
    )
    def test_errors_come_before_any_work(self, arguments, tmp_path):
        result = self.invoke("--model", "missing", "--out", tmp_path / "x.safetensors", "--kind", *arguments)
        assert result.exit_code == 2
        assert "missing" not in result.stderr
