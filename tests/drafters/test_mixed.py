"""Drafters whose drafts are merged: same output, and every cache follows its own part of what was accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec import DraftError
from specdec.drafters import Drafter, EarlyExit, Mixed, PromptLookup, QuantizedSelf, SmallModel
from specdec.testing import ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from tests.support.early_exits import NUM_NEW, WithModules, early_model, random_exit, reference
from tests.support.early_exits import PROMPTS as RAGGED
from tests.support.faults import Bomb, Watched
from tests.support.forward_log import ForwardLog
from tests.support.references import PartlyWrongScript, plain_alone, rows_of, speculate, with_noise
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact, draw_fork, tiny
from trees import DySpec, Fixed, TokenTree


def lookup() -> Drafter:
    return PromptLookup(num_tokens=4, min_match=1)


MIXES: dict[str, Callable[[PreTrainedModel], list[Drafter]]] = {
    "small model": lambda model: [lookup(), SmallModel(with_noise(model), num_tokens=3)],
    "two small models": lambda model: [SmallModel(with_noise(model)), lookup(), SmallModel(tiny_model("gpt2", seed=5))],
    "fixed exit": lambda model: [EarlyExit(2, num_tokens=3), lookup()],
    "exit after lookup": lambda model: [lookup(), EarlyExit(1, num_tokens=3)],
    "exit and small model": lambda model: [SmallModel(with_noise(model), num_tokens=2), EarlyExit(2), lookup()],
    "adaptive exit": lambda model: [lookup(), EarlyExit(objective="tokens-per-layer", shadow_share=1)],
    "trained exits": lambda model: [
        WithModules([random_exit(model, layer) for layer in (0, 2)]),
        SmallModel(with_noise(model), num_tokens=2),
    ],
    "int8 copy": lambda model: [lookup(), QuantizedSelf(num_tokens=3)],
    "exit and int8 copy": lambda model: [EarlyExit(2, num_tokens=2), QuantizedSelf(num_tokens=3)],
    "mixed again": lambda model: [lookup(), Mixed([EarlyExit(2), SmallModel(with_noise(model))])],
}


@pytest.mark.rotated
@pytest.mark.parametrize("budget", [None, 5])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_equals_plain_decoding(family: str, mix: str, budget: int | None) -> None:
    model, expected = early_model(family), reference(family)
    drafter = Mixed(MIXES[mix](model), budget=budget)
    one = rows_of(RAGGED, [1])
    alone = speculate(model, one, drafter, max_new_tokens=NUM_NEW)
    together = speculate(model, RAGGED, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected[1:2, -NUM_NEW - 12 :], alone.sequences, one["attention_mask"])
    assert_same_tokens(model, expected, together.sequences, RAGGED["attention_mask"])
    assert together.stats.num_accepted > 0
    if budget is not None:
        assert max(max(choice["drafted"]) for choice in together.stats.trace) <= budget


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_trees_are_mixed_too(family: str) -> None:
    model, expected = early_model(family), reference(family)
    drafter = Mixed([SmallModel(with_noise(model)), lookup(), EarlyExit(2)])
    out = speculate(model, RAGGED, drafter, tree=DySpec(6, max_depth=3), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, RAGGED["attention_mask"])


def test_rows_that_stop_leave_every_drafter() -> None:
    model, expected = early_model("llama"), reference("llama")
    stops = [int(expected[row, -NUM_NEW + 3 + 5 * row]) for row in range(3)]
    options = {"eos_token_id": stops, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    plain = model.generate(**RAGGED, **options, do_sample=False)
    drafter = Mixed([lookup(), SmallModel(with_noise(model)), EarlyExit(2)])
    out = speculate(model, RAGGED, drafter, **options)
    assert_same_tokens(model, plain, out.sequences, RAGGED["attention_mask"], **options)


def test_a_cache_follows_branches_of_its_own_and_of_others() -> None:
    """A draft that is the target itself is right wherever it drafts, and never reads a token twice in one place."""
    model = early_model("llama")
    prompt = random_prompts([9])
    expected = plain_alone(model, prompt, 40)
    truth = PartlyWrongScript(expected, longest=6)
    draft = with_noise(model, std=0.0)
    with ForwardLog(draft) as log:
        drafter = Mixed([ScriptedDrafter(truth), SmallModel(draft, num_tokens=2)])
        out = speculate(model, prompt, drafter, max_new_tokens=40)
    assert_same_tokens(model, expected, out.sequences, prompt["attention_mask"])
    assert all(choice["committed"][0] >= 3 for choice in out.stats.trace[:-1])
    assert any(choice["committed"][0] > 3 for choice in out.stats.trace[:-1]), "longer branches must have been taken"
    assert len(log.prefixes) == len(set(log.prefixes))


# sampling


Q = torch.tensor([0.3, 0.05, 0.1, 0.2, 0.05, 0.3])
SAMPLED: dict[str, Callable[[], list[Drafter]]] = {
    "lookup and small model": lambda: [PromptLookup(num_tokens=2, min_match=1), SmallModel(tiny(seed=2), num_tokens=2)],
    "two small models": lambda: [SmallModel(tiny(seed=2), num_tokens=2), SmallModel(tiny(seed=3), num_tokens=2)],
    "drawn fork": lambda: [
        ScriptedDrafter(lambda sequences: draw_fork(sequences, Q), q=Q),
        PromptLookup(num_tokens=1, min_match=1),
        SmallModel(tiny(seed=2), num_tokens=1),
    ],
    "exit": lambda: [SmallModel(tiny(seed=2), num_tokens=2), EarlyExit(1, num_tokens=2)],
}


@pytest.mark.rotated
@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("mix", SAMPLED)
def test_samples_follow_the_processed_distribution(mix: str, verify: str) -> None:
    assert_ragged_rows_are_exact(target_of(mix), Mixed(SAMPLED[mix]()), verify=verify)


def test_samples_within_a_budget() -> None:
    drafter = Mixed([SmallModel(tiny(seed=2)), SmallModel(tiny(seed=3))], budget=3)
    assert_ragged_rows_are_exact(tiny(seed=1), drafter, tree=DySpec(2))


def target_of(mix: str) -> PreTrainedModel:
    if mix != "exit":
        return tiny(seed=1)
    return tiny_model(
        "llama", seed=1, vocab_size=VOCAB_SIZE, num_hidden_layers=3, hidden_size=16, initializer_range=0.6
    )


def test_a_generator_reproduces_a_run() -> None:
    target = tiny(seed=1)
    runs = [
        specdec.generate(
            target,
            torch.tensor([[1, 4, 2, 1]]),
            do_sample=True,
            max_new_tokens=40,
            drafter=Mixed(SAMPLED["two small models"]()),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# what is refused, and what is left behind


def test_two_exits_are_refused() -> None:
    model = early_model("llama")
    with pytest.raises(DraftError, match="one exit"):
        speculate(model, rows_of(RAGGED, [1]), Mixed([EarlyExit(1), Mixed([lookup(), EarlyExit(2)])]))


def test_wrong_settings() -> None:
    for wrong, message in (
        (lambda: Mixed([]), "at least one"),
        (lambda: Mixed([lookup()], budget=0), "budget"),
        (lambda: Mixed([lookup(), "small-model"]), "no drafter"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_drawn_tree_that_cannot_be_cut_is_refused() -> None:
    drafter = Mixed([ScriptedDrafter(lambda sequences: draw_fork(sequences, Q), q=Q)], budget=2)
    with pytest.raises(ValueError, match="without bias"):
        specdec.generate(tiny(seed=1), torch.tensor([[1, 4, 2]]), do_sample=True, drafter=drafter, max_new_tokens=8)


@pytest.mark.parametrize("call", ["start", "propose", "observe"])
def test_every_session_is_closed_when_one_breaks(call: str) -> None:
    model = early_model("llama")
    error = RuntimeError("broken")
    first, second = Watched(lookup()), Watched(SmallModel(with_noise(model)), {call: Bomb(error, 1)})
    with pytest.raises(RuntimeError, match="broken"):
        speculate(model, rows_of(RAGGED, [1]), Mixed([first, second]))
    assert first.num_opened == first.num_closed == 1
    assert second.num_opened == second.num_closed == (call != "start")


def test_a_tree_that_a_drafter_does_not_take_is_refused() -> None:
    with pytest.raises(specdec.UnsupportedOptionError, match="PromptLookup"):
        speculate(early_model("llama"), rows_of(RAGGED, [1]), Mixed([lookup()]), tree=Fixed((2,)))


def test_one_drafter_alone_is_itself() -> None:
    model = early_model("llama")
    alone, mixed = (
        speculate(model, RAGGED, drafter, max_new_tokens=NUM_NEW).stats
        for drafter in (SmallModel(with_noise(model)), Mixed([SmallModel(with_noise(model))]))
    )
    assert alone.accepted_histogram == mixed.accepted_histogram
    assert alone.draft_forwards == mixed.draft_forwards


def test_an_empty_script_is_plain_decoding() -> None:
    nothing = ScriptedDrafter(lambda sequences: [TokenTree(tokens=[], parents=[])] * len(sequences))
    model, expected = early_model("llama"), reference("llama")
    out = speculate(model, RAGGED, Mixed([nothing, nothing]), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, RAGGED["attention_mask"])
    assert out.stats.num_drafted == 0
