"""Acceptance that is replayed, with a stand-in for graphs: it chooses what the ordinary one would."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

import specdec
from specdec.acceptance import coins as coins_module
from specdec.acceptance import to_host, topdown
from specdec.acceptance.families import links_of, most_tests
from specdec.acceptance.rules import topdown_steps
from specdec.cuda.arena import Arena
from specdec.cuda.functions import GraphedFunctions
from specdec.cuda.graphs import standing_in
from specdec.decoding.sampling import Sampler
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.errors import NumericalError
from specdec.kernels.model.profile import profile_of
from specdec.kernels.trees import verification
from specdec.testing import random_prompts, tiny_model
from tests.support.exact_rounds import Enumeration
from tests.support.goodness import assert_drawn_from
from tests.support.references import with_noise
from tests.support.sampled_rows import NUM_NEW, assert_ragged_rows_are_exact, continuations, exact_distribution, tiny
from trees import ROOT, Chain, Draft, Part, Sequoia, TokenTree, TreeBatch

VOCAB_SIZE = 7
WARPERS: dict[str, list[lp.LogitsProcessor]] = {
    "none": [],
    "warpers": [lp.TemperatureLogitsWarper(0.6), lp.TopKLogitsWarper(4), lp.TopPLogitsWarper(0.9)],
}
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And what they are compared with is not the native library, which draws other coins."""
    monkeypatch.setattr(verification, "can_verify", lambda *_: False)
    with standing_in():
        yield


def chains(generator: torch.Generator) -> TreeBatch:
    """Three rows of other lengths each time."""
    sizes = [3, int(torch.randint(4, (), generator=generator)), int(torch.randint(4, (), generator=generator))]
    return TreeBatch.chains(torch.randint(VOCAB_SIZE, (3, 3), generator=generator), sizes)


def forest(generator: torch.Generator) -> TreeBatch:
    """Two rows of other trees each time, whose siblings differ."""
    rows = []
    for size in (5, int(torch.randint(6, (), generator=generator))):
        parents = [int(torch.randint(ROOT, max(node, 0), (), generator=generator)) for node in range(size)]
        tokens = torch.randperm(VOCAB_SIZE, generator=generator)[:size].tolist()
        rows.append(TokenTree(tokens=tokens, parents=parents))
    return TreeBatch.stack([*rows, TokenTree(tokens=[1, 2, 3], parents=[ROOT, 0, 1])])


def nothing(_: torch.Generator) -> TreeBatch:
    return TreeBatch.empty(2)


DETERMINISTIC = [nothing, chains, forest]
CASES = [
    *((trees, False, do_sample) for trees in DETERMINISTIC for do_sample in (False, True)),
    (chains, True, True),
    (forest, True, True),
]


@pytest.mark.parametrize("warpers", WARPERS)
@pytest.mark.parametrize("keeps_scores", [False, True])
@pytest.mark.parametrize(("make", "is_drawn", "do_sample"), CASES)
def test_replays_choose_what_the_rules_choose(
    make: Callable[[torch.Generator], TreeBatch], is_drawn: bool, do_sample: bool, keeps_scores: bool, warpers: str
) -> None:
    """Of other numbers each time; and they leave the generator where the rules do."""
    made, graphs = torch.Generator().manual_seed(0), GraphedFunctions()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    samplers = [
        Sampler(LogitsProcessorList(WARPERS[warpers]), do_sample=do_sample, generator=each) for each in generators
    ]
    kept = set()
    for number in range(40):
        trees = make(made)
        size = (trees.num_rows, trees.num_slots, VOCAB_SIZE)
        q_BTV = torch.randn(size, generator=made).softmax(-1) if is_drawn else None
        draft, logits_BTV = Draft(trees=trees, q_BTV=q_BTV), torch.randn(size, generator=made)
        if trees.width:  # the target agrees now and then
            logits_BTV[:, :-1] += 2 * torch.nn.functional.one_hot(trees.tokens_BN, VOCAB_SIZE)
        given = logits_BTV.clone()
        scores_BTV = samplers[0].process(logits_BTV, None)  # type: ignore[arg-type]  # no processor looks at prefixes
        rule = samplers[1].rule(draft, keeps_scores=keeps_scores)
        assert rule is not None
        assert rule.takes_logits == (not keeps_scores)
        logits_BTV = scores_BTV if keeps_scores else logits_BTV
        if is_drawn and not trees.is_chain:  # takes other coins than `topdown`: compared below
            expected = to_host(trees, rule.replay(GraphedFunctions(), draft, logits_BTV, generators[0]))
        else:
            expected = to_host(trees, samplers[0].accept(scores_BTV, draft))
        assert to_host(trees, rule.replay(graphs, draft, logits_BTV, generators[1])) == expected, number
        assert keeps_scores or torch.equal(logits_BTV, given)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        kept |= {len(path) for path in expected.paths}
    assert graphs.num_replays > 15
    assert len(kept) > min(trees.width, 2)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_scores_that_are_no_numbers_are_refused(do_sample: bool, bad: float) -> None:
    """On the way only, as without graphs."""
    if not do_sample and bad == -torch.inf:
        pytest.skip("greedily such scores have a greatest one")
    sampler, graphs = Sampler(LogitsProcessorList(), do_sample=do_sample), GraphedFunctions()
    draft = Draft(trees=TreeBatch.chains(torch.tensor([[1, 2]])))
    logits_BTV = torch.full((1, 3, VOCAB_SIZE), -50.0)
    logits_BTV[0, 0, 1] = logits_BTV[0, 1, 5] = 50.0
    for slot in (2, 2, 2, 2, 1, 1, 2):
        spoilt = logits_BTV.clone()
        spoilt[0, slot] = bad
        rule = sampler.rule(draft, keeps_scores=False)
        assert rule is not None
        acceptance = rule.replay(graphs, draft, spoilt, None)
        if slot == 1:
            with pytest.raises(NumericalError):
                to_host(draft.trees, acceptance)
        else:
            assert to_host(draft.trees, acceptance).candidates == [[1, 5]]
    assert graphs.num_replays == 5


def test_what_is_drawn_otherwise_has_no_rule() -> None:
    """Traversal goes from the leaves up, and a merged draft has several sources."""
    trees = TreeBatch.stack([TokenTree(tokens=[1, 2], parents=[ROOT, ROOT])])
    drawn = Draft(trees=trees, q_BTV=torch.ones(1, 3, VOCAB_SIZE) / VOCAB_SIZE)
    merged = replace(drawn, q_BTV=None, parts=[Part(draft=drawn, nodes=[[0, 1]])])
    samplers = [Sampler(LogitsProcessorList(), do_sample=True, verify=verify) for verify in ("topdown", "traversal")]
    assert samplers[0].rule(drawn, keeps_scores=False) is not None
    assert samplers[0].rule(merged, keeps_scores=False) is None
    assert samplers[1].rule(drawn, keeps_scores=False) is None


TREES = [
    TokenTree(tokens=[0, 2, 5, 1, 3, 0], parents=[ROOT, ROOT, ROOT, 0, 0, 1]),
    TokenTree(tokens=[4], parents=[ROOT]),
    TokenTree(tokens=[1, 3, 2, 6, 0], parents=[ROOT, 0, 0, 1, 1]),
]


def test_steps_are_topdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all outcomes of the coins: the same path, of the same weight, and the same distribution after it."""
    made, outcomes = torch.Generator().manual_seed(0), []
    p_RTV, q_RTV = torch.randn((2, len(TREES), 7, VOCAB_SIZE), generator=made, dtype=torch.float64).unbind()
    numbers = {id(tree): number for number, tree in enumerate(TREES)}
    for takes_steps in (False, True):
        coins = Enumeration.of(TREES)
        monkeypatch.setattr(coins_module, "bernoulli", coins.throw)
        monkeypatch.setattr(coins_module, "sample", coins.draw_one)
        trees = TreeBatch.stack(coins.tree_of_row)
        rows = [numbers[id(tree)] for tree in coins.tree_of_row]
        scores_BTV, q_BTV = p_RTV[rows], q_RTV.softmax(-1)[rows]
        draft = Draft(trees=trees, q_BTV=q_BTV)
        if takes_steps:
            (links,) = links_of(draft)
            most = most_tests(draft)
            assert most == 4
            both = links.first_child_BT, links.next_sibling_BT
            found = topdown_steps(trees, scores_BTV, q_BTV, both, most, None)
        else:
            found = topdown(draft, scores_BTV)
        assert coins.last_BV is not None
        paths = [path[:count] for path, count in zip(found.path_BD.tolist(), found.counts_B.tolist(), strict=True)]
        outcomes.append((paths, coins.weight_B, coins.last_BV))
    assert outcomes[0][0] == outcomes[1][0]
    assert len(set(map(tuple, outcomes[0][0]))) > 6
    for ours, theirs in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_processors_that_look_at_prefixes_stay_outside() -> None:
    processors = LogitsProcessorList([lp.TemperatureLogitsWarper(0.5), lp.NoRepeatNGramLogitsProcessor(2)])
    rule = Sampler(processors, do_sample=True).rule(Draft(trees=TreeBatch.empty(1)), keeps_scores=False)
    assert rule is not None
    assert not rule.takes_logits


def test_larger_inputs_move_the_buffers() -> None:
    graphs = GraphedFunctions()

    def double(given: Any, _: Any) -> Tensor:
        return given[0].long() * 2

    for size in (2, 2, 2, 9, 9, 9, 2, 2, 2):
        x_N = torch.randn(size) * 100
        assert torch.equal(graphs.call(size, double, [x_N], None), x_N.long() * 2)
    assert graphs.num_replays == 4  # that of two numbers is captured anew, once


def test_a_function_that_cannot_be_replayed_is_called(caplog: pytest.LogCaptureFixture) -> None:
    graphs, numbers = GraphedFunctions(), iter(range(100))

    def count(given: Any, _: Any) -> Tensor:
        return given[0].long() + next(numbers)

    with caplog.at_level(logging.WARNING, "specdec"):
        results = [int(graphs.call("count", count, [torch.zeros(())], None)) for _ in range(4)]
    assert results[0] == 0
    assert results == sorted(set(results))
    assert graphs.num_replays == 0
    assert len(caplog.records) == 1


def functions_of(model: Any) -> GraphedFunctions:
    return profile_of(model).part(Arena).functions


DRAFTERS: dict[str, tuple[Callable[[Any], Drafter], dict[str, Any]]] = {
    "plain": (lambda _: Plain(), {}),
    "lookup": (lambda _: PromptLookup(min_match=1), {}),
    "chain": (SmallModel, {"tree": Chain(3)}),
    "tree": (SmallModel, {"tree": Sequoia(6, (0.5, 0.2))}),
}


@pytest.mark.rotated
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("prompts", "options"), [(ONE, {}), (RAGGED, {"repetition_penalty": 1.3}), (RAGGED, {"no_repeat_ngram_size": 3})]
)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_same_tokens_with_and_without(
    name: str, prompts: dict[str, Tensor], options: dict[str, Any], do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draft = tiny_model("llama"), with_noise(tiny_model("llama"))
    make, settings = DRAFTERS[name]
    settings = {"max_new_tokens": 24, "do_sample": do_sample, **options, **settings}

    def run() -> Tensor:
        torch.manual_seed(0)
        return specdec.generate(model, **prompts, drafter=make(draft), **settings)

    replayed = run()
    assert functions_of(model).num_replays > 2
    if do_sample and name == "tree":  # other coins than without a function
        monkeypatch.setattr("specdec.cuda.functions.graphs_for", lambda _: None)
        profile_of(model).part(Arena).functions = GraphedFunctions()
    else:
        monkeypatch.setattr("specdec.decoding.loop.functions_of", lambda _: None)
    assert torch.equal(replayed, run())


@pytest.mark.parametrize("name", ["lookup", "chain", "tree"])
def test_distributions_are_exact(name: str) -> None:
    target, (make, options) = tiny(seed=1), DRAFTERS[name]
    prompt, settings = torch.tensor([[1, 4, 2, 1]]), {"temperature": 0.7, "top_k": 4, "top_p": 0.95}
    torch.manual_seed(0)
    for _ in range(3):  # the third is replayed from the first round on
        out = specdec.generate(
            target,
            prompt,
            do_sample=True,
            max_new_tokens=NUM_NEW,
            num_return_sequences=1_500,
            drafter=make(tiny(seed=2)),
            **settings,
            **options,
        )
    assert functions_of(target).num_replays > 0
    expected = exact_distribution(target, prompt, **settings)
    assert_drawn_from(continuations(out, prompt.shape[1]), expected, name)
    assert_ragged_rows_are_exact(target, make(tiny(seed=2)), **options)


def test_scores_that_are_asked_for() -> None:
    model, options = tiny_model("llama"), {"return_dict_in_generate": True, "output_scores": True}
    settings = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.2, **options}
    ours = specdec.generate(model, **ONE, drafter=PromptLookup(min_match=1), **settings)
    assert functions_of(model).num_replays > 2
    theirs = model.generate(**ONE, **settings)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores))


def test_two_runs_at_once_do_not_share() -> None:
    """The second has no graphs."""
    model = tiny_model("llama")

    class Nested(lp.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            before = functions_of(model).num_replays
            specdec.generate(model, **ONE, drafter=Plain(), max_new_tokens=6, do_sample=False)
            assert functions_of(model).num_replays == before
            return scores

    settings = {"max_new_tokens": 6, "do_sample": False}
    out = specdec.generate(model, **ONE, drafter=Plain(), logits_processor=LogitsProcessorList([Nested()]), **settings)
    assert torch.equal(out, model.generate(**ONE, **settings))
