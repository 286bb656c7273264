"""The suffix automaton beside brute force, and what prompt lookup makes of it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import UnsupportedOptionError
from specdec.drafters import PromptLookup, Run
from specdec.drafters.suffix_automaton import Match, SuffixAutomaton
from specdec.sampling import Sampler
from specdec.sequences import Sequences
from specdec.testing import tiny_model
from trees import Chain, GrowthPolicy

texts = st.lists(st.integers(0, 2), max_size=48)
"""Three letters repeat often; below 64 tokens the automaton always names the latest occurrence."""


def longest_known_suffix(text: list[int]) -> Match:
    """The longest suffix that occurred before, at its latest earlier place."""
    for length in range(len(text) - 1, 0, -1):
        suffix = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == suffix:
                return Match(length, start + length)
    return Match(0, 0)


def longest_suffix_within(text: list[int], other: list[int]) -> Match:
    """The longest suffix of `other` that occurs in `text`, at its latest place there."""
    for length in range(min(len(text), len(other)), 0, -1):
        for start in range(len(text) - length, -1, -1):
            if text[start : start + length] == other[-length:]:
                return Match(length, start + length)
    return Match(0, 0)


@given(texts)
@settings(deadline=None)
def test_automaton_finds_the_longest_and_latest_repeat(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for end, token in enumerate(text, start=1):
        automaton.append(token)
        found, wanted = automaton.longest_match(), longest_known_suffix(text[:end])
        assert found.length == wanted.length
        assert not wanted.length or found.next == wanted.next


@given(texts, texts)
@settings(deadline=None)
def test_automaton_matches_another_text(text: list[int], other: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    state = length = 0
    for end, token in enumerate(other, start=1):
        state, length = automaton.step(state, length, token)
        wanted = longest_suffix_within(text, other[:end])
        assert length == wanted.length
        assert not length or automaton.position_after(state) == wanted.next


def test_match_stays_longest_in_a_text_of_one_token() -> None:
    automaton = SuffixAutomaton([7] * 300)
    assert automaton.longest_match().length == 299


def test_automaton_is_linear_in_size() -> None:
    text = torch.randint(3, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    automaton = SuffixAutomaton(text)
    assert len(automaton._links) <= 2 * len(text)
    assert sum(map(len, automaton._transitions)) <= 3 * len(text)


def proposal(
    drafter: PromptLookup, text: list[int], *, max_depth: int = 99, tree: GrowthPolicy | None = None
) -> list[int]:
    """What is drafted after one prompt."""
    input_ids = torch.tensor([text])
    run = Run(
        target=tiny_model("llama"),
        vocab_size=100,
        sequences=Sequences(input_ids, None, capacity=len(text)),
        sampler=Sampler([], do_sample=False),
        tree=tree,
        input_ids=input_ids,
        attention_mask=None,
    )
    return list(drafter.start(run).propose([max_depth]).trees.row(0).tokens)


def test_draft_continues_the_longest_repeat() -> None:
    text = [1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 8, 1, 2, 3]
    assert proposal(PromptLookup(num_tokens=3), text) == [4, 5, 9]


def test_latest_repeat_wins_a_tie() -> None:
    text = [1, 2, 30, 1, 2, 40, 5, 1, 2]
    assert proposal(PromptLookup(num_tokens=1), text) == [40]


def test_draft_past_the_end_goes_on_with_the_period() -> None:
    assert proposal(PromptLookup(num_tokens=7), [9, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1]


def test_short_match_drafts_nothing() -> None:
    assert proposal(PromptLookup(min_match=2), [1, 2, 3, 1]) == []
    assert proposal(PromptLookup(min_match=1), [1, 2, 3, 1]) == [2, 3, 1] * 3 + [2]


def test_draft_is_no_longer_than_what_can_be_committed() -> None:
    assert proposal(PromptLookup(), [1, 2, 3, 1, 2, 3], max_depth=2) == [1, 2]
    assert proposal(PromptLookup(), [1, 2, 3, 1, 2, 3], max_depth=0) == []


def test_tree_sets_the_length() -> None:
    assert proposal(PromptLookup(num_tokens=2), [1, 2, 3, 1, 2, 3], tree=Chain(4)) == [1, 2, 3, 1]


def test_other_tree_is_refused() -> None:
    class Bush(GrowthPolicy):
        def start(self, **options: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(UnsupportedOptionError, match=r"trees\.Chain"):
        proposal(PromptLookup(), [1, 2], tree=Bush())


def test_corpus_is_copied_from() -> None:
    drafter = PromptLookup(num_tokens=3, corpus=[[10, 11, 12, 13], [20, 21, 22, 23, 24, 25]])
    assert proposal(drafter, [5, 20, 21]) == [22, 23, 24]


def test_own_text_wins_a_tie_with_the_corpus() -> None:
    drafter = PromptLookup(num_tokens=1, corpus=[[1, 2, 50], [1, 2, 3, 60]])
    assert proposal(drafter, [1, 2, 40, 1, 2]) == [40]
    assert proposal(drafter, [1, 2, 3, 40, 2, 3, 41, 9, 1, 2, 3]) == [40]
    assert proposal(drafter, [2, 3, 41, 9, 1, 2, 3]) == [60]


def test_draft_ends_with_its_corpus_text() -> None:
    drafter = PromptLookup(corpus=[[1, 2, 3], [4, 5]])
    assert proposal(drafter, [1, 2]) == [3]
    assert proposal(drafter, [2, 3]) == []


def test_corpus_tokens_outside_the_vocabulary_are_not_drafted() -> None:
    assert proposal(PromptLookup(corpus=[[1, 2, 3, 100, 4]]), [1, 2]) == [3]


def test_one_drafter_serves_many_runs() -> None:
    drafter = PromptLookup(num_tokens=1, corpus=[[1, 2, 50]])
    assert proposal(drafter, [8, 7, 60, 8, 7]) == [60]
    assert proposal(drafter, [1, 2]) == [50]
    assert proposal(drafter, [8, 7]) == []


@pytest.mark.parametrize(
    "wrong",
    [{"num_tokens": 0}, {"num_tokens": 2.0}, {"min_match": 0}, {"corpus": ["a text"]}, {"corpus": [[-1]]}],
    ids=str,
)
def test_wrong_argument_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PromptLookup(**wrong)
