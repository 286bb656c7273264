"""Estimated continuations beside a brute-force count of all contexts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.lookup.continuations import Source, likeliest_paths, predict
from specdec.drafters.lookup.suffix_automaton import SuffixAutomaton
from trees import TokenTree

VOCAB_SIZE = 3
EXACT_UP_TO = 1 / 128
"""What is left to shorter contexts when the estimate stops asking them."""

texts = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=48)
shortest = st.integers(1, 3)


def followers(text: list[int], context: list[int]) -> list[int]:
    size = len(context)
    return [text[end] for end in range(size, len(text)) if text[end - size : end] == context]


def counted(text: list[int], path: list[int], shortest: int) -> dict[int, float]:
    """The chance of each token after the text and a path that goes on from it: all contexts, one length at a time."""
    whole, left = text + path, 1.0
    chances: dict[int, float] = {}
    for length in range(len(whole), shortest - 1, -1):
        seen = followers(text, whole[len(whole) - length :])
        if seen:
            kinds = set(seen)
            for token in kinds:
                chances[token] = chances.get(token, 0) + left * seen.count(token) / (len(seen) + len(kinds))
            left *= len(kinds) / (len(seen) + len(kinds))
    return chances


@given(texts, shortest)
@settings(deadline=None)
def test_estimates_are_counts_of_all_contexts(text: list[int], shortest: int) -> None:
    automaton = SuffixAutomaton(text)
    found = predict(automaton, automaton.known_suffix(), shortest)
    wanted = counted(text, [], shortest)
    assert sum(continuation.prob for continuation in found.values()) <= 1
    for token in range(VOCAB_SIZE):
        prob = found[token].prob if token in found else 0
        assert prob == pytest.approx(wanted.get(token, 0), abs=EXACT_UP_TO)


def grown(text: list[int], *, budget: int, max_depth: int, shortest: int, vocab_size: int = VOCAB_SIZE) -> TokenTree:
    automaton = SuffixAutomaton(text)
    source = Source(automaton, automaton.known_suffix(), max_depth)
    (tree,) = likeliest_paths([source], budget=budget, shortest=shortest, vocab_size=vocab_size)
    return tree


def all_paths(text: list[int], path: list[int], reach: float, max_depth: int, shortest: int) -> list[float]:
    """The chance of every path that is known."""
    if len(path) == max_depth:
        return []
    return [
        chance
        for token, prob in counted(text, path, shortest).items()
        for chance in (reach * prob, *all_paths(text, [*path, token], reach * prob, max_depth, shortest))
    ]


@given(texts, st.integers(1, 12), st.integers(0, 4), shortest)
@settings(deadline=None)
def test_trees_hold_the_likeliest_paths(text: list[int], budget: int, max_depth: int, shortest: int) -> None:
    tree = grown(text, budget=budget, max_depth=max_depth, shortest=shortest)
    wanted = sorted(all_paths(text, [], 1.0, max_depth, shortest), reverse=True)[:budget]
    assert max(tree.depths, default=0) <= max_depth
    assert len({tuple(tree.tokens[step] for step in tree.path(node)) for node in range(len(tree))}) == len(tree)
    assert list(tree.values) == sorted(tree.values, reverse=True)
    assert len(tree) <= len(wanted)
    assert [*tree.values, *[0] * (len(wanted) - len(tree))] == pytest.approx(wanted, abs=(max_depth + 1) * EXACT_UP_TO)


@given(texts, st.integers(0, VOCAB_SIZE))
@settings(deadline=None)
def test_tokens_outside_the_vocabulary_are_left_out(text: list[int], vocab_size: int) -> None:
    tree = grown(text, budget=12, max_depth=4, shortest=1, vocab_size=vocab_size)
    assert all(token < vocab_size for token in tree.tokens)


def test_probabilities_by_hand() -> None:
    """After 1 came 2 twice and 3 once; after 1 2, after 2, after 1 2 7, after 2 7 and after 7 one token twice."""
    tree = grown([1, 2, 7, 1, 2, 7, 1, 3, 8, 1], budget=3, max_depth=3, shortest=1, vocab_size=9)
    assert tree.tokens == [2, 7, 1]
    assert tree.probs == pytest.approx([2 / 5, 2 / 3 + 1 / 3 * 2 / 3, 1 - 1 / 3**3])
    assert tree.values == pytest.approx([2 / 5, 2 / 5 * 8 / 9, 2 / 5 * 8 / 9 * 26 / 27])
