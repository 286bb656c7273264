"""The suffix automaton beside brute force, and what prompt lookup makes of it."""

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec
from specdec import UnsupportedOptionError
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.drafters import Outcome, PromptLookup, Run
from specdec.drafters.lookup.prompt_lookup import ChainSession, LookupSession
from specdec.drafters.lookup.suffix_automaton import NOWHERE, Match, SuffixAutomaton
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.goodness import assert_drawn_from
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import NUM_SAMPLES, VOCAB_SIZE, continuations, exact_distribution
from tests.support.sampled_rows import tiny as tiny_of_six
from trees import Chain, DySpec, DySpecThreshold, Fixed, GrowthPolicy, Sequoia, TokenTree

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
        earliest = automaton.first_position_after(automaton.known_suffix().state)
        assert not wanted.length or earliest == first_end_of(text[:end], found.length)


def first_end_of(text: list[int], length: int) -> int:
    """Where the text's last `length` tokens end for the first time."""
    return next(end for end in range(length, len(text) + 1) if text[end - length : end] == text[-length:])


@given(texts, texts)
@settings(deadline=None)
def test_automaton_matches_another_text(text: list[int], other: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    found = NOWHERE
    for end, token in enumerate(other, start=1):
        found = automaton.step(found, token)
        wanted = longest_suffix_within(text, other[:end])
        assert found.length == wanted.length
        assert not found.length or automaton.position_after(found.state) == wanted.next


def occurrences(text: list[int], part: list[int]) -> int:
    return sum(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


@given(texts)
@settings(deadline=None)
def test_automaton_counts_every_substring(text: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    for start in range(len(text)):
        context = NOWHERE
        for end in range(start + 1, len(text) + 1):
            context = automaton.step(context, text[end - 1])
            assert context.length == end - start
            assert automaton.count(context.state) == occurrences(text, text[start:end])


def test_match_stays_longest_in_a_text_of_one_token() -> None:
    automaton = SuffixAutomaton([7] * 300)
    assert automaton.longest_match().length == 299


def test_automaton_is_linear_in_size() -> None:
    text = torch.randint(3, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    automaton = SuffixAutomaton(text)
    assert len(automaton._links) <= 2 * len(text)
    assert sum(map(len, automaton._transitions)) <= 3 * len(text)


def drafts(
    drafter: PromptLookup, prompts: list[list[int]], *, max_depths: list[int], tree: GrowthPolicy | None = None
) -> list[TokenTree]:
    """What is drafted after some prompts of one length."""
    draft = session_of(drafter, prompts, tree).propose(max_depths)
    assert draft.q_BTV is None
    return [draft.trees.row(row) for row in range(len(prompts))]


def session_of(drafter: PromptLookup, prompts: list[list[int]], tree: GrowthPolicy | None = None) -> LookupSession:
    input_ids = torch.tensor(prompts)
    run = Run(
        target=tiny_model("llama"),
        vocab_size=100,
        sequences=Sequences(input_ids, None, capacity=input_ids.shape[1]),
        sampler=Sampler([], do_sample=False),
        tree=tree,
        input_ids=input_ids,
        attention_mask=None,
    )
    return drafter.start(run)


def proposal(
    drafter: PromptLookup, text: list[int], *, max_depth: int = 99, tree: GrowthPolicy | None = None
) -> list[int]:
    """The tokens that are drafted after one prompt."""
    return list(drafts(drafter, [text], max_depths=[max_depth], tree=tree)[0].tokens)


def test_draft_continues_the_longest_repeat() -> None:
    text = [1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 8, 1, 2, 3]
    assert proposal(PromptLookup(num_tokens=3), text) == [4, 5, 9]


def test_latest_repeat_wins_a_tie() -> None:
    text = [1, 2, 30, 1, 2, 40, 5, 1, 2]
    assert proposal(PromptLookup(num_tokens=1), text) == [40]


def test_position_that_predicted_more_is_copied_from() -> None:
    text = [1, 2, 30, 31, 1, 2, 40, 41, 1, 2]
    session = session_of(PromptLookup(num_tokens=2), [text])
    assert session.trees([9])[0].tokens == [40, 41], "the latest place"
    session.observe(Outcome(paths=[[]], tokens=[[30, 99, 1, 2]]))
    assert session.trees([9])[0].tokens == [30, 31], "the earliest one, which had predicted the 30"
    session.observe(Outcome(paths=[[]], tokens=[[50, 98, 1, 2]]))
    assert session.trees([9])[0].tokens == [30, 31]
    session.observe(Outcome(paths=[[]], tokens=[[50, 97, 1, 2]]))
    assert session.trees([9])[0].tokens == [50, 97], "the latest one, which had predicted the 50"


LONG = 32_000


def long_text(num_tokens: int) -> list[int]:
    """As unequal as words are, with passages that come again: names, quotations, boilerplate."""
    random = Random(num_tokens)
    text: list[int] = []
    while len(text) < num_tokens:
        if len(text) > 200 and random.random() < 0.3:
            start = random.randrange(len(text) - 100)
            text += text[start : start + random.randrange(5, 100)]
        else:
            text += [int(random.paretovariate(0.7)) % 20_000 for _ in range(50)]
    return text[:num_tokens]


class Counting(list[Any]):
    """Counts how often it is looked at or written to."""

    num_steps = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_steps += 1
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.num_steps += 1
        super().__setitem__(index, value)

    def append(self, value: Any) -> None:
        self.num_steps += 1 + (len(value) if isinstance(value, dict) else 0)  # a state that is split off is copied
        super().append(value)


def counted(text: SuffixAutomaton) -> list[Counting]:
    """From here on, what the automaton consists of counts."""
    lists = {name: Counting(value) for name, value in vars(text).items() if isinstance(value, list)}
    vars(text).update(lists)
    return list(lists.values())


def num_steps(parts: list[Counting]) -> int:
    return sum(part.num_steps for part in parts)


def test_a_long_text_costs_no_more_a_token_than_a_short_one() -> None:
    def steps_per_token(length: int) -> float:
        text = SuffixAutomaton()
        parts = counted(text)
        for token in long_text(length):
            text.append(token)
        return num_steps(parts) / length

    short, long = steps_per_token(LONG // 16), steps_per_token(LONG)
    assert long < 1.5 * short
    assert long < 100


def test_asking_a_long_text_takes_as_few_steps_as_a_short_one() -> None:
    def most_steps(length: int) -> int:
        document = long_text(length)
        session = session_of(PromptLookup(), [document])
        parts = counted(session._rows[0].own)
        asked, num_right = [], 0
        for start in range(length // 3, length // 3 + 400):
            assert isinstance(session, ChainSession)
            session._catch_up(session._rows[0])  # reading has a test of its own
            before = num_steps(parts)
            (proposal,) = session.proposals([20])
            asked.append(num_steps(parts) - before)
            num_right += proposal.tokens[:1] == [document[start]]
            session.observe(Outcome(paths=[[]], tokens=[document[start : start + 1]]))
        assert num_right > 300, "the document is copied"
        assert min(asked) >= 1, "it was asked"
        return max(asked)

    assert most_steps(LONG) <= most_steps(LONG // 16) <= 40


def test_in_a_long_document_the_place_that_has_predicted_is_copied_from() -> None:
    """A phrase of one length stands at both; which of them was right before decides, not which was seen last."""
    names = list(range(80, 88))
    first, last = [50, 51, 52, 53], [60, 61, 62, 63]
    filler = [token % 40 for token in long_text(LONG)]
    document = [*filler[:9000], 90, *names, *first, *filler[9000:30_000], 91, *names, *last, *filler[30_000:], 92]
    session = session_of(PromptLookup(num_tokens=4), [[*document, *names[:4]]])
    session.observe(Outcome(paths=[[]], tokens=[names[4:]]))
    assert session.trees([9])[0].tokens == last, "nothing has been predicted yet"
    session.observe(Outcome(paths=[[]], tokens=[[*first, 70, *names]]))
    assert session.trees([9])[0].tokens == first


def test_draft_past_the_end_goes_on_with_the_period() -> None:
    assert proposal(PromptLookup(num_tokens=7), [9, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1]


def test_short_match_drafts_nothing() -> None:
    assert proposal(PromptLookup(min_match=2), [1, 2, 3, 1]) == []
    assert proposal(PromptLookup(num_tokens=10, tokens_per_match=None), [1, 2, 3, 1]) == [2, 3, 1] * 3 + [2]


def test_short_match_is_followed_by_a_short_chain() -> None:
    assert proposal(PromptLookup(), [1, 2, 3, 1]) == [2, 3, 1, 2, 3]
    assert proposal(PromptLookup(tokens_per_match=2), [1, 2, 3, 1, 2]) == [3, 1, 2, 3]
    assert len(proposal(PromptLookup(), [1, 2, 3] * 5)) == 20


def test_draft_is_no_longer_than_what_can_be_committed() -> None:
    assert proposal(PromptLookup(), [1, 2, 3, 1, 2, 3], max_depth=2) == [1, 2]
    assert proposal(PromptLookup(), [1, 2, 3, 1, 2, 3], max_depth=0) == []


def test_tree_sets_the_length() -> None:
    assert proposal(PromptLookup(num_tokens=2), [1, 2, 3, 1, 2, 3], tree=Chain(4)) == [1, 2, 3, 1]


@pytest.mark.parametrize("policy", [Fixed((2, 1)), Sequoia(4, (0.5,)), DySpecThreshold()], ids=repr)
def test_other_tree_is_refused(policy: GrowthPolicy) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"trees\.DySpec"):
        proposal(PromptLookup(), [1, 2], tree=policy)


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[step] for step in tree.path(node)) for node in range(len(tree))}


FORKED = [1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3, 5, 7, 1, 2, 3]
"""After 1 2 3 came 4 once and 5 twice, after that 8 and, more recently, 7."""


def test_tree_holds_the_continuations_that_were_most_frequent() -> None:
    (tree,) = drafts(PromptLookup(), [FORKED], max_depths=[2], tree=DySpec(4))
    assert paths(tree) == {(5,), (4,), (5, 7), (5, 8)}
    assert tree.tokens[0] == 5
    assert list(tree.tokens).index(7) < list(tree.tokens).index(8), "the more recent one first"
    assert paths(drafts(PromptLookup(), [FORKED], max_depths=[2], tree=DySpec(1))[0]) == {(5,)}


def test_tree_turns_to_shorter_suffixes_for_more() -> None:
    text = [2, 3, 30, 1, 2, 3, 40, 1, 2, 3]
    (tree,) = drafts(PromptLookup(min_match=2), [text], max_depths=[1], tree=DySpec(8))
    assert list(tree.tokens) == [40, 30]
    assert list(drafts(PromptLookup(min_match=3), [text], max_depths=[1], tree=DySpec(8))[0].tokens) == [40]


def test_tree_past_the_end_goes_on_with_the_period() -> None:
    assert proposal(PromptLookup(), [9, 1, 2, 3, 1, 2, 3], tree=DySpec(7)) == [1, 2, 3, 1, 2, 3, 1]


def test_tree_is_no_deeper_than_asked() -> None:
    text = [1, 2, 3, 1, 2, 3]
    assert proposal(PromptLookup(), text, max_depth=2, tree=DySpec(8)) == [1, 2]
    assert proposal(PromptLookup(), text, max_depth=0, tree=DySpec(8)) == []
    assert proposal(PromptLookup(), text, tree=DySpec(8, max_depth=3)) == [1, 2, 3]


def test_rows_share_a_budget() -> None:
    unknown = list(range(20, 20 + len(FORKED)))
    own = drafts(PromptLookup(), [FORKED, unknown], max_depths=[9, 9], tree=DySpec(3))
    assert [len(tree) for tree in own] == [3, 0]
    shared = drafts(PromptLookup(), [FORKED, unknown, unknown], max_depths=[9, 9, 0], tree=DySpec(3, shared=True))
    assert [len(tree) for tree in shared] == [6, 0, 0], "a row that can take nothing brings no budget"


def test_tree_from_a_corpus() -> None:
    drafter = PromptLookup(corpus=[[1, 2, 3], [1, 2, 4], [1, 2, 4], [1, 2], [1, 2, 100, 5]])
    (tree,) = drafts(drafter, [[7, 1, 2]], max_depths=[9], tree=DySpec(9))
    assert list(tree.tokens) == [4, 3], "neither past the end of a text nor outside the vocabulary"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral", "qwen3"])
def test_greedy_output_with_trees_is_that_of_plain_decoding(family: str) -> None:
    model, prompts, num_new = tiny_model(family), random_prompts([5, 12, 30, 18]), 24
    reference = plain_alone(model, prompts, num_new)
    for corpus, shared in ((None, False), (reference.tolist(), True)):
        drafter = PromptLookup(min_match=1, corpus=corpus)
        out = speculate(model, prompts, drafter, tree=DySpec(12, shared=shared), max_new_tokens=num_new)
        assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
        assert out.stats.num_drafted <= 12 * out.stats.num_rounds
        if corpus is None:
            assert out.stats.num_levels < out.stats.num_drafted, "there are branches"
        else:
            assert out.stats.acceptance_rate > 0.9, "all is known"


@pytest.mark.parametrize("warper", [{"temperature": 0.6}, {"repetition_penalty": 1.6}], ids=str)
def test_samples_with_trees_follow_the_target(warper: dict[str, Any]) -> None:
    """Four new tokens, so that the first tree has two levels."""
    model, options = tiny_of_six(seed=1), {"top_k": 0, **warper}
    prompt = torch.randint(VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    out = specdec.generate(
        model,
        prompt,
        do_sample=True,
        max_new_tokens=4,
        num_return_sequences=NUM_SAMPLES,
        drafter=PromptLookup(min_match=1),
        tree=DySpec(5),
        return_dict_in_generate=True,
        **options,
    )
    assert out.stats.mean_size > 2 * out.stats.mean_depth > 2
    expected = exact_distribution(model, prompt, num_new=4, **options)
    assert_drawn_from(continuations(out.sequences, prompt.shape[1]), expected)


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
