"""Layers below and above an exit that are replayed, with a stand-in for graphs: the same tokens, draws and states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.cuda import GraphedExitModel, exit_model_of
from specdec.cuda.arena import Arena
from specdec.cuda.captured import Shape
from specdec.cuda.graphs import standing_in
from specdec.drafters import Drafter, EarlyExit, Plain
from specdec.kernels.model.profile import profile_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_views import Layers
from tests.support.early_exits import WithModules, early_model, random_exit
from tests.support.references import plain_alone
from trees import DySpec, Fixed

NUM_NEW = 24
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])
BELOW, ABOVE, HEAD = Layers(0, 2), Layers(2), Layers(4)
DRAFTERS: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "fixed": lambda _: EarlyExit(2),
    "layers": lambda _: EarlyExit(objective="tokens-per-layer", shadow_share=1),
    "trained": lambda model: WithModules([random_exit(model, 2)], 2),
}


@pytest.fixture(autouse=True)
def _graphs() -> Iterator[None]:
    with standing_in():
        yield


def fresh_model(family: str = "llama") -> PreTrainedModel:
    """Whose lower layers are often right, and of which nothing is known yet."""
    return early_model.__wrapped__(family)


def arena_of(model: PreTrainedModel) -> Arena:
    return profile_of(model).part(Arena)


def captured(model: PreTrainedModel) -> set[Layers]:
    return {shape.layers for shape in arena_of(model)._graphs}


def check(model: PreTrainedModel, drafter: Drafter, prompts: dict[str, Tensor], **options: Any) -> Any:
    """Greedy, each row like the row alone."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
    out = specdec.generate(model, **prompts, drafter=drafter, **settings, **options)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out.sequences, prompts["attention_mask"])
    assert arena_of(model).known.refusal is None
    return out


@pytest.fixture(params=[True, False], ids=["reads used", "biased"])
def reads_used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr("specdec.cuda.model.can_attend", lambda _: False)
    return request.param


@pytest.mark.parametrize("prompts", [RAGGED, ONE], ids=["ragged", "one"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_equality(name: str, prompts: dict[str, Tensor], reads_used: bool) -> None:
    model = fresh_model()
    check(model, DRAFTERS[name](model), prompts)
    found = captured(model)
    assert any(layers.start and layers != HEAD for layers in found)
    assert any(layers.stop for layers in found)
    assert (HEAD in found) == (name != "trained")
    assert {shape.reads_used for shape in arena_of(model)._graphs if shape.num_slots} == {reads_used}
    assert arena_of(model).known_of_parts.refusal is None


@pytest.mark.parametrize("tree", [Fixed((3, 2)), DySpec(6, max_depth=3)], ids=["fixed", "dyspec"])
def test_trees(tree: Any, reads_used: bool) -> None:
    model = fresh_model()
    out = check(model, EarlyExit(2), RAGGED, tree=tree)
    assert out.stats.num_accepted > 0
    assert {BELOW, ABOVE, HEAD} <= captured(model)


@pytest.mark.parametrize(
    "family", ["gpt2", "qwen3", "opt", "gpt_neox", "olmo2", "mistral", "starcoder2", "gemma3_text"]
)
def test_families(family: str) -> None:
    """Also of windows, and of embeddings that a part above an exit does without."""
    model = fresh_model(family)
    check(model, EarlyExit(2), RAGGED)
    assert {BELOW, ABOVE, HEAD} <= captured(model)
    assert {shape.reads_used for shape in arena_of(model)._graphs if shape.num_slots} == {True}


@pytest.mark.parametrize("name", DRAFTERS)
def test_samples_are_those_without_graphs(name: str) -> None:
    outputs = []
    for refusal in (None, "not in this test"):
        model = fresh_model()
        arena_of(model).known.refusal = refusal
        torch.manual_seed(0)
        settings = {"max_new_tokens": NUM_NEW, "do_sample": True, "temperature": 0.7}
        outputs.append(specdec.generate(model, **RAGGED, drafter=DRAFTERS[name](model), **settings))
        assert bool(captured(model)) == (refusal is None)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_states_and_logits_of_the_parts() -> None:
    """As those of the ordinary forwards, in ragged rows, with a tail of what was drafted before."""
    model, tokens_BT = fresh_model(), RAGGED["input_ids"][:, :3]
    models = [exit_model_of(model), EarlyExitModel(model)]
    assert isinstance(models[0], GraphedExitModel)
    offsets_BT = torch.arange(3).expand_as(tokens_BT)
    for _ in range(4):
        found = []
        for each in models:
            each.keep_states([1, 3])
            each.prefill(RAGGED["input_ids"], attention_mask=RAGGED["attention_mask"])
            each.cache.commit([range(0)] * 4)
            parts = [each.forward_below(2, tokens_BT[:, i : i + 1], offsets_BT[:, i : i + 1], None) for i in range(3)]
            seen_BTT = (offsets_BT[:, :, None] >= offsets_BT[:, None]).contiguous()
            logits, states = each._forward_layers(Layers(2), tokens_BT, offsets_BT, seen_BTT, [torch.cat(parts, 1)])
            found.append([*parts, each.exit_logits(parts[0]), logits, states[3]])
            each.forget_tail()
            each.select_rows([])
        for replayed, expected in zip(*found, strict=True):
            torch.testing.assert_close(replayed, expected)
    assert captured(model) == {BELOW, ABOVE, HEAD}


@pytest.mark.parametrize("error", ["raises", "says otherwise"])
def test_parts_that_are_not_captured_run_as_they_are(
    error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They come down all the way; forwards of all layers are replayed as before."""
    model, run = fresh_model(), Arena.graph

    def graph(arena: Arena, shape: Shape, filled: Any, forward: Any, pool: Any) -> Any:
        def other(*given: Any) -> Any:
            if error == "raises":
                raise RuntimeError("it looks at its layers")
            return tuple(part + 1 + part.roll(1, -1) for part in forward(*given))

        return run(arena, shape, filled, forward if shape.has_all_layers else other, pool)

    monkeypatch.setattr(Arena, "graph", graph)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check(model, EarlyExit(2), RAGGED)
    known = arena_of(model).known_of_parts
    assert known.refusal is not None
    assert ("looks at its layers" in known.refusal) == (error == "raises")
    assert caplog.text.count("some layers of LlamaForCausalLM: no CUDA graphs") == 1
    assert arena_of(model).known.reads_all is None
    check(model, Plain(), RAGGED)
    assert captured(model) == {Layers()}


def test_graphs_of_parts_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cuda.arena._MOST_GRAPHS", 2)
    model = fresh_model()
    check(model, EarlyExit(objective="tokens-per-layer", shadow_share=1), ONE)
    assert len(arena_of(model)._graphs) == 2
    check(model, Plain(), ONE)
    assert Layers() in captured(model)


def test_the_draft_of_another_run_has_no_graphs() -> None:
    """Nor may it write to the buffers of the first."""
    model = tiny_model("llama", num_hidden_layers=3)
    first, second = exit_model_of(model), exit_model_of(model)
    for each in (first, second):
        each.prefill(ONE["input_ids"])
    kept = [layer.keys.clone() for layer in first.cache.stored.values()]
    for _ in range(3):
        hidden_B1C = second.forward_below(1, ONE["input_ids"][:, :1], torch.zeros(1, 1, dtype=torch.long), None)
        second.exit_logits(hidden_B1C)
    assert not captured(model)
    assert all(torch.equal(*pair) for pair in zip(kept, [x.keys for x in first.cache.stored.values()], strict=True))
