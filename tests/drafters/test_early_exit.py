"""The target's own layers draft: same output, nothing computed twice, and heads that know what they have seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import DraftError, UnsupportedModelError
from specdec.drafters import Auto, Drafter, DraftSession, EarlyExit, Mixed, Plain, Run
from specdec.drafters.early_exit.choice import TokensPerSecond
from specdec.drafters.early_exit.heads import TrainedHead
from specdec.drafters.early_exit.rule import ExitChoice
from specdec.exits.module import Exit
from specdec.testing import FAMILIES, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.compatibility import check_layers
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_views import LayerViews
from specdec.tree_model.model import TreeModel
from tests.support.early_exits import NUM_LAYERS, NUM_NEW, PROMPTS, WithModules, early_model, random_exit, reference
from tests.support.references import rows_of, speculate
from trees import ROOT, DySpec, Fixed, GainLimitedChain, GrowingTrees, GrowthPolicy, Layer, TokenTree, TreeBatch

DRAFTERS: dict[str, Any] = {
    **{f"exit {layer}": lambda model, layer=layer: EarlyExit(layer) for layer in range(1, NUM_LAYERS)},
    "seconds": lambda model: EarlyExit(),
    "layers": lambda model: EarlyExit(objective="tokens-per-layer", shadow_share=1),
    "trained": lambda model: WithModules([random_exit(model, layer) for layer in (0, 2)]),
    "trained, fixed": lambda model: WithModules([random_exit(model, 1)], 1),
}


@pytest.mark.rotated
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3", "qwen3", "olmo2"])
def test_output_equals_plain_decoding(family: str, drafter: str) -> None:
    check_equality(family, DRAFTERS[drafter](early_model(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exits_in_the_middle(family: str) -> None:
    together = check_equality(family, EarlyExit(2))
    assert together.stats.num_accepted > 0, "otherwise nothing of the shared cache was tested"


@pytest.mark.parametrize("tree", [Fixed((3, 2)), DySpec(12, max_depth=4)], ids=["fixed", "dyspec"])
@pytest.mark.parametrize("drafter", ["exit 2", "layers", "trained, fixed"])
def test_trees_from_an_exit(drafter: str, tree: GrowthPolicy) -> None:
    for family in ("llama", "gemma2"):
        check_equality(family, DRAFTERS[drafter](early_model(family)), tree=tree)


@pytest.fixture
def always_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round drafts chains with so many leaves that exits which have learnt nothing are often right by chance."""
    policy = GainLimitedChain(
        prices=[0.0] * 2, chance=float, next_chance=1.0, leaf_prices=[0.0] * 60, leaf_chance=lambda _: 1.0
    )
    choose = TokensPerSecond.choose

    def choose_exit_2(rule: TokensPerSecond, max_depths: Sequence[int]) -> ExitChoice | None:
        choose(rule, max_depths)
        return ExitChoice(2, policy) if max(max_depths) else None

    monkeypatch.setattr(TokensPerSecond, "choose", choose_exit_2)
    monkeypatch.setattr("trees.gain_limited.MAX_LEAVES", 20)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_output_with_leaves_equals_plain_decoding(family: str, always_leaves: None) -> None:
    together = check_equality(family, WithModules([random_exit(early_model(family), 2)]))
    assert together.stats.num_accepted > 0
    assert together.stats.num_levels < together.stats.num_drafted, "there were no leaves"


def test_leaves_know_the_processors(always_leaves: None) -> None:
    model = early_model("llama")
    settings: dict[str, Any] = {"max_new_tokens": NUM_NEW, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    out = speculate(model, PROMPTS, WithModules([random_exit(model, 2)]), **settings)
    expected = model.generate(**PROMPTS, do_sample=False, pad_token_id=0, **settings)
    assert_same_tokens(model, expected, out.sequences, PROMPTS["attention_mask"])


def check_equality(family: str, drafter: Drafter, **options: Any) -> Any:
    model, expected = early_model(family), reference(family)
    one = rows_of(PROMPTS, [1])
    alone = speculate(model, one, drafter, max_new_tokens=NUM_NEW, **options)
    together = speculate(model, PROMPTS, drafter, max_new_tokens=NUM_NEW, **options)
    assert_same_tokens(model, expected[1:2, -NUM_NEW - 12 :], alone.sequences, one["attention_mask"])
    assert_same_tokens(model, expected, together.sequences, PROMPTS["attention_mask"])
    return together


@pytest.mark.parametrize("tree", [None, Fixed((2, 2))], ids=["chain", "fixed"])
@pytest.mark.parametrize("drafter", ["exit 2", "layers"])
def test_no_layer_computes_a_token_twice(drafter: str, tree: GrowthPolicy | None) -> None:
    model = early_model("llama")
    counts: Counter[int] = Counter()

    def count(index: int) -> Any:
        return lambda layer, args, kwargs: counts.update({index: args[0].shape[1]})

    hooks = [
        layer.register_forward_pre_hook(count(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    drafter_ = DRAFTERS[drafter](model)
    check_layers(model)
    counts.clear()
    prompt = rows_of(PROMPTS, [1])
    out = speculate(model, prompt, drafter_, tree=tree, max_new_tokens=NUM_NEW)
    for hook in hooks:
        hook.remove()
    stats = out.stats
    verified = prompt["input_ids"].shape[1] + stats.num_drafted + stats.num_rounds
    assert counts[NUM_LAYERS - 1] == verified
    if tree is None:
        assert set(counts.values()) == {verified}
    else:
        assert max(counts.values()) == verified, "a tree of fixed shape drafts nothing that is not verified"


def test_states_of_a_verification_equal_those_of_a_whole_forward() -> None:
    """A tree of which some nodes have passed the lower layers, in another order, and others have not."""
    model = early_model("gemma2")
    tree = TokenTree(tokens=[5, 6, 7, 8, 9], parents=[ROOT, ROOT, 1, 0, 2])
    trees, roots_B1 = TreeBatch.stack([tree, tree]), torch.tensor([[3], [4]])
    whole, parts = TreeModel(model), EarlyExitModel(model)
    for target in (whole, parts):
        target.keep_states([1, 2, 3, NUM_LAYERS])
        target.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    logits = whole.verify(trees, roots_B1)
    parts.forward_below(2, roots_B1, torch.zeros_like(roots_B1), None)
    grown = GrowingTrees(2)  # node 1, a node that is dropped, and node 0; then node 2
    for tokens, parents in (([6, 250, 5], [ROOT] * 3), ([7], [0])):
        grown.append(Layer(tokens_BM=torch.tensor([tokens] * 2), parents_BM=np.array([parents] * 2)))
        parts.forward_below(2, grown.tokens_BM, grown.depths_BM, grown.seen_BMT)
    in_parts = parts.verify(trees, roots_B1, [[2, 0, 3, -1, -1]] * 2)
    torch.testing.assert_close(in_parts, logits)
    assert parts.states.keys() == whole.states.keys() == {1, 2, 3, NUM_LAYERS}
    for depth, states_BTC in whole.states.items():
        torch.testing.assert_close(parts.states[depth], states_BTC)
    for target in (whole, parts):
        target.commit([[0, 2, 3, 5], [0, 1]])
        target.cache.check_integrity()
    for left, right in zip(parts.cache.layers, whole.cache.layers, strict=True):
        for row, length in enumerate(whole.cache.lengths):
            torch.testing.assert_close(left.keys[row, :, :length], right.keys[row, :, :length])
            torch.testing.assert_close(left.values[row, :, :length], right.values[row, :, :length])


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_trained_exit_sees_what_a_forward_from_scratch_would_show_it(
    family: str, layer: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every round that drafts, also after rounds that did not, the scores after the root are the oracle's."""
    model, scored = early_model(family), []
    module, num_positions = random_exit(model, layer), 8 if mode == "fixed" else 6
    monkeypatch.setattr("specdec.drafters.early_exit.heads.PROMPT_POSITIONS", num_positions)

    class Watched(TrainedHead):
        def score_root(self, hidden_B1C: Tensor) -> Tensor:
            logits_B1S = super().score_root(hidden_B1C)
            scored.append(([list(tokens) for tokens in self._sequences.tokens], logits_B1S))
            return logits_B1S

    drafter = WithModules([module], layer if mode == "fixed" else "adaptive", head=Watched, num_tokens=2)
    speculate(model, PROMPTS, drafter, max_new_tokens=8, tree=Fixed((2, 1)) if mode == "fixed" else None)
    lengths = PROMPTS["attention_mask"].sum(1).tolist()
    scored = [(texts, logits) for texts, logits in scored if len(texts) == len(lengths)]
    assert len(scored) >= 4 if mode == "fixed" else True
    for texts, logits_B1S in scored:
        for text, prompt_length, logits_1S in zip(texts, lengths, logits_B1S, strict=True):
            expected = from_scratch(model, module, text, max(0, prompt_length - num_positions))
            torch.testing.assert_close(logits_1S[0], expected, atol=1e-4, rtol=1e-4)


def from_scratch(model: PreTrainedModel, module: Exit, text: list[int], start: int) -> Tensor:
    """What an exit scores after a text, if it has seen the text from `start` on."""
    views, ids = LayerViews(model), torch.tensor([text])
    whole = views.whole([module.layer, NUM_LAYERS])
    below = views.below(0)
    with torch.no_grad():
        whole.model(input_ids=ids, use_cache=False)
        below.model(input_ids=ids, use_cache=False)
        hidden_1TC = (whole.states | below.states)[module.layer][:, start:]
        last_1TC = whole.states[NUM_LAYERS][:, start:]
        before_1TC = torch.cat([torch.zeros_like(last_1TC[:, :1]), last_1TC[:, :-1]], 1)
        index = torch.arange(hidden_1TC.shape[1])
        distance = index[:, None] - index
        mask = ((distance >= 0) & (distance < module.window))[None, None]
        if model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        block = views.block(module.block)
        block.set_input_states(module.fuse(torch.cat([hidden_1TC, before_1TC], 2)))
        block.model(input_ids=ids[:, start:], attention_mask=mask, position_ids=(start + index)[None], use_cache=False)
        return module.head(module.norm(block.states[0]))[0, -1]


def test_a_perfect_exit_is_used_and_a_useless_one_is_not() -> None:
    perfect = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    with torch.no_grad():
        for layer in perfect.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    prompt = rows_of(PROMPTS, [3])
    layers = speculate(perfect, prompt, EarlyExit(objective="tokens-per-layer"), max_new_tokens=60)
    assert layers.stats.acceptance_rate == 1
    assert all(choice["exit_layer"] == 1 for choice in layers.stats.trace)
    model = early_model("llama")
    seconds = speculate(model, prompt, WithModules([random_exit(model, 2)]), max_new_tokens=60)
    plain_rounds = sum(choice["exit_layer"] is None for choice in seconds.stats.trace)
    assert plain_rounds > len(seconds.stats.trace) / 2


def test_an_exit_is_judged_by_its_drafts_in_bfloat16() -> None:
    """NumPy has no such numbers: rounds that compare no other exits used to fail."""
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=3)
    settings = {"objective": "tokens-per-layer", "shadow_share": 1e-9}
    out = speculate(model, rows_of(PROMPTS, [0]), EarlyExit(**settings), max_new_tokens=NUM_NEW)
    assert out.stats.num_drafted > 0


def test_what_no_exit_can_do_is_refused() -> None:
    model = early_model("llama")
    prompt = rows_of(PROMPTS, [1])
    with pytest.raises(DraftError, match="exits of this target are"):
        specdec.generate(model, **prompt, drafter=EarlyExit(NUM_LAYERS), max_new_tokens=4)
    with pytest.raises(UnsupportedModelError, match="nothing to exit from"):
        specdec.generate(tiny_model("llama", num_hidden_layers=1), **prompt, drafter=EarlyExit(), max_new_tokens=4)
    for wrong in ({"exit_layer": 1.5}, {"num_tokens": 0}, {"objective": "speed"}, {"shadow_share": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EarlyExit(**wrong)


def test_a_model_with_a_layer_that_is_called_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when hooks bind the whole forward to the original modules."""
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS, seed=3)
    bound = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: bound(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="take another drafter"):
        check_layers(model)


def test_costs_are_measured_within_the_positions_of_the_model():
    """OPT looks positions up in a table; the measurement used to run past the end of a small one."""
    model, prompts = tiny_model("opt", max_position_embeddings=24), random_prompts([6])
    options = {"max_new_tokens": 8, "do_sample": False}
    out = specdec.generate(model, **prompts, drafter=EarlyExit(), **options)
    assert torch.equal(out, model.generate(**prompts, **options))


class _Hides(Drafter):
    """A drafter that does not say what it is made of."""

    def start(self, run: Run) -> DraftSession:
        return EarlyExit(1).start(run)


def test_only_drafters_that_need_exits_get_a_target_with_exits() -> None:
    model = early_model("llama")
    for drafter in (EarlyExit(1), Mixed([Plain(), EarlyExit(1)]), Auto(EarlyExit(1))):
        assert type(drafter.make_target(model)) is EarlyExitModel
    assert type(Mixed([Plain()]).make_target(model)) is type(Auto().make_target(model)) is TreeModel
    with pytest.raises(DraftError, match="needs_exits = True"):
        speculate(model, PROMPTS, _Hides(), max_new_tokens=4)
