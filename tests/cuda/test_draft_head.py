"""Steps of draft heads that are replayed, with a stand-in for graphs: they say what they say without, to one end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.cuda.arena import Arena
from specdec.cuda.graphs import standing_in
from specdec.drafters import DraftHead
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.fitting import fitted
from specdec.drafters.head.formats import EAGLE3, JUMP
from specdec.drafters.head.graphed import GraphedHeadRunner, runner_of
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.runner import HeadRunner
from specdec.kernels.model.profile import profile_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from specdec.training.heads.initial import layer_sizes, new_head, seeded
from specdec.tree_model.model import TreeModel
from tests.support.block_heads import TinyBlockHead, save_authors
from tests.support.heads import TinyHead, save_parallel, save_speculators, small_vocab_model
from tests.support.mtp_heads import TinyMtp
from tests.support.references import plain_alone
from trees import Chain, DySpec, Fixed, GrowthPolicy

NUM_NEW = 20
RAGGED, ONE = random_prompts([5, 12, 2, 9]), random_prompts([12])


def fresh_model() -> PreTrainedModel:
    return small_vocab_model.__wrapped__()


def jump_of(target: PreTrainedModel) -> Jump:
    """Two layers that have learnt nothing, and rows of the target's LM head."""
    config = target.config.__class__(**{**target.config.to_dict(), "num_hidden_layers": 2, "dtype": torch.float32})
    head = new_head(Jump, JUMP, config, (4,), target, torch.tensor([0, 2, 3, 4]))
    with seeded(3):
        for weight in head.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape) + (weight.dim() == 1))
    return head


def mtp_of(folder: Path, *layout: Any) -> tuple[PreTrainedModel, DraftHead]:
    tiny = TinyMtp(*layout)
    return tiny.target, DraftHead(tiny.save(folder))


def on_a_llama(make: Callable[[Path, PreTrainedModel], Any]) -> Callable[[Path], tuple[PreTrainedModel, DraftHead]]:
    def made(folder: Path) -> tuple[PreTrainedModel, DraftHead]:
        target = fresh_model()
        return target, DraftHead(make(folder, target))

    return made


HEADS: dict[str, Callable[[Path], tuple[PreTrainedModel, DraftHead]]] = {
    "eagle": on_a_llama(lambda folder, _: save_speculators(folder, TinyHead())),
    "eagle, three layers": on_a_llama(lambda folder, _: save_speculators(folder, TinyHead(num_layers=3))),
    "eagle, the target's tables": on_a_llama(
        lambda folder, _: save_speculators(folder, TinyHead(drafts=None, has_lm_head=False, has_embedding=False))
    ),
    "p-eagle": on_a_llama(lambda folder, _: save_parallel(folder, TinyHead(is_parallel=True, num_layers=2), 9)),
    "dflash": on_a_llama(lambda folder, _: save_authors(folder, TinyBlockHead())),
    "dspark": on_a_llama(
        lambda folder, _: save_authors(folder, TinyBlockHead(markov="vanilla", drafts_at_root=True, is_causal=True))
    ),
    "jump": on_a_llama(lambda _, target: jump_of(target)),
    "mtp": lambda folder: mtp_of(folder, "speculators", "qwen3", torch.float32),
    "mtp, two layers": lambda folder: mtp_of(folder, "deepseek", "llama", torch.float32, 2),
}
TREES: dict[str, GrowthPolicy] = {"chain": Chain(4), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(9, max_depth=4)}


def arena_of(model: PreTrainedModel) -> Arena:
    return profile_of(model).part(Arena)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """All logits of heads."""
    heard: list[Tensor] = []
    logits = HeadRunner.logits

    def listen(runner: HeadRunner, normed_BTC: Tensor) -> Tensor:
        heard.append(logits(runner, normed_BTC).clone())
        return heard[-1]

    monkeypatch.setattr(HeadRunner, "logits", listen)
    return heard


def check(name: str, folder: Path, said: list[Tensor], prompts: dict[str, Tensor], **options: Any) -> None:
    """With graphs of the head alone, with graphs of both, and with none; of each the first run captures."""
    target, drafter = HEADS[name](folder)
    head = fitted(drafter.model, target)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **options}
    heard, outputs = [], []
    for refusals in ((None, None), (None, "not in this test"), ("not in this test",) * 2):
        arena_of(head).known.refusal, arena_of(target).known.refusal = refusals
        before = arena_of(head).num_replays
        said.clear()
        with standing_in() if refusals[0] is None else nullcontext():
            torch.manual_seed(0)
            outputs.append(specdec.generate(target, **prompts, drafter=drafter, **settings))
        heard.append(list(said))
        assert (arena_of(head).num_replays - before > 3) == (refusals[0] is None)
        assert arena_of(head).known.reads_all is None
    assert {shape.reads_used for shape in arena_of(head)._graphs} <= {True}
    for found, output in zip(heard[:-1], outputs[:-1], strict=True):
        for logits, expected in zip(found, heard[-1], strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(output, outputs[-1])
    if not settings["do_sample"]:
        assert_same_tokens(target, plain_alone(target, prompts, NUM_NEW), outputs[0], prompts["attention_mask"])


@pytest.mark.parametrize("prompts", [RAGGED, ONE], ids=["ragged", "one"])
@pytest.mark.parametrize("name", HEADS)
def test_greedy(name: str, prompts: dict[str, Tensor], tmp_path: Path, said: list[Tensor]) -> None:
    check(name, tmp_path, said, prompts)


@pytest.mark.parametrize(
    ("name", "tree"), [("eagle", "fixed"), ("eagle", "dyspec"), ("dflash", "fixed"), ("mtp", "dyspec")]
)
def test_trees(name: str, tree: str, tmp_path: Path, said: list[Tensor]) -> None:
    check(name, tmp_path, said, RAGGED, tree=TREES[tree])


@pytest.mark.parametrize("name", ["eagle", "p-eagle", "dspark", "jump", "mtp"])
def test_samples(name: str, tmp_path: Path, said: list[Tensor]) -> None:
    check(name, tmp_path, said, RAGGED, do_sample=True, temperature=0.8)


def test_a_step_that_is_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's warning, the target's graphs."""
    target, drafter = HEADS["eagle"](tmp_path)
    monkeypatch.setattr("specdec.drafters.head.graphed.attending", lambda head, _: head.norm)
    with standing_in():
        out = specdec.generate(target, **RAGGED, drafter=drafter, max_new_tokens=NUM_NEW, do_sample=False)
    assert_same_tokens(target, plain_alone(target, RAGGED, NUM_NEW), out, RAGGED["attention_mask"])
    assert "could not be captured" in (arena_of(drafter.model).known.refusal or "")
    assert arena_of(target).known.refusal is None
    assert arena_of(target).num_replays > 3


def test_windows_that_a_mask_alone_tells_of_are_not_captured() -> None:
    target = tiny_model("llama")
    for kinds, has_graphs in (("full_attention", True), ("sliding_attention", False)):
        config = target.config.__class__(**layer_sizes(target, 1), layer_types=[kinds], sliding_window=8)
        with standing_in():
            runner = runner_of(new_head(Eagle3, EAGLE3, config, (1, 2), target), TreeModel(target))
        assert isinstance(runner, GraphedHeadRunner) == has_graphs
