"""The target drafts with a part of its past: what it says is what it says without, whatever slots are chosen."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper

import specdec
from specdec import DraftError
from specdec.control import ForwardCosts
from specdec.control import costs as costs_module
from specdec.drafters import Auto, Mixed, Plain, PromptLookup, SparseSelf
from specdec.drafters.auto import drafter as auto
from specdec.drafters.auto import sources
from specdec.engine import Engine
from specdec.kernels import native
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.model import TreeModel
from specdec.tree_model.selection import most_attended
from specdec.tree_model.sparse import SparseModel
from tests.support.engine_requests import REQUESTS, TOKENIZER, expected, model_of
from tests.support.enumeration import ToyModel
from tests.support.exact_rounds import CAUGHT, VERIFIERS, total_variation
from tests.support.families import CHUNKED, INDEXED, SHARED, UNLISTED
from tests.support.references import plain_alone, rows_of, speculate
from tests.support.sampled_rows import assert_ragged_rows_are_exact, tiny
from tests.support.session_drafts import every_draft
from trees import Chain, DySpec, Fixed, GrowthPolicy

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])
SELECTIONS = ("window", "attention")
FAMILIES = ("llama", "qwen3", "gemma2", "mistral", "gpt2", "phi3")
NATIVE = {"hidden_size": 64, "head_dim": 32, "vocab_size": 64, "num_hidden_layers": 2}
"""Sizes that the native kernels take."""
ROUNDING = 1e-5


@lru_cache(maxsize=1)
def target_and_reference(family: str) -> tuple[PreTrainedModel, Tensor]:
    model = tiny_model(family)
    return model, plain_alone(model, PROMPTS, NUM_NEW)


@pytest.mark.parametrize("tree", [None, DySpec(budget=8)], ids=["chain", "tree"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_the_targets(family: str, select: Any, tree: GrowthPolicy | None) -> None:
    model, reference = target_and_reference(family)
    out = speculate(model, PROMPTS, SparseSelf(budget=16, select=select), tree=tree, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted > 0
    prompt = rows_of(PROMPTS, [1])
    alone = speculate(model, prompt, SparseSelf(budget=8, select=select), tree=tree, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference[1:2, -NUM_NEW - 12 :], alone.sequences, prompt["attention_mask"])
    assert alone.stats.num_drafted > 0


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("select", SELECTIONS)
def test_native_layers(select: Any, weights: Any) -> None:
    model = specdec.prepare(tiny_model("llama", **NATIVE), weights=weights)
    prompts = random_prompts([5, 12, 9, 18], vocab_size=60)
    reference = plain_alone(model, prompts, NUM_NEW)
    out = speculate(model, prompts, SparseSelf(budget=16, select=select), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
    assert out.stats.num_accepted > 0


@pytest.mark.parametrize("settings", [{}, {"attn_implementation": "eager"}, SHARED], ids=["sdpa", "eager", "shared"])
def test_layers_whose_queries_are_not_seen_take_the_newest(settings: dict[str, Any]) -> None:
    family = "gemma3n_text" if settings is SHARED else "gemma2"
    model = tiny_model(family, **UNLISTED["gemma3n_text"] if settings is SHARED else settings)
    out = speculate(model, PROMPTS, SparseSelf(budget=8), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, plain_alone(model, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_drafted > 0


def test_nothing_is_drafted_while_the_budget_holds_everything() -> None:
    model, reference = target_and_reference("llama")
    out = speculate(model, PROMPTS, SparseSelf(budget=30), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_drafted > 0
    assert speculate(model, PROMPTS, SparseSelf(budget=42), max_new_tokens=NUM_NEW).stats.num_drafted == 0


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("tree", [Chain(3), Fixed((2, 1)), DySpec(3, max_depth=2)], ids=["chain", "fixed", "dyspec"])
@pytest.mark.parametrize("select", SELECTIONS)
def test_q_is_what_tokens_are_drawn_from(
    select: Any, tree: GrowthPolicy, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft of the second round, whose slots are chosen by the queries of the first."""
    model = tiny_model("llama", vocab_size=4, initializer_range=0.3)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(3)]
    drafter = SparseSelf(budget=4, select=select)
    drafts = every_draft(model, drafter, tree, warpers, monkeypatch, num_rounds_before=1)
    assert sum(prob for prob, _ in drafts) == pytest.approx(1, abs=ROUNDING)
    error, num_accepted = total_variation(drafts, ToyModel(3, vocab_size=4), verify, monkeypatch)
    assert error < ROUNDING < CAUGHT
    assert num_accepted > 0.3


@pytest.mark.parametrize(
    ("select", "verify"),
    [
        ("attention", "topdown"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("attention", "traversal"), ("window", "topdown"))),
    ],
)
def test_sampled_rows_follow_the_target(select: Any, verify: str) -> None:
    drafter = SparseSelf(budget=3, select=select, num_tokens=2)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter, verify=verify)


@pytest.mark.parametrize("select", SELECTIONS)
def test_requests_that_join_and_leave_an_engine(select: Any) -> None:
    engine = Engine(model_of(), drafter=SparseSelf(8, select, num_tokens=3), tokenizer=TOKENIZER, max_rows=3)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    assert [generation.tokens for generation in generations] == [expected(n) for n in range(len(REQUESTS))]
    assert sum(generation.stats.drafted for generation in generations) > 0


@pytest.mark.skipif(native.library() is None, reason=native.describe())
@pytest.mark.parametrize("select", SELECTIONS)
def test_requests_in_pages(select: Any) -> None:
    model, texts = specdec.prepare(tiny_model("llama", hidden_size=64, head_dim=32), weights="int8"), []
    for drafter in (Plain(), SparseSelf(16, select, num_tokens=3)):
        engine = Engine(model, drafter=drafter, tokenizer=TOKENIZER, max_rows=3)
        generations = [engine.submit(request) for request in REQUESTS]
        engine.run()
        texts.append([generation.tokens for generation in generations])
        assert engine._loop.target.is_packed
    assert texts[0] == texts[1]
    assert sum(generation.stats.accepted for generation in generations) > 0


def test_it_takes_its_turn_with_others() -> None:
    model, reference = target_and_reference("llama")
    mixed = Mixed([PromptLookup(min_match=1), SparseSelf(budget=8, num_tokens=3)])
    out = speculate(model, PROMPTS, mixed, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("named", [False, True])
def test_auto_drafts_with_it_from_some_length_on(named: bool, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are priced as forwards of a short past: the price of a plain round is that of the whole text."""
    model = specdec.prepare(tiny_model("llama", **NATIVE), weights=weights)
    prompts = random_prompts([20, 30, 25], vocab_size=60)
    costs = ForwardCosts({1: 1e-3, 64: 2e-3}, slopes=lambda: dict.fromkeys((1, 64), 1.0))
    for module in (auto, sources):
        monkeypatch.setattr(module, "costs_of", lambda model, num_rows=1: costs)
    monkeypatch.setattr(auto, "_own_drafters", lambda run, auto: [])
    monkeypatch.setattr(auto, "_sparse_self", SparseSelf(budget=16))
    monkeypatch.setattr(auto, "_LONG", 40)
    monkeypatch.setattr(costs_module, "_SHORT", 35)
    reference = plain_alone(model, prompts, NUM_NEW)
    drafter = Auto(SparseSelf(budget=16)) if named else Auto()
    out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
    assert ("SparseSelf" if named else "Cascade") in {round_["drafter"] for round_ in out.stats.trace}
    assert speculate(model, rows_of(prompts, [0]), Auto(), max_new_tokens=4).stats.draft_forwards == 0


# The model with a part of the past


@torch.no_grad()
@pytest.mark.parametrize("by_attention", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox"])
def test_with_all_slots_it_is_the_model_itself(family: str, by_attention: bool) -> None:
    """Ragged rows, padding, tokens committed in between, a row that leaves and one that joins."""
    target = TreeModel(model := tiny_model(family))
    target.prefill(PROMPTS["input_ids"], attention_mask=PROMPTS["attention_mask"])
    sparse = SparseModel(model, budget=64, by_attention=by_attention)
    sparse.begin(4)
    tokens_B2 = torch.tensor([[7, 9], [8, 3], [1, 5], [4, 4]])
    offsets_B2 = torch.arange(2).expand(4, 2)
    seen_B22 = torch.ones(4, 2, 2, dtype=torch.bool).tril()
    rows = [0, 1, 2, 3]
    for kept in ([[0], [0, 1], [], [0]], [[0, 1]] * 4, [[0]] * 3):
        sparse.follow(target)
        said = sparse.forward(tokens_B2[rows], offsets_B2[rows], seen_B22[rows])
        sparse.forget_tail()
        expected_BTV = target.forward(tokens_B2[rows], offsets_B2[rows], seen_B22[rows])
        torch.testing.assert_close(said, expected_BTV, atol=1e-5, rtol=1e-4)
        target.commit(kept)
        if len(rows) == 4 and kept[2]:
            rows = [3, 0, 1]
            target.select_rows(rows)
            sparse.select_rows(rows)
    sparse.cache.check_integrity()


@torch.no_grad()
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("weights", [None, "int8"])
def test_it_sees_the_chosen_slots_and_those_since(weights: Any, select: str) -> None:
    """Beside a mask that shows just these: sinks and the newest, or what is attended to most."""
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=64, head_dim=32)
    if weights is not None:
        specdec.prepare(model, weights=weights)
    prompt_1P = random_prompts([40])["input_ids"]
    target = TreeModel(model)
    target.prefill(prompt_1P)
    sparse = SparseModel(model, budget=16, by_attention=select == "attention")
    sparse.begin(1)
    token, offset = torch.tensor([[7]]), torch.tensor([[0]])
    sparse.follow(target)
    sparse.forward(token, offset, None)
    sparse.follow(target)
    keys = target.cache.row_views(0).layer(0)[0]
    own = sparse.cache.row_views(0).layer(0)[0]
    assert own.shape[1] == 16
    if select == "window":
        assert torch.equal(own, torch.cat([keys[:, :4], keys[:, -12:]], 1))
    else:
        same_KNS = (own[:, :, None] == keys[:, None]).all(-1)
        assert same_KNS.any(2).all(), "each slot is one of the target's"
        assert not torch.equal(own, torch.cat([keys[:, :4], keys[:, -12:]], 1))


def test_the_most_attended_slots() -> None:
    """Of two heads of keys: one has what is looked for in slot 7, the other in 11."""
    key_KSD = torch.zeros(2, 40, 4)
    key_KSD[0, 7, 0] = key_KSD[1, 11, 0] = 9.0
    slots_S = torch.arange(40) + 5
    chosen_KN = most_attended(slots_S, 12, torch.ones(2, 6, 4), key_KSD)
    assert chosen_KN.shape == (2, 12)
    for head, wanted in enumerate((7, 11)):
        chosen = set((chosen_KN[head] - 5).tolist())
        assert {0, 1, 2, 37, 38, 39, wanted} <= chosen
        assert len(chosen) == 12


def test_refusals() -> None:
    for settings in ({"budget": 0}, {"budget": True}, {"budget": 1.5}, {"select": "random"}, {"num_tokens": 0}):
        with pytest.raises(ValueError, match=r"SparseSelf|positive"):
            SparseSelf(**settings)
    for family, settings in (("deepseek_v32", INDEXED), ("llama4_text", CHUNKED), ("mamba", {})):
        model = tiny_model(family, **settings)
        with pytest.raises(DraftError, match="no part can be taken"):
            speculate(model, PROMPTS, SparseSelf(), max_new_tokens=4)
