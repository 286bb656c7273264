"""Levels hold every node once, after its parent, and what is taken apart by them is put together again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.tree_model.levels import COMMITTED, Place, gather, schedule
from tests.support.strategies import token_trees
from trees import ROOT, TokenTree, TreeBatch


@given(st.lists(token_trees(), min_size=1, max_size=3))
def test_nodes_go_on_from_their_parents(trees: list[TokenTree]) -> None:
    batch = TreeBatch.stack(trees)
    places: list[list[Place]] = [[] for _ in trees]
    plan = schedule(batch.ancestors_BTT, places, batch.num_slots, 0)
    nodes = [(row, slot) for level in plan.levels for row, slot in zip(level.rows, level.slots, strict=True)]
    assert sorted(nodes) == [(row, slot) for row in range(len(trees)) for slot in range(batch.num_slots)]
    for level in plan.levels:
        for index, (row, slot, source) in enumerate(zip(level.rows, level.slots, level.sources, strict=True)):
            assert places[row][slot] == (level.number, index)
            if slot == 0:
                assert source == (COMMITTED, row)
            elif slot <= len(trees[row]):
                parent = trees[row].parents[slot - 1]
                assert source == places[row][0 if parent == ROOT else parent + 1]


@given(st.lists(token_trees(), min_size=1, max_size=3))
def test_what_levels_take_is_merged_again(trees: list[TokenTree]) -> None:
    batch = TreeBatch.stack(trees)
    plan = schedule(batch.ancestors_BTT, [[] for _ in trees], batch.num_slots, 0)
    whole_BTC = torch.arange(len(trees) * batch.num_slots * 2).view(len(trees), batch.num_slots, 2)
    other = torch.zeros(7)
    parts = [level.take((whole_BTC, {"also": whole_BTC}, other)) for level in plan.levels]
    assert all(part[2] is other for part in parts)
    assert all(torch.equal(part[0], part[1]["also"]) for part in parts)
    assert torch.equal(plan.merge([part[0] for part in parts]), whole_BTC)
    together = plan.together.take(whole_BTC).split([len(level.rows) for level in plan.levels])
    assert torch.equal(plan.merge(together), whole_BTC)


def test_a_token_that_sees_all_hangs_on_the_last() -> None:
    places: list[list[Place]] = [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]
    plan = schedule(None, places, 1, 2)
    assert [level.sources for level in plan.levels] == [((1, 0), (1, 1))]
    assert places == [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1), (2, 1)]]


def test_states_are_gathered_from_several_levels() -> None:
    states = {COMMITTED: torch.tensor([10, 11]), 0: torch.tensor([20, 21, 22])}
    assert gather(states, [(0, 0), (0, 1), (0, 2)]) is states[0]
    assert gather(states, [(0, 2), (0, 0)]).tolist() == [22, 20]
    assert gather(states, [(0, 1), (COMMITTED, 1)]).tolist() == [21, 11]
