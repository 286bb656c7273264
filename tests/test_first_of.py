"""Drafters that take turns: each round is one drafter's, and the others keep up."""

from __future__ import annotations

import pytest

from specdec.drafters import Drafter, EarlyExit, FirstOf, PromptLookup, SmallModel
from specdec.testing import ScriptedDrafter, assert_same_tokens, random_prompts
from tests.references import TruthAmongLies, plain_alone, speculate, with_noise
from tests.test_early_exit import NUM_NEW, WithModules, early_model, random_exit, reference
from tests.test_early_exit import PROMPTS as RAGGED
from tests.test_sampling import assert_ragged_rows_are_exact, tiny
from trees import TokenTree

SECOND = {
    "small model": lambda model: SmallModel(with_noise(model), num_tokens=3),
    "fixed exit": lambda model: EarlyExit(2, num_tokens=3),
    "adaptive exit": lambda model: EarlyExit(objective="tokens-per-layer"),
    "trained exits": lambda model: WithModules([random_exit(model, layer) for layer in (0, 2)], 2),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_equals_plain_decoding(family: str, second: str) -> None:
    model, expected = early_model(family), reference(family)
    drafter = FirstOf(PromptLookup(num_tokens=4, min_match=1), SECOND[second](model))
    out = speculate(model, RAGGED, drafter, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, RAGGED["attention_mask"])
    assert {0, 1} <= {choice["drafter"] for choice in out.stats.trace}, "both must have had their turn"


def test_the_second_keeps_up_while_the_first_one_drafts() -> None:
    """A draft that is the target itself is right in every one of its rounds, whatever happened in those between."""
    model = early_model("llama")
    prompt = random_prompts([9])
    expected = plain_alone(model, prompt, 40)
    truth, turns = TruthAmongLies(expected), iter(range(1000))

    def every_other(sequences: object) -> list[TokenTree]:
        nothing = TokenTree(tokens=[], parents=[])
        return truth(sequences) if next(turns) % 2 else [nothing]

    drafter = FirstOf(ScriptedDrafter(every_other), SmallModel(model, num_tokens=2))
    out = speculate(model, prompt, drafter, max_new_tokens=40)
    assert_same_tokens(model, expected, out.sequences, prompt["attention_mask"])
    own = [choice for choice in out.stats.trace[:-1] if choice["drafter"] == 1]
    assert own
    assert all(choice["committed"] == [3] for choice in own)


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
def test_samples_follow_the_processed_distribution(verify: str) -> None:
    drafter: Drafter = FirstOf(PromptLookup(num_tokens=1, min_match=3), SmallModel(tiny(seed=2), num_tokens=2))
    assert_ragged_rows_are_exact(tiny(seed=1), drafter, verify=verify)


def test_no_drafter_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FirstOf()
