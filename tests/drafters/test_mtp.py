"""Layers for multi-token prediction: they compute what transformers' layer computes, and output is the target's."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from specdec import DraftError
from specdec.drafters import DraftHead
from specdec.drafters.head import drafter
from specdec.drafters.head.loading import load_head
from specdec.engine import Engine
from specdec.specs import drafter_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.engine_requests import alone, random_prompt, request_of
from tests.support.heads import Listener
from tests.support.mtp_heads import TinyMtp
from tests.support.recurrent_models import RECURRENT
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact
from trees import Chain, DySpec, Fixed, GrowthPolicy

NUM_NEW = 16
PROMPTS = random_prompts([5, 12, 2, 9])
TREES: dict[str, GrowthPolicy] = {"chain": Chain(4), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(9, max_depth=4)}


@pytest.mark.parametrize(
    ("layout", "family", "tree"),
    [
        ("speculators", "qwen3", "chain"),
        ("speculators", "qwen3_next", "fixed"),
        ("mimo", "qwen2", "fixed"),
        ("qwen", "qwen3_next", "dyspec"),
        ("qwen", "qwen3_5_text", "chain"),
        ("deepseek", "glm4_moe", "fixed"),
        ("deepseek", "deepseek_v3", "dyspec"),
        ("transformers", "llama", "dyspec"),
    ],
)
def test_layers_compute_what_transformers_does(
    layout: str, family: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the prompt, rounds, rejected drafts and rows of different lengths."""
    monkeypatch.setattr(drafter, "_CHUNK", 7)
    tiny, listener = TinyMtp(layout, family), Listener(monkeypatch)
    out = speculate(tiny.target, PROMPTS, DraftHead(tiny.save(tmp_path)), tree=TREES[tree], max_new_tokens=NUM_NEW)
    expected = plain_alone(tiny.target, PROMPTS, NUM_NEW)
    assert_same_tokens(tiny.target, expected, out.sequences, PROMPTS["attention_mask"])
    tiny.check(listener, bound=5e-5 if family in RECURRENT else 1e-5)
    assert 0 < out.stats.num_accepted < out.stats.num_drafted
    assert {len(said.drafted) for said in listener.said} >= {0, 1, 2}


def test_sampled_rows_follow_the_target(tmp_path: Path) -> None:
    tiny = TinyMtp("deepseek", "llama", torch.float32, vocab_size=VOCAB_SIZE, initializer_range=0.6)
    head = DraftHead(tiny.save(tmp_path))
    assert_ragged_rows_are_exact(tiny.target, head, tree=DySpec(3, max_depth=2), verify="topdown")


def test_requests_that_join_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(random_prompt(length, length), max_new_tokens=15) for length in (9, 1, 41, 17, 5)]
    requests.append(request_of(requests[2].prompt[:34], max_new_tokens=9))
    tiny, listener = TinyMtp("qwen", "qwen3"), Listener(monkeypatch)
    engine = Engine(tiny.target, drafter=DraftHead(tiny.save(tmp_path)), max_rows=3, prefill_chunk=7)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(tiny.target, request) for request in requests]
    assert {said.first for said in listener.said} >= {0, 32}
    tiny.check(listener)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
def test_a_prepared_target_has_a_prepared_layer(family: str, weights: str | None, tmp_path: Path) -> None:
    tiny = TinyMtp("deepseek", family, torch.float32)
    head = DraftHead(tiny.save(tmp_path))
    model = specdec.prepare(deepcopy(tiny.target), weights=weights)
    out = speculate(model, PROMPTS, head, tree=Fixed((2, 2)), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, plain_alone(model, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted


def test_a_model_drafts_for_itself_from_its_own_folder(tmp_path: Path) -> None:
    """For another target a model with such a layer is a model."""
    tiny = TinyMtp("deepseek", "llama")
    folder = tiny.save(tmp_path / "model")
    out = speculate(tiny.target, PROMPTS, str(folder), tree=Chain(2), max_new_tokens=NUM_NEW)
    assert out.stats.draft_forwards > 0
    assert drafter_of(str(folder), str(folder / "..") + "/model") == "draft-head"
    assert drafter_of(str(folder), str(tmp_path)) == drafter_of(str(folder), "org/name") == "small-model"
    tiny.target.save_pretrained(tmp_path / "without")
    assert drafter_of(str(tmp_path / "without"), str(tmp_path / "without")) == "small-model"
    alone = TinyMtp("transformers", "llama").save(tmp_path / "alone")
    assert drafter_of(str(alone), str(folder)) == "draft-head"


def test_heads_and_models_are_told_apart_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache holds is found without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    tiny = TinyMtp("deepseek", "llama")
    tiny.save(cached(tmp_path, "org/with"))
    tiny.target.save_pretrained(cached(tmp_path, "org/without"))
    TinyMtp("transformers", "llama").save(cached(tmp_path, "org/alone"))
    assert drafter_of("org/with", "org/with") == drafter_of("org/alone", "org/with") == "draft-head"
    assert drafter_of("org/with", "org/without") == drafter_of("org/without", "org/without") == "small-model"
    assert drafter_of("org/absent", "org/absent") == "small-model"
    for head in ("org/alone", DraftHead("org/with")):
        out = speculate(tiny.target, PROMPTS, head, tree=Chain(2), max_new_tokens=NUM_NEW)
        assert out.stats.draft_forwards > 0
    with pytest.raises(DraftError, match=r"head in org/absent.*check the name and the network"):
        DraftHead("org/absent")


def cached(home: Path, hub_id: str) -> Path:
    """The folder of a snapshot in a hub cache."""
    repository = home / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_the_first_of_several_layers_is_read(tmp_path: Path) -> None:
    tiny = TinyMtp("deepseek", "llama")
    file = tiny.save(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.2.", "layers.10."): -tensor for name, tensor in tensors.items() if "layers.2." in name}
    save_file({**tensors, **more}, file)
    read, expected = load_head(tmp_path).get_parameter("fc.weight"), tiny.module.layers[0].eh_proj.weight
    assert torch.equal(read, expected)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    file = TinyMtp("deepseek", "llama").save(tmp_path) / "model.safetensors"
    whole, tensors = load_head(tmp_path).state_dict(), load_file(file)
    file.unlink()
    parts = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(tensors)}
    for part in set(parts.values()):
        save_file({name: tensor for name, tensor in tensors.items() if parts[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    read = load_head(tmp_path).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read.items())
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(DraftError, match=r"cannot read the head in .*part-1"):
        DraftHead(tmp_path)


def test_what_transformers_saves_of_its_own_model_is_read(tmp_path: Path) -> None:
    """5.23 writes `layers.0..)self_attn`, for `layers.0.mtp_block.self_attn`."""
    tiny = TinyMtp("transformers", "qwen3")
    tiny.module.save_pretrained(tmp_path)
    read, layer = load_head(tmp_path), tiny.module.layers[0]
    for name, tensor in read.block.state_dict().items():
        assert torch.equal(tensor, layer.mtp_block.state_dict()[name])
    assert torch.equal(read.hnorm.weight, layer.hnorm.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"), "fc.weight"),
        (lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"), "up_proj.weight is missing, is"),
        (lambda tensors: tensors.update({"model.layers.2.other.weight": torch.ones(3)}), "other.weight"),
        (lambda tensors: tensors.update({"model.layers.2.enorm.weight": torch.ones(3)}), "size mismatch for enorm"),
        (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3, 4)}), "up_proj"),
    ],
)
def test_damaged_layers_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    file = TinyMtp("deepseek", "llama").save(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(DraftError, match=f"(?s){message}"):
        DraftHead(tmp_path)


def test_a_layer_of_another_model_is_refused(tmp_path: Path) -> None:
    head = DraftHead(TinyMtp("deepseek", "llama").save(tmp_path))
    with pytest.raises(DraftError, match="states of 32 channels and the target has 48"):
        speculate(tiny_model("llama", vocab_size=12, hidden_size=48, dtype=torch.float64), PROMPTS, head)
