"""Sampled output has the target's processed distribution, whoever drafts.

On a vocabulary of six tokens the distribution of the first three new ones is enumerated (transformers' own scores
after every prefix) and compared with what thousands of identical rows, decoded in one batch, have drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as lp

import specdec
from specdec.decoding.sampling import Prefixes, Sampler
from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter, EarlyExit, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.testing import ScriptedDrafter, tiny_model
from tests.support.early_exits import WithModules, random_exit
from tests.support.goodness import assert_drawn_from
from tests.support.sampled_rows import (
    NUM_NEW,
    NUM_SAMPLES,
    VOCAB_SIZE,
    assert_ragged_rows_are_exact,
    continuations,
    draw_fork,
    exact_distribution,
    tiny,
)
from trees import ROOT, Chain, DySpec, Fixed, GrowthPolicy, TokenTree, TreeBatch

PROMPT = torch.tensor([[1, 4, 2, 1]])
BRANCHES = TokenTree(tokens=[0, 2, 5, 1, 3, 0], parents=[ROOT, ROOT, ROOT, 0, 0, 1])


class FavourSumOfPrefix(LogitsProcessor):
    """A processor that transformers does not know: prefers a token that depends on every token of the prefix."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        favoured = input_ids.sum(1, keepdim=True) % VOCAB_SIZE
        return scores.scatter_add(1, favoured, torch.ones_like(favoured, dtype=scores.dtype))


SAMPLERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "typical_p": {"typical_p": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "user's own": {"logits_processor": LogitsProcessorList([FavourSumOfPrefix()])},
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny(seed=1)


def drafters() -> dict[str, Drafter]:
    q_V = torch.tensor([0.3, 0.05, 0.1, 0.2, 0.05, 0.3])
    return {
        "Plain": Plain(),
        "PromptLookup": PromptLookup(min_match=1),
        "SmallModel": SmallModel(tiny(seed=2), num_tokens=2),
        "fixed tree": ScriptedDrafter(lambda sequences: [BRANCHES] * len(sequences)),
        "drawn tree": ScriptedDrafter(lambda sequences: draw_fork(sequences, q_V), q=q_V),
    }


DRAFTERS = tuple(drafters())


@pytest.mark.rotated
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_follow_the_processed_distribution(target: PreTrainedModel, sampler: str, drafter: str):
    options = {"top_k": 0, **SAMPLERS[sampler]}
    torch.manual_seed(0)
    out = specdec.generate(
        target,
        PROMPT,
        do_sample=True,
        max_new_tokens=NUM_NEW,
        num_return_sequences=NUM_SAMPLES,
        drafter=drafters()[drafter],
        **options,
    )
    expected = exact_distribution(target, PROMPT, **options)
    assert_drawn_from(continuations(out, PROMPT.shape[1]), expected, f"{sampler}, {drafter}")


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
def test_a_draft_that_turns_into_nan_under_way(target: PreTrainedModel, verify: str):
    """Its second step of every round is NaN: such a token must not count against the one before it."""
    draft, num_forwards = tiny(seed=2), itertools.count()

    def poison(module: Any, args: Any, output: Any) -> Any:
        if next(num_forwards) % 2 == 0:  # the prefill, then after every root the node
            output.logits = torch.full_like(output.logits, torch.nan)
        return output

    drafter = SmallModel(draft, num_tokens=2)
    draft.register_forward_hook(poison)
    torch.manual_seed(0)
    out = specdec.generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        max_new_tokens=NUM_NEW,
        num_return_sequences=NUM_SAMPLES,
        drafter=drafter,
        verify=verify,
    )
    assert_drawn_from(continuations(out, PROMPT.shape[1]), exact_distribution(target, PROMPT, top_k=0), verify)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_ragged_rows_follow_distributions_of_their_own(target: PreTrainedModel, drafter: str):
    assert_ragged_rows_are_exact(target, drafters()[drafter])


@pytest.mark.rotated
@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("tree", [Chain(2), Fixed((2, 1)), DySpec(budget=4)], ids=["chain", "fixed", "dyspec"])
def test_grown_trees_in_ragged_batches(target: PreTrainedModel, tree: GrowthPolicy, verify: str):
    assert_ragged_rows_are_exact(target, SmallModel(tiny(seed=2)), tree=tree, verify=verify)


EARLY_EXITS = {
    "fixed": lambda: EarlyExit(1, num_tokens=2),
    "tokens per layer": lambda: EarlyExit(objective="tokens-per-layer"),
    "tokens per second": lambda: EarlyExit(num_tokens=2),
}


@pytest.mark.rotated
@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize(
    ("drafter", "tree"),
    [*((drafter, None) for drafter in EARLY_EXITS), ("fixed", Fixed((2, 1))), ("fixed", DySpec(budget=4))],
)
def test_early_exits_in_ragged_batches(drafter: str, tree: GrowthPolicy | None, verify: str):
    target = tiny_model(
        "llama", seed=1, vocab_size=VOCAB_SIZE, num_hidden_layers=3, hidden_size=16, initializer_range=0.6
    )
    assert_ragged_rows_are_exact(target, EARLY_EXITS[drafter](), tree=tree, verify=verify)


@pytest.mark.parametrize("layer", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_trained_exits_in_ragged_batches(layer: int):
    target = tiny_model(
        "llama", seed=1, vocab_size=VOCAB_SIZE, num_hidden_layers=3, hidden_size=16, initializer_range=0.6
    )
    assert_ragged_rows_are_exact(target, WithModules([random_exit(target, layer)], layer, num_tokens=2))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_quantised_copy_of_the_target_in_ragged_batches(target: PreTrainedModel, weights: str):
    assert_ragged_rows_are_exact(target, QuantizedSelf(num_tokens=2, weights=weights))


@pytest.mark.rotated
@pytest.mark.parametrize("weights", [None, "int8", "int4"], ids=["float", "int8", "int4"])
@pytest.mark.parametrize("verify", ["topdown", "traversal"])
def test_a_prepared_target_in_ragged_batches(weights: str | None, verify: str):
    """Its own distribution is what counts: that of the packed weights."""
    size = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 32}
    target = tiny_model("llama", seed=1, initializer_range=0.3, **size)
    packed = specdec.prepare(target, weights=weights)
    assert_ragged_rows_are_exact(packed, SmallModel(tiny(seed=2)), tree=DySpec(budget=4), verify=verify)


def test_a_draft_that_is_the_target_is_always_accepted(target: PreTrainedModel):
    out = specdec.generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        max_new_tokens=13,
        num_return_sequences=200,
        drafter=SmallModel(target, num_tokens=3),
        return_dict_in_generate=True,
    )
    assert out.stats.accepted_histogram == {3: 3 * 200}


def test_a_draft_without_the_targets_tokens_is_never_accepted(target: PreTrainedModel):
    """The drafter puts everything on a token that the target may not say."""
    q_V = torch.zeros(VOCAB_SIZE)
    q_V[5] = 1.0
    out = specdec.generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        suppress_tokens=[5],
        max_new_tokens=6,
        num_return_sequences=200,
        drafter=ScriptedDrafter(lambda sequences: [[5, 5]] * len(sequences), q=q_V),
        return_dict_in_generate=True,
    )
    assert set(out.stats.accepted_histogram) == {0}
    assert 5 not in out.sequences[:, PROMPT.shape[1] :]


# reproducibility


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_manual_seed_reproduces(target: PreTrainedModel, drafter: str):
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(specdec.generate(target, PROMPT, do_sample=True, max_new_tokens=40, drafter=drafters()[drafter]))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("drafter", ["Plain", "PromptLookup", "SmallModel", "fixed tree"])
def test_a_generator_reproduces_and_leaves_the_global_one_alone(target: PreTrainedModel, drafter: str):
    state = torch.get_rng_state()
    outs = [
        specdec.generate(
            target,
            PROMPT,
            do_sample=True,
            max_new_tokens=40,
            drafter=drafters()[drafter],
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_plain_with_a_seed_is_transformers_with_the_same_seed(target: PreTrainedModel, num_rows: int):
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 30}
    prompts = PROMPT.repeat(num_rows, 1)
    torch.manual_seed(5)
    expected = target.generate(prompts, **options)
    torch.manual_seed(5)
    assert torch.equal(specdec.generate(target, prompts, drafter=Plain(), **options), expected)


# processors on the prefix of each node


class NoteCalls(LogitsProcessor):
    """Leaves a trace of the whole prefix and of the row's index in the scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1)
        traces = (input_ids * places).sum(1) + 1000 * torch.arange(len(input_ids))
        return scores + traces.unsqueeze(1)


def processed_one_by_one(
    processors: LogitsProcessorList, logits_BTV: Tensor, sequences: Sequences, rows: Sequence[TokenTree]
) -> Tensor:
    """Oracle: one call for each slot, on a batch in which all rows are this slot's."""
    scores_BTV = logits_BTV.clone()
    for row, tree in enumerate(rows):
        for slot in range(len(tree) + 1):
            path = tree.path(slot - 1) if slot else []
            prefix = torch.cat([sequences.prefix(row), torch.tensor([tree.tokens[node] for node in path]).long()])
            input_ids = prefix.repeat(sequences.num_all_rows, 1)
            place = sequences.rows[row]
            scores = logits_BTV[row, slot].repeat(sequences.num_all_rows, 1)
            scores_BTV[row, slot] = processors(input_ids, scores)[place]
    return scores_BTV


@pytest.mark.parametrize(
    "processors",
    [
        [lp.RepetitionPenaltyLogitsProcessor(1.5), lp.NoRepeatNGramLogitsProcessor(2), lp.TopKLogitsWarper(4)],
        [lp.MinLengthLogitsProcessor(7, torch.tensor([2])), lp.SuppressTokensAtBeginLogitsProcessor([1], 6)],
        [lp.TemperatureLogitsWarper(0.7), lp.TopPLogitsWarper(0.9)],
        [lp.TemperatureLogitsWarper(0.7), lp.RepetitionPenaltyLogitsProcessor(1.5)],
        [lp.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=4)],
        [
            lp.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([3, 0, 1, 2])),
            lp.TopKLogitsWarper(4),
        ],
        [lp.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([5, 8, 0, 4]))],
        [lp.RepetitionPenaltyLogitsProcessor(1.5), NoteCalls()],
        [lp.PrefixConstrainedLogitsProcessor(lambda row, ids: [row, int(ids[-1])], num_beams=1)],
        [],
    ],
    ids=lambda processors: "+".join(type(p).__name__.removesuffix("LogitsProcessor") for p in processors) or "none",
)
def test_processors_see_each_nodes_own_prefix(processors: list[LogitsProcessor]):
    generator = torch.Generator().manual_seed(6)
    sequences = Sequences(torch.randint(0, VOCAB_SIZE, (4, 4), generator=generator), None, 10)
    for row, tokens in enumerate([[1], [2, 3, 4], [5, 0], [3]]):
        sequences.put(row, tokens)
        sequences.commit(row, tokens)
    sequences.select_rows([0, 1, 3])
    rows = [BRANCHES, TokenTree.chain([4, 4]), TokenTree(tokens=[1, 1, 2], parents=[ROOT, 0, 0])]
    trees = TreeBatch.stack(rows)
    logits_BTV = torch.randn((len(rows), trees.num_slots, VOCAB_SIZE), generator=generator)
    before = logits_BTV.clone()
    sampler = Sampler(LogitsProcessorList(processors), do_sample=True)
    scores_BTV = sampler.process(logits_BTV, Prefixes(sequences, trees, range(trees.num_slots)))
    expected_BTV = processed_one_by_one(LogitsProcessorList(processors), logits_BTV, sequences, rows)
    for row, tree in enumerate(rows):
        torch.testing.assert_close(scores_BTV[row, : len(tree) + 1], expected_BTV[row, : len(tree) + 1])
    assert torch.equal(logits_BTV, before)


def test_settings_are_shared_by_those_who_do_the_same():
    def settings(*processors: LogitsProcessor):
        return Sampler(LogitsProcessorList(processors), do_sample=False).shared_settings

    banned = lp.NoBadWordsLogitsProcessor([[7], [3, 9]], eos_token_id=torch.tensor([2]))
    same = lp.NoBadWordsLogitsProcessor([[7], [3, 9]], eos_token_id=torch.tensor([2]))
    assert settings(banned) == settings(same) is not None
    assert settings(banned) != settings(lp.NoBadWordsLogitsProcessor([[7]], eos_token_id=torch.tensor([2])))
    assert settings(lp.TopKLogitsWarper(3)) != settings(lp.TopKLogitsWarper(4))
    assert settings(lp.TopKLogitsWarper(3)) != settings(lp.TopKLogitsWarper(3), lp.TopKLogitsWarper(3))
    assert settings(NoteCalls()) is None


GREEDY_OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram": {"no_repeat_ngram_size": 3},
    "bad_words": {"bad_words_ids": [[7], [3, 9]]},
    "sequence_bias": {"sequence_bias": {(4,): 2.0, (5, 6): -3.0}},
    "min_new_tokens": {"min_new_tokens": 12},
    "forced_eos": {"forced_eos_token_id": 2},
    "suppress": {"suppress_tokens": [1, 8], "begin_suppress_tokens": [4]},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.3)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [row, (int(ids[-1]) + 1) % 20, 2, 11]},
    "remove_invalid_values": {"remove_invalid_values": True, "renormalize_logits": True},
}


@pytest.mark.parametrize("option", GREEDY_OPTIONS)
def test_every_processor_gives_plain_greedy_output(option: str):
    """The target drafts for itself, so every processor meets long drafted prefixes that are all accepted."""
    model = tiny_model("llama", seed=3, vocab_size=20)
    prompts = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(7))
    masks = torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [0] + [1] * 5])
    options = {
        "attention_mask": masks,
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **GREEDY_OPTIONS[option],
    }
    expected = model.generate(prompts, **options)
    for drafter in (SmallModel(model, num_tokens=4), PromptLookup(min_match=1)):
        assert torch.equal(specdec.generate(model, prompts, drafter=drafter, **options), expected)


def test_all_continuations_are_enumerated(target: PreTrainedModel):
    """The oracle of this file: its probabilities sum to one over all continuations."""
    exact = exact_distribution(target, PROMPT, top_k=0)
    assert set(exact) == set(itertools.product(range(VOCAB_SIZE), repeat=NUM_NEW))
    assert sum(exact.values()) == pytest.approx(1.0)
