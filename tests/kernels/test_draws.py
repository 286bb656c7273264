"""The native draws and verifications against their torch twins, on every instruction set there is."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch

from specdec import acceptance
from specdec.kernels import native
from specdec.kernels.trees import verification
from specdec.kernels.trees.token_source import NativeTokenSource, open_token_source
from tests.support.acceptance_oracles import (
    outcomes_of,
    sequences_without_replacement,
    topdown_oracle,
    traversal_oracle,
)
from tests.support.enumeration import MAX_DEPTH, RandomScores, ToyModel, drive, every_draft, prefixes, q_of
from tests.support.goodness import assert_drawn_from
from trees import (
    Calibration,
    Draft,
    DySpec,
    DySpecThreshold,
    Fixed,
    Round,
    Sequoia,
    TokenTree,
    TreeBatch,
)
from trees.token_source import TorchSource

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())

SIZES = [1, 7, 256, 300, 1000, 5000]
CALIBRATION = Calibration(before=(0.6, 0.3), after=((0.3, 0.4, 0.5, 0.6, 0.8, 1.0), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
POLICIES = {
    "fixed": Fixed((3, 2, 1)),
    "sequoia": Sequoia(9, (0.6, 0.3, 0.1)),
    "dyspec": DySpec(9),
    "calibrated": DySpec(9, calibration=CALIBRATION),
    "threshold": DySpecThreshold(0.05, max_nodes=9),
}


@pytest.fixture(params=native.INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest):
    best = native.library().instruction_set
    try:
        native.library().select(request.param)
    except OSError as error:
        pytest.skip(str(error))
    yield
    native.library().select(best)


def scores_of(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    scores = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    scores[1:, ::3] = -torch.inf if vocab_size > 1 else 0.0
    return scores


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_likeliest_tokens_come_first(vocab_size: int):
    scores = scores_of(4, vocab_size)
    ours = NativeTokenSource(scores, sample=False, generator=None)
    count = min(5, -(-vocab_size // 3))
    best = scores.topk(min(2 * count, vocab_size))
    for batch in range(2):
        tokens, probs = ours.take([3, 0], count)
        for row, row_tokens, row_probs in zip([3, 0], tokens, probs, strict=True):
            mine = slice(batch * count, (batch + 1) * count)
            expected = scores[row].softmax(-1)[best.indices[row, mine]].tolist()
            assert row_probs[: len(expected)] == pytest.approx(expected, rel=1e-5)
            known = sum(prob > 0 for prob in expected)
            assert row_tokens[:known] == best.indices[row, mine][:known].tolist()
            assert not any(row_probs[known:])


def test_draws_are_without_replacement():
    """20 000 rows, chi-square with a false-alarm probability of 1e-6."""
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).repeat(20_000, 1)
    source = NativeTokenSource(scores, sample=True, generator=torch.Generator().manual_seed(2))
    rows = range(len(scores))
    (first, probs), (then, _) = source.take(rows, 2), source.take(rows, 1)
    drawn = [(*a, *b) for a, b in zip(first, then, strict=True)]
    q = scores[0].double().softmax(-1).tolist()
    assert probs[0] == pytest.approx([q[token] for token in first[0]], rel=1e-5)
    assert_drawn_from(drawn, dict(sequences_without_replacement(q, 3)))
    exhausted = source.take(rows, 4)[1]
    assert all(row[3] == 0 < row[2] for row in exhausted)


def test_draws_find_every_block():
    """Blocks of 256 tokens and a last one of 88; 50 000 draws, false alarm 1e-6."""
    scores = (1.5 * torch.randn(1, 600, generator=torch.Generator().manual_seed(3))).repeat(50_000, 1)
    source = NativeTokenSource(scores, sample=True, generator=torch.Generator().manual_seed(4))
    tokens, _ = source.take(range(len(scores)), 1)
    q = scores[0].double().softmax(-1).tolist()
    assert_drawn_from([token for (token,) in tokens], dict(enumerate(q)))


def grown(name: str, models: list[RandomScores], sample: bool, is_native: bool, max_depth: int = 6) -> Draft:
    generator = torch.Generator().manual_seed(5)
    hooks = {"token_source": open_token_source} if is_native else {}
    round_ = Round(max_depths=[max_depth] * len(models), sample=sample, generator=generator, **hooks)
    return drive(POLICIES[name].start(round_), models)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_trees_are_those_of_torch(name: str):
    models = [RandomScores(seed, vocab_size=300) for seed in (6, 7)]
    ours, theirs = (grown(name, models, False, is_native) for is_native in (True, False))
    assert torch.equal(ours.trees.tokens_BN, theirs.trees.tokens_BN)
    assert torch.equal(ours.trees.parents_BN, theirs.trees.parents_BN)


def shape_of(tree: TokenTree) -> tuple[tuple[int, int], ...]:
    return tuple(zip(tree.tokens, tree.parents, strict=True))


@pytest.mark.parametrize("name", ["dyspec", "threshold", "fixed"])
def test_trees_of_native_draws_have_the_chances_of_torch(name: str, monkeypatch: pytest.MonkeyPatch):
    """6 000 trees against the enumeration of all that can be drawn; false alarm 1e-6."""
    model = ToyModel(seed=31)
    policy = {"dyspec": DySpec(3), "threshold": DySpecThreshold(0.3, max_nodes=3), "fixed": Fixed((2, 1))}[name]
    expected: Counter[tuple] = Counter()
    for chance, draft in every_draft(policy, [model], monkeypatch):
        expected[shape_of(draft.trees.row(0))] += chance
    monkeypatch.undo()
    monkeypatch.setattr(model, "_scores", {prefix: scores.float() for prefix, scores in model._scores.items()})
    generator, found = torch.Generator().manual_seed(32), []
    for _ in range(6):
        round_ = Round(max_depths=[MAX_DEPTH] * 1000, sample=True, generator=generator, token_source=open_token_source)
        trees = drive(policy.start(round_), [model] * 1000).trees
        found += [shape_of(trees.row(row)) for row in range(1000)]
    assert_drawn_from(found, expected)


def test_other_scores_are_left_to_torch():
    assert isinstance(open_token_source(scores_of(2, 9).double(), sample=True, generator=None), TorchSource)
    assert isinstance(open_token_source(scores_of(9, 2).T, sample=True, generator=None), TorchSource)
    assert isinstance(open_token_source(scores_of(2, 9), sample=True, generator=None), NativeTokenSource)


def fractions_of(weights: torch.Tensor) -> list[list[Fraction]]:
    rows = [[Fraction(x) for x in row] for row in weights.tolist()]
    return [[x / sum(row) for x in row] for row in rows]


def repeated(draft: Draft, times: int) -> Draft:
    """A drawn draft of one row in many rows."""
    layers = draft.q_layers
    return Draft(
        trees=TreeBatch.stack([draft.trees.row(0)] * times),
        q_layers=type(layers)(
            layers_BMV=[layer.repeat(times, 1, 1) for layer in layers.layers_BMV],
            layer_BT=layers.layer_BT.repeat(times, 0),
            column_BT=layers.column_BT.repeat(times, 0),
        ),
    )


@pytest.mark.parametrize("holes", [False, True], ids=["full support", "holes in the target"])
@pytest.mark.parametrize("rule", ["topdown", "traversal"])
@pytest.mark.parametrize("name", ["fixed", "dyspec"])
def test_verification_follows_the_oracles(name: str, rule: str, holes: bool):
    """Real coins: 20 000 rows, chi-square with a false-alarm probability of 1e-6."""
    draft = grown(name, [RandomScores(8, vocab_size=6, spread=1.0)], True, True, max_depth=3)
    tree, times = draft.trees.row(0), 20_000
    target = torch.randn(len(tree) + 1, 6, generator=torch.Generator().manual_seed(9))
    if holes:
        target[:, tree.tokens[0]] = -torch.inf
    scores = target.repeat(times, 1, 1)
    many = repeated(draft, times)
    assert verification.can_verify(many, scores)
    verify = {"topdown": acceptance.topdown, "traversal": acceptance.traversal}[rule]
    accepted = verify(many, scores, torch.Generator().manual_seed(10))
    q = [q_of(draft, 0, slot) if family else torch.ones(6) for slot, family in enumerate(tree.children)]
    oracle = {"topdown": topdown_oracle, "traversal": traversal_oracle}[rule]
    expected = oracle(tree, fractions_of(target.softmax(-1)), fractions_of(torch.stack(q)))
    assert_drawn_from(outcomes_of(accepted), expected)


@pytest.mark.parametrize("rule", ["topdown", "traversal"])
def test_a_draft_that_is_the_target_is_accepted_to_the_end(rule: str):
    models = [RandomScores(seed, vocab_size=500) for seed in (11, 12, 13)]
    draft = grown("dyspec", models, True, True)
    texts = [prefixes(draft.trees.row(row)) for row in range(3)]
    scores = torch.stack([torch.stack([*map(model.scores, row)]) for model, row in zip(models, texts, strict=True)])
    accepted = {"topdown": acceptance.topdown, "traversal": acceptance.traversal}[rule](draft, scores)
    for row, last in enumerate(accepted.last_B.tolist()):
        assert not draft.trees.row(row).children[last], "a first child is refused only where p < q"


def test_greedy_walks_are_those_of_torch():
    ended: Counter[int] = Counter()
    for seed in range(20):
        draft = grown("fixed", [RandomScores(seed, vocab_size=9), RandomScores(-seed, vocab_size=9)], False, True)
        scores = torch.randint(5, (2, draft.trees.num_slots, 9), generator=torch.Generator().manual_seed(seed)).float()
        ours = acceptance.follow(draft.trees, scores)
        theirs = acceptance.walk(draft.trees, scores.argmax(-1))
        assert outcomes_of(ours) == outcomes_of(theirs)
        ended.update(ours.counts_B.tolist())
    assert len(ended) > 2


def test_what_is_no_number_is_told():
    trees = TreeBatch.chains(torch.tensor([[1]]))
    scores = torch.zeros(1, 2, 9)
    scores[0, 0, 1] = 1.0
    scores[0, 1, 8] = torch.nan
    assert acceptance.follow(trees, scores).next_B.tolist() == [-1]
