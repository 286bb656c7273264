"""Growth policies against brute force, and a draft model that grows them."""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specdec
import trees.dynamic
from specdec.drafters import SmallModel
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.enumeration import (
    EXACT,
    MAX_DEPTH,
    Prefix,
    RandomScores,
    ToyModel,
    drive,
    every_draft,
    grow,
    prefixes,
    q_of,
)
from tests.support.goodness import assert_drawn_from
from trees import (
    ROOT,
    Calibration,
    Chain,
    ConfidentChain,
    Draft,
    DySpec,
    DySpecThreshold,
    Fixed,
    GainLimitedChain,
    GrowthPolicy,
    Round,
    Sequoia,
    TokenTree,
    chain_length,
    count_ranks,
    count_shares,
    measure_acceptance,
    measure_calibration,
)

CALIBRATION = Calibration(before=(0.6, 0.5), after=((0.3, 0.4, 0.5, 0.6, 0.7, 0.9), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
POLICIES = {
    "chain": Chain(4),
    "confident chain": ConfidentChain(4, threshold=0.2),
    "fixed": Fixed((3, 2, 1)),
    "sequoia": Sequoia(9, (0.6, 0.3, 0.1)),
    "dyspec": DySpec(9),
    "dyspec shallow": DySpec(9, max_depth=2),
    "dyspec shared": DySpec(9, shared=True),
    "threshold": DySpecThreshold(0.05, max_nodes=9),
    "dyspec calibrated": DySpec(9, calibration=CALIBRATION),
    "gain-limited chain": GainLimitedChain(prices=[0.3] * 3, chance=float, next_chance=0.8),
    "gain-limited leaves": GainLimitedChain(prices=[0.3] * 3, chance=float, next_chance=0.8, leaf_prices=[0.02] * 9),
}


def grow_greedily(policy: GrowthPolicy, model: RandomScores, max_depth: int = 50) -> TokenTree:
    return grow(policy, [model], [max_depth], sample=False).trees.row(0)


def paths(tree: TokenTree) -> list[Prefix]:
    """The text of each node, in node order."""
    return prefixes(tree)[1:]


# arguments


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(0),
        lambda: ConfidentChain(0, 0.5),
        lambda: ConfidentChain(3, 1.5),
        lambda: Fixed(()),
        lambda: Fixed((2, 0)),
        lambda: Fixed(3),
        lambda: Sequoia(0, (0.5,)),
        lambda: Sequoia(4, ()),
        lambda: Sequoia(4, (0.5, 1.5)),
        lambda: DySpec(0),
        lambda: DySpec(2.5),
        lambda: DySpec(4, max_depth=0),
        lambda: Calibration(before=(), after=()),
        lambda: Calibration(before=(0.5,), after=((0.5,),)),
        lambda: Calibration(before=(1.5,), after=((0.5,) * 6,)),
        lambda: DySpec(4, calibration=0.5),
        lambda: DySpecThreshold(0.0),
        lambda: DySpecThreshold(1.0),
        lambda: DySpecThreshold(0.1, max_nodes=0),
    ],
)
def test_wrong_arguments_are_value_errors(make: Callable[[], GrowthPolicy]):
    with pytest.raises(ValueError, match=r"\w+\(\w+=.*\): "):
        make()


def test_policies_are_values():
    assert Fixed([2, 1]) == Fixed((2, 1))
    assert hash(Sequoia(4, [0.5])) == hash(Sequoia(4, (0.5,)))


# every policy


def check_draft(draft: Draft, models: Sequence[RandomScores], max_depths: Sequence[int], sample: bool) -> None:
    for row, (model, max_depth) in enumerate(zip(models, max_depths, strict=True)):
        tree = draft.trees.row(row)
        assert max(tree.depths, default=0) <= max_depth
        assert len(set(paths(tree))) == len(tree), "siblings are different tokens"
        for slot, prefix in enumerate(prefixes(tree)):
            q_V = model.probs(prefix)
            if sample and tree.children[slot]:
                torch.testing.assert_close(q_of(draft, row, slot), q_V, rtol=0, atol=0)
            if tree.probs is not None:
                found = [tree.probs[child] for child in tree.children[slot]]
                assert found == pytest.approx([float(q_V[tree.tokens[child]]) for child in tree.children[slot]])
        if tree.values is not None:
            for node, parent in enumerate(tree.parents):
                assert parent == ROOT or tree.values[node] <= tree.values[parent]


@pytest.mark.parametrize("sample", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    max_depths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    spread=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
)
def test_trees_keep_their_promises(name: str, sample: bool, seed: int, max_depths: list[int], spread: float):
    models = [RandomScores(seed + row, spread=spread) for row in range(len(max_depths))]
    draft = grow(POLICIES[name], models, max_depths, sample)
    assert draft.is_drawn == sample
    check_draft(draft, models, max_depths, sample)
    if name.startswith(("sequoia", "dyspec", "threshold")):
        active = sum(depth > 0 for depth in max_depths)
        assert sum(draft.trees.sizes) <= 9 * active
        assert name == "dyspec shared" or max(draft.trees.sizes) <= 9


def test_budgets_are_used_up():
    models = [RandomScores(1), RandomScores(2, spread=0.3)]
    for sample in (True, False):
        assert grow(DySpec(9), models, [50, 50], sample).trees.sizes == (9, 9)
        assert grow(Sequoia(9, (0.6, 0.3)), models, [50, 50], sample).trees.sizes == (9, 9)
        assert grow(Fixed((3, 2)), models, [50, 1], sample).trees.sizes == (9, 3)
        shared = grow(DySpec(9, shared=True), models, [50, 50], sample).trees.sizes
        assert sum(shared) == 18


def test_trees_stand_in_depth_first_order():
    for policy in (Fixed((3, 2, 1)), Sequoia(9, (0.6, 0.3)), DySpec(9)):
        tree = grow(policy, [RandomScores(9)], [50]).trees.row(0)
        assert tree.dfs_order() == list(range(len(tree)))


def test_supports_smaller_than_a_family_are_drawn_whole():
    class TwoTokens(RandomScores):
        def scores(self, prefix: Prefix) -> Tensor:
            return super().scores(prefix).index_fill(0, torch.arange(2, 11), -torch.inf)

    for sample in (True, False):
        draft = grow(Fixed((4, 3)), [TwoTokens(3)], [9], sample)
        assert sorted(paths(draft.trees.row(0))) == [(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]


def test_large_families_take_several_batches():
    for sample in (True, False):
        tree = grow(Fixed((200,)), [RandomScores(4, vocab_size=500)], [9], sample).trees.row(0)
        assert len(set(tree.tokens)) == 200


def test_a_generator_reproduces_and_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    model = RandomScores(5)
    for policy in POLICIES.values():
        drafts = [
            grow(policy, [model], [9], generator=torch.Generator().manual_seed(seed)).trees.row(0) for seed in (0, 0, 1)
        ]
        assert drafts[0].tokens == drafts[1].tokens
        assert drafts[0].tokens != drafts[2].tokens
    assert torch.equal(torch.get_rng_state(), state)


# dynamic trees


def heap_trees(model: ToyModel, budget: int, max_depth: int) -> dict[tuple, float]:
    """DySpec's algorithm 1, over all its draws: the probability of every ordered tree, as family -> tokens in order."""
    found: Counter[tuple] = Counter()

    def expand(slots: list, families: dict[Prefix, tuple], size: int, chance: float) -> None:
        slots = [slot for slot in slots if slot[0] > 0 and len(slot[2]) < max_depth]
        if size == budget or not slots:
            found[tuple(sorted(families.items()))] += chance
            return
        best = max(slots, key=lambda slot: slot[0])
        value, left, prefix = best
        others = [slot for slot in slots if slot is not best]
        for token, mass in enumerate(left):
            if not mass:
                continue
            rest = [0.0 if x == token else left_x for x, left_x in enumerate(left)]
            total = sum(rest)
            sibling = (value * (1 - mass), [x / total if total else 0.0 for x in rest], prefix)
            child = (value * mass, model.probs((*prefix, token)).tolist(), (*prefix, token))
            family = (*families.get(prefix, ()), token)
            expand([*others, sibling, child], {**families, prefix: family}, size + 1, chance * mass)

    expand([(1.0, model.probs(()).tolist(), ())], {}, 0, 1.0)
    return found


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_dyspec_draws_the_trees_of_its_algorithm(budget: int, monkeypatch: pytest.MonkeyPatch):
    model = ToyModel(seed=30)
    found: Counter[tuple] = Counter()
    for chance, draft in every_draft(DySpec(budget), [model], monkeypatch):
        tree = draft.trees.row(0)
        texts = prefixes(tree)
        families = {
            texts[slot]: tuple(tree.tokens[child] for child in children)
            for slot, children in enumerate(tree.children)
            if children
        }
        found[tuple(sorted(families.items()))] += chance
    assert found == pytest.approx(heap_trees(model, budget, MAX_DEPTH), abs=EXACT)


def likeliest_paths(model: RandomScores, budget: int, max_depth: int) -> set[Prefix]:
    """Best-first search."""
    heap = [(-1.0, ())]
    found: list[Prefix] = []
    while heap and len(found) <= budget:
        cost, prefix = heapq.heappop(heap)
        found.append(prefix)
        if len(prefix) < max_depth:
            for token, mass in enumerate(model.probs(prefix).double().tolist()):
                heapq.heappush(heap, (cost * mass, (*prefix, token)))
    return set(found[1:])


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("budget", [1, 7, 40])
def test_greedy_dyspec_is_best_first_search(budget: int, spread: float):
    for seed in range(5):
        model = RandomScores(seed, spread=spread)
        for max_depth in (2, 50):
            tree = grow_greedily(DySpec(budget), model, max_depth)
            found, best = (
                sorted(path_prob(model, path) for path in some)
                for some in (paths(tree), likeliest_paths(model, budget, max_depth))
            )
            assert found == pytest.approx(best)


def test_a_threshold_takes_all_above_it():
    threshold = 0.02
    for seed in range(5):
        model = RandomScores(seed)
        tree = grow(DySpecThreshold(threshold, max_nodes=10_000), [model], [50]).trees.row(0)
        assert min(tree.values) >= threshold
        reach = [1.0]
        for prob, parent in zip(tree.probs, tree.parents, strict=True):
            reach.append(reach[parent + 1] * prob)
        for slot, children in enumerate(tree.children):
            left = 1 - sum(tree.probs[child] for child in children)
            assert reach[slot] * left < threshold + 1e-6
        greedy = grow_greedily(DySpecThreshold(threshold, max_nodes=10_000), model)
        likely = {path for path in likeliest_paths(model, 400, 50) if path_prob(model, path) >= threshold}
        assert len(likely) < 400
        assert set(paths(greedy)) == likely


def path_prob(model: RandomScores, path: Prefix) -> float:
    prob = 1.0
    for length, token in enumerate(path):
        prob *= float(model.probs(path[:length])[token])
    return prob


@pytest.mark.parametrize("first", [1e-4, 0.5])
@pytest.mark.parametrize("sample", [True, False], ids=["sampled", "greedy"])
def test_the_threshold_learns_to_fill_the_budget(sample: bool, first: float):
    policy, previous, sizes = DySpecThreshold(first, max_nodes=24), None, []
    generator = torch.Generator().manual_seed(6)
    for seed in range(40):
        grower = policy.start(Round(max_depths=[50, 50], sample=sample, generator=generator, previous=previous))
        sizes += drive(grower, [RandomScores(2 * seed), RandomScores(2 * seed + 1)]).trees.sizes
        previous = grower
    used = sum(sizes[20:]) / (len(sizes[20:]) * 24)
    assert used > 0.75
    assert previous.next_threshold > 2e-3, "no more is drafted than the budget asks for"


def test_only_the_round_before_is_remembered():
    """Growers once held on to each other, and so to the scores of every round of a run."""
    policy, growers = DySpec(5), [None]
    for seed in range(3):
        growers.append(policy.start(Round(max_depths=[3], sample=False, previous=growers[-1])))
        drive(growers[-1], [RandomScores(seed)])
    first, last = weakref.ref(growers[1]), growers[-1]
    growers.clear()
    assert first() is None
    assert last.least_value > 0


@pytest.mark.parametrize("guess", [1e-9, 0.2, 1e3])
def test_a_bad_guess_costs_forwards_only(guess: float, monkeypatch: pytest.MonkeyPatch):
    policy, model = DySpec(20), RandomScores(3, spread=4.0)
    first = policy.start(Round(max_depths=[50], sample=False))
    expected = set(paths(drive(first, [model]).trees.row(0)))
    monkeypatch.setattr(trees.dynamic, "_CAUTION", guess / first.least_value)
    grower = policy.start(Round(max_depths=[50], sample=False, previous=first))
    assert set(paths(drive(grower, [model]).trees.row(0))) == expected


def test_values_follow_the_calibration():
    """What a value is: the chances of the path, of all earlier siblings' refusal, and of the next child."""
    model = RandomScores(4)
    tree = grow(DySpec(30, calibration=CALIBRATION), [model], [50]).trees.row(0)
    reach, bounds = [1.0] * (len(tree) + 1), [1.0] * (len(tree) + 1)
    for slot, children in enumerate(tree.children):
        refused, left = 1.0, 1.0
        for rank, child in enumerate(children):
            value = min(bounds[slot], reach[slot] * refused * CALIBRATION.of_next(rank))
            assert tree.values[child] == pytest.approx(value)
            chance = CALIBRATION.of_drawn(rank, min(1.0, tree.probs[child] / left))
            reach[child + 1] = reach[slot] * refused * chance
            bounds[slot] = bounds[child + 1] = value
            refused, left = refused * (1 - chance), left - tree.probs[child]


def test_a_calibration_is_measured_from_what_happened():
    tree = TokenTree(tokens=[5, 6, 7], parents=[ROOT] * 3, probs=[0.5, 0.4, 0.05])
    accepted, tested = count_shares(tree, [1], 2)
    assert tested.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert accepted.tolist() == [[0] * 6, [0, 0, 0, 1, 0, 0]]
    accepted, tested = np.zeros((2, 3, 6), np.int64)
    tested[:2] = 100
    accepted[0] = [10, 30, 20, 50, 90, 100]
    found = measure_calibration(accepted, tested)
    assert found.before == pytest.approx((0.5, 0.0))
    smoothed = [(hits + 1.5) / 103 for hits in (10, 25, 25, 50, 90, 100)]
    assert found.after[0] == pytest.approx(smoothed)
    with pytest.raises(ValueError, match="no child was tested"):
        measure_calibration(accepted, 0 * tested)


# static trees


def brute_force(num_nodes: int, acceptance: Sequence[float]) -> float:
    """The most expected accepted nodes (root included) of all ordered trees of a size."""
    if num_nodes == 1:
        return 1.0
    return max(
        1.0 + sum(chance * brute_force(size, acceptance) for size, chance in zip(sizes, acceptance, strict=False))
        for width in range(1, min(len(acceptance), num_nodes - 1) + 1)
        for sizes in compositions(num_nodes - 1, width)
    )


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, total), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, total))) for cut in cuts]


def expected_accepted(tree: TokenTree, acceptance: Sequence[float]) -> float:
    reach = [1.0] * (len(tree) + 1)
    for slot, children in enumerate(tree.children):
        for rank, child in enumerate(children):
            reach[child + 1] = reach[slot] * acceptance[rank]
    return sum(reach)


@pytest.mark.parametrize("acceptance", [(0.8,), (0.5, 0.4), (0.6, 0.2, 0.1), (0.1, 0.5, 0.3)], ids=str)
def test_sequoia_is_the_best_static_tree(acceptance: tuple[float, ...]):
    for budget in range(1, 8):
        tree = grow_greedily(Sequoia(budget, acceptance), RandomScores(7))
        assert len(tree) == budget
        assert expected_accepted(tree, acceptance) == pytest.approx(brute_force(budget + 1, acceptance))


def test_fixed_trees_take_the_likeliest_children_when_greedy():
    model = RandomScores(8)
    tree = grow_greedily(Fixed((3, 2)), model)
    texts = prefixes(tree)
    for slot, children in enumerate(tree.children[:4]):
        best = model.probs(texts[slot]).topk(len(children)).indices.tolist()
        assert [tree.tokens[child] for child in children] == best


def test_acceptance_is_measured_from_what_happened():
    tree = TokenTree(tokens=[5, 6, 7, 5, 6], parents=[ROOT, ROOT, ROOT, 1, 1])
    assert count_ranks(tree, [1, 3], 3) == ([1, 1, 0], [2, 1, 0])
    assert count_ranks(tree, [], 2) == ([0, 0], [1, 1])
    assert measure_acceptance([60, 20, 0, 0], [100, 40, 5, 0]) == pytest.approx((0.6, 0.4 * 0.5, 0.0))


# a draft model that grows them

VOCAB_SIZE = 24


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def small():
    return tiny_model("llama", vocab_size=VOCAB_SIZE, seed=1, num_hidden_layers=1)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_output_is_that_of_plain_decoding(name: str, target, small):
    for lengths in ([6], [5, 9, 3, 12]):
        prompts = random_prompts(lengths)
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 3}
        plain = target.generate(**prompts, **options)
        for draft in (small, target):
            found = specdec.generate(target, **prompts, **options, drafter=SmallModel(draft), tree=POLICIES[name])
            assert_same_tokens(target, plain, found, prompts["attention_mask"], **options)


LEAVES = GainLimitedChain(prices=[0.0] * 3, chance=float, next_chance=1.0, leaf_prices=[0.0] * 9)


@pytest.mark.parametrize("tree", [Fixed((2, 1, 1)), LEAVES], ids=["fixed", "leaves"])
def test_trees_follow_processors_that_look_at_prefixes(tree: GrowthPolicy, target):
    prompts = random_prompts([5, 9, 3, 12])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.3}
    plain = target.generate(**prompts, **options, no_repeat_ngram_size=2)
    out = specdec.generate(
        target,
        **prompts,
        **options,
        no_repeat_ngram_size=2,
        drafter=SmallModel(target),
        tree=tree,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, plain)
    assert out.stats.tokens_per_round > 3.5, "p and q are processed alike, so all is accepted"


@pytest.mark.parametrize("tree", [Fixed((3, 1, 1)), Fixed((2, 2, 1))], ids=str)
def test_a_draft_equal_to_its_target_is_accepted_to_the_end(tree: Fixed, target):
    """The draft's cache must hold exactly the accepted path of every row, whichever branch it was."""
    prompts = random_prompts([5, 9, 3, 12])
    for num_rounds in (4, 6):
        out = specdec.generate(
            target,
            **prompts,
            max_new_tokens=1 + 4 * num_rounds,
            do_sample=False,
            pad_token_id=0,
            drafter=SmallModel(target),
            tree=tree,
            return_dict_in_generate=True,
        )
        assert out.stats.accepted_histogram == {3: 4 * num_rounds}
        assert out.stats.draft_forwards == 1 + 3 * num_rounds, "the prompt, then one forward for each layer of all rows"


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("name", ["sequoia", "dyspec", "threshold"])
def test_sampled_output_is_the_targets(name: str, verify: str):
    """Three new tokens of 1000 equal rows against the target's probabilities (false alarm: 1e-6)."""
    target, small = (tiny_model("llama", vocab_size=6, seed=seed) for seed in (2, 3))
    prompt, num_rows, settings_ = torch.tensor([[1, 4, 2]]), 1_000, {"temperature": 1.5, "top_k": 5}
    out = specdec.generate(
        target,
        prompt.expand(num_rows, -1),
        max_new_tokens=4,
        do_sample=True,
        **settings_,
        drafter=SmallModel(small),
        tree=POLICIES[name],
        verify=verify,
        generator=torch.Generator().manual_seed(7),
    )
    texts = torch.cartesian_prod(*[torch.arange(6)] * 3)
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, 2:5] / 1.5
    logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    probs = logits.double().softmax(-1).gather(2, texts[:, :, None]).prod(1)[:, 0]
    expected = dict(zip(map(tuple, texts.tolist()), probs.tolist(), strict=True))
    assert_drawn_from([tuple(row) for row in out[:, 3:6].tolist()], expected)


def test_a_confident_chain_ends_after_the_first_token_that_it_is_not_sure_of():
    """Each row on its own; the unsure token stays."""
    probs = [[0.9, 0.8, 0.3, 0.9], [0.4, 0.9, 0.9, 0.9]]
    grower = ConfidentChain(4, threshold=0.5).start(Round(max_depths=[9, 9], sample=False))
    for step in range(4):
        if grower.needs_scores:
            rest = [(1 - row[step]) / 9 for row in probs]
            grower.grow(torch.tensor([[[row[step], *[left] * 9]] for row, left in zip(probs, rest, strict=True)]).log())
    assert grower.finish().trees.sizes == (3, 1)


def test_a_gain_limited_chain_takes_all_that_is_worth_its_price():
    """Greedy: the chain goes on while its reach pays, and no leaf that is left out is worth more than its price."""
    model = RandomScores(3, spread=1.5)
    policy = GainLimitedChain(
        prices=[0.25] * 5, chance=lambda prob: prob**0.25, next_chance=0.6, leaf_prices=[0.05] * 20, leaf_chance=float
    )
    tree = grow_greedily(policy, model)
    length = chain_length(tree)
    reaches = [1.0]
    for prob in tree.probs[:length]:
        reaches.append(reaches[-1] * prob**0.25)
    assert all(reach * 0.6 >= 0.25 for reach in reaches[1:length])
    assert length == 6 or reaches[length] * 0.6 < 0.25
    worth = set()
    for slot, prefix in enumerate(prefixes(tree)[:length]):
        probs, tokens = model.probs(prefix).sort(descending=True)
        beside = zip(tokens.tolist()[1:4], probs.tolist()[1:4], strict=True)
        worth |= {(slot + ROOT, token) for token, prob in beside if reaches[slot] * prob >= 0.05}
    assert worth
    assert {(tree.parents[leaf], tree.tokens[leaf]) for leaf in range(length, len(tree))} == worth


def test_rows_fill_up_to_the_width_that_there_is():
    """A row that must not draft deep gets leaves for nothing beside one that drafts a long chain."""
    models = [RandomScores(seed, spread=1.0) for seed in (1, 2)]
    dear = GainLimitedChain(prices=[0.0] * 4, chance=float, next_chance=1.0, leaf_prices=[2.0] * 9)
    draft = grow(dear, models, [5, 1], sample=False)
    assert draft.trees.sizes[0] == 5, "chain"
    assert draft.trees.sizes[1] == 4, "one token and three leaves"
    assert draft.grown_indices == [[0, 1, 2, 3, -1], [0, -1, -1, -1]]


def test_rows_share_a_budget_that_goes_where_it_is_worth_most():
    """All nodes, of any row, whose chance is at least its price, and no others; a row may get none."""
    models = [RandomScores(1, spread=4.0), RandomScores(2, spread=0.1), RandomScores(4, spread=2.0)]
    prices = [0.05 + 0.02 * place for place in range(40)]
    policy = GainLimitedChain(
        prices=[0.0] * 4, chance=float, next_chance=1.0, leaf_prices=prices, leaf_chance=float, shares_budget=True
    )
    draft = grow(policy, models, [5, 5, 5], sample=False)
    chances = []
    for row, model in enumerate(models):
        tree = draft.trees.row(row)
        for slot, prefix in enumerate(prefixes(tree)):
            reach = prod(float(model.probs(prefix[:end])[token]) for end, token in enumerate(prefix))
            if slot:
                chances.append(reach)
    assert draft.trees.sizes[1] == 0 < min(draft.trees.sizes[0], draft.trees.sizes[2])
    assert all(chance >= price for chance, price in zip(sorted(chances, reverse=True), prices, strict=False))
    for row, model in enumerate(models):
        tree = draft.trees.row(row)
        end = prefixes(tree)[chain_length(tree)]
        if len(end) < 5:
            reach = prod(float(model.probs(end[:place])[token]) for place, token in enumerate(end))
            assert reach * float(model.probs(end).max()) < prices[len(chances)], "the next of a chain is not worth it"
    assert draft.grown_indices is not None
    for row, indices in enumerate(draft.grown_indices):
        length = chain_length(draft.trees.row(row))
        assert [index for index in indices if index >= 0] == list(range(sum(index >= 0 for index in indices)))
        assert all(index < 0 for index in indices[length:]), "leaves are not asked about"
