"""Layers for multi-token prediction: they compute what transformers' layer computes, and output is the target's."""

from __future__ import annotations

import itertools
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
from trees import Chain, DySpec, Fixed, Grower, GrowthPolicy, Round

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


@pytest.mark.parametrize(
    ("layout", "family", "num_layers", "tree"),
    [
        ("deepseek", "deepseek_v3", 2, "dyspec"),
        ("deepseek", "llama", 3, "dyspec"),
        ("mimo", "qwen2", 3, "fixed"),
        ("transformers", "llama", 3, "chain"),
        ("speculators", "qwen3", 2, "fixed"),
    ],
)
def test_several_layers_draft_a_token_each(
    layout: str, family: str, num_layers: int, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter, "_CHUNK", 7)
    tiny, listener = TinyMtp(layout, family, num_layers=num_layers), Listener(monkeypatch)
    prompts = random_prompts([5, 12, 1, 9])
    out = speculate(tiny.target, prompts, DraftHead(tiny.save(tmp_path)), tree=TREES[tree], max_new_tokens=NUM_NEW)
    expected = plain_alone(tiny.target, prompts, NUM_NEW)
    assert_same_tokens(tiny.target, expected, out.sequences, prompts["attention_mask"])
    tiny.check(listener)
    assert 0 < out.stats.num_accepted < out.stats.num_drafted
    assert {len(said.drafted) for said in listener.said} == set(range(num_layers))


def test_layers_that_draft_nothing_are_not_run(tmp_path: Path) -> None:
    """They read what they have missed once a deeper tree asks for them."""
    tiny = TinyMtp("deepseek", "llama", num_layers=3)
    folder, expected = tiny.save(tmp_path), plain_alone(tiny.target, PROMPTS, NUM_NEW)
    for tree, most_forwards in ((Fixed((2,)), 1), (Fixed((2, 2)), 3), (Chain(3), 5)):
        out = speculate(tiny.target, PROMPTS, DraftHead(folder), tree=tree, max_new_tokens=NUM_NEW)
        assert_same_tokens(tiny.target, expected, out.sequences, PROMPTS["attention_mask"])
        assert 0 < out.stats.draft_forwards <= most_forwards * out.stats.num_rounds


class _Alternating(GrowthPolicy):
    """Now a chain of one token, now a deep tree."""

    def __init__(self) -> None:
        self._policies = itertools.cycle([Chain(1), Chain(1), Fixed((2, 1, 1)), Chain(2)])

    def start(self, round_: Round) -> Grower:
        return next(self._policies).start(round_)


def test_layers_catch_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "_CHUNK", 2)
    tiny, listener = TinyMtp("deepseek", "llama", num_layers=3), Listener(monkeypatch)
    requests = [request_of(random_prompt(length, length), max_new_tokens=25) for length in (9, 1, 14, 5)]
    head = DraftHead(tiny.save(tmp_path))
    head.policy = _Alternating()
    engine = Engine(tiny.target, drafter=head, max_rows=3)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(tiny.target, request) for request in requests]
    tiny.check(listener)
    assert {len(said.drafted) for said in listener.said} == {0, 1, 2}


@pytest.mark.parametrize("num_layers", [1, 3])
def test_sampled_rows_follow_the_target(num_layers: int, tmp_path: Path) -> None:
    settings = {"num_layers": num_layers, "vocab_size": VOCAB_SIZE, "initializer_range": 0.6}
    tiny = TinyMtp("deepseek", "llama", torch.float32, **settings)
    head = DraftHead(tiny.save(tmp_path))
    assert_ragged_rows_are_exact(tiny.target, head, tree=DySpec(3, max_depth=2), verify="topdown")


@pytest.mark.parametrize("num_layers", [1, 3])
def test_requests_that_join_and_leave(num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(random_prompt(length, length), max_new_tokens=15) for length in (9, 1, 41, 17, 5)]
    requests.append(request_of(requests[2].prompt[:34], max_new_tokens=9))
    tiny, listener = TinyMtp("deepseek", "qwen3", num_layers=num_layers), Listener(monkeypatch)
    engine = Engine(tiny.target, drafter=DraftHead(tiny.save(tmp_path)), max_rows=3, prefill_chunk=7)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(tiny.target, request) for request in requests]
    assert {said.first for said in listener.said} >= {0, 32}
    tiny.check(listener)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(("family", "num_layers"), [("llama", 1), ("llama", 2), ("glm4_moe", 1)])
def test_a_prepared_target_has_prepared_layers(
    family: str, num_layers: int, weights: str | None, tmp_path: Path
) -> None:
    tiny = TinyMtp("deepseek", family, torch.float32, num_layers=num_layers)
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


def test_layers_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tiny = TinyMtp("deepseek", "llama")
    file = tiny.save(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.2.", "layers.10."): -tensor for name, tensor in tensors.items() if "layers.2." in name}
    save_file({**tensors, **more}, file)
    read, expected = load_head(tmp_path), tiny.module.layers[0].eh_proj.weight
    assert torch.equal(read.get_parameter("fc.weight"), expected)
    assert torch.equal(read.get_parameter("later.0.fc.weight"), -expected)


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


_NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("scales", ["block", "row", "tensor"])
def test_layers_in_eight_bits(scales: str, family: str, tmp_path: Path) -> None:
    """As DeepSeek and others publish them, beside the same numbers as floats; blocks do not divide all weights."""
    tiny = TinyMtp("deepseek", family)
    folders = [tiny.save(tmp_path / name) for name in ("quantised", "floats")]
    narrow, wide = (load_file(folder / "model.safetensors") for folder in folders)
    for name, weight in [*narrow.items()]:
        if name.startswith("model.layers.2.") and weight.dim() == 2:
            block = {"block": (5, 12), "row": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[scales]
            narrow[name], scale, wide[name] = _in_eight_bits(weight, block)
            narrow[f"{name}_scale{'_inv' if scales == 'block' else ''}"] = scale
            narrow[name.replace("weight", "input_scale")] = torch.tensor(3.0)
    for folder, tensors in zip(folders, (narrow, wide), strict=True):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _say_quantised(folders[0])
    read, expected = (load_head(folder).state_dict() for folder in folders)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())
    out = speculate(tiny.target, PROMPTS, DraftHead(folders[0]), tree=Fixed((2, 2)), max_new_tokens=NUM_NEW)
    expected_tokens = plain_alone(tiny.target, PROMPTS, NUM_NEW)
    assert_same_tokens(tiny.target, expected_tokens, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(f"{_NAME}_scale_inv"), "up_proj.weight is in 8 bits, and has no scales"),
        (lambda tensors: tensors.update({f"{_NAME}_scale_inv": torch.ones(3, 3)}), r"\(3, 3\) that fit none"),
        (lambda tensors: tensors.update({"model.layers.2.enorm.weight_scale": torch.ones(1)}), "fit none"),
        (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.qweight": torch.ones(1)}), "packed weights"),
    ],
)
def test_damaged_scales_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    folder = TinyMtp("deepseek", "llama").save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[_NAME], tensors[f"{_NAME}_scale_inv"], _ = _in_eight_bits(tensors[_NAME], (5, 12))
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    _say_quantised(folder)
    with pytest.raises(DraftError, match=message):
        DraftHead(folder)


def _in_eight_bits(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight, its scales, and what they say together."""
    narrow, wide = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for row, column in itertools.product(*map(range, scales.shape)):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip((row, column), block, strict=True))
        scales[row, column] = weight[part].abs().max() / 448
        narrow[part] = (weight[part] / scales[row, column]).to(narrow.dtype)
        wide[part] = narrow[part].float() * scales[row, column]
    return narrow, scales, wide


def _say_quantised(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [5, 12]}
    (folder / "config.json").write_text(json.dumps(fields))


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
