"""Token trees beside brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strategies import token_trees
from trees import ROOT, Chain, DySpec, GrowingTrees, GrowthPolicy, Layer, Round, TokenTree, TreeBatch
from trees.blocks import argmax, read_blocks, reduce_blocks

EXAMPLE = TokenTree(tokens=[5, 6, 7, 8, 9], parents=[ROOT, ROOT, 0, 0, 2], probs=[0.5, 0.25, 1, 0.125, 0.75])
"""
root ┬ 5 ┬ 7 ─ 9
     │   └ 8
     └ 6
"""

batches = st.lists(token_trees(), min_size=1, max_size=4)


def test_tree_draws_itself() -> None:
    assert str(EXAMPLE).splitlines() == [
        "root",
        "├─ 5  q=0.500",
        "│  ├─ 7  q=1.000",
        "│  │  └─ 9  q=0.750",
        "│  └─ 8  q=0.125",
        "└─ 6  q=0.250",
    ]
    valued = TokenTree(tokens=[1], parents=[ROOT], values=[0.5])
    assert valued.render(decode=chr) == "root\n└─ \x01  v=0.500"


def test_example_is_read_as_drawn() -> None:
    assert EXAMPLE.depths == [1, 1, 2, 2, 3]
    assert EXAMPLE.children == [[0, 1], [2, 3], [], [4], [], []]
    assert EXAMPLE.path(4) == [0, 2, 4]
    assert EXAMPLE.dfs_order() == [0, 2, 4, 3, 1]


def test_chain_is_a_tree() -> None:
    chain = TokenTree.chain([4, 5, 6])
    assert list(chain.parents) == [ROOT, 0, 1]
    assert chain.path(2) == [0, 1, 2]
    assert len(TokenTree.chain([])) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parents": [ROOT]}, "2 tokens needs as many parents, got 1"),
        ({"parents": [ROOT, 0], "probs": [1.0]}, "as many probs, got 1"),
        ({"parents": [ROOT, 0], "values": []}, "as many values, got 0"),
        ({"parents": [1, ROOT]}, "node 0 names parent 1"),
        ({"parents": [ROOT, 1]}, "node 1 names parent 1"),
        ({"parents": [ROOT, -2]}, "node 1 names parent -2"),
    ],
)
def test_impossible_tree_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTree(tokens=[1, 2], **fields)


@pytest.mark.parametrize("length", [0, -1, 2.5])
def test_chain_without_length_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        Chain(length)


@given(token_trees(max_nodes=12))
@settings(deadline=None)
def test_depth_first_order_keeps_subtrees_together(tree: TokenTree) -> None:
    order = tree.dfs_order()
    assert sorted(order) == list(range(len(tree)))
    for node in range(len(tree)):
        subtree = {other for other in range(len(tree)) if node in tree.path(other)}
        first = order.index(node)
        assert set(order[first : first + len(subtree)]) == subtree
    for siblings in tree.children:
        assert sorted(siblings, key=order.index) == siblings


@given(batches)
@settings(deadline=None)
def test_batch_knows_its_rows(rows: list[TokenTree]) -> None:
    batch = TreeBatch.stack(rows)
    assert batch.num_rows == len(rows)
    assert batch.sizes == tuple(map(len, rows))
    assert batch.width == batch.num_slots - 1 == max(map(len, rows))
    assert batch.depth == max((depth for row in rows for depth in row.depths), default=0)
    assert batch.is_chain == all(row.depths == list(range(1, len(row) + 1)) for row in rows)
    for index, row in enumerate(rows):
        unstacked = replace(batch, rows=None).row(index)
        assert (unstacked.tokens, unstacked.parents) == (row.tokens, row.parents)
        assert batch.real_BN[index].tolist() == [node < len(row) for node in range(batch.width)]


@given(batches)
@settings(deadline=None)
def test_slots_see_their_path_and_nothing_else(rows: list[TokenTree]) -> None:
    batch = TreeBatch.stack(rows)
    for index, row in enumerate(rows):
        assert batch.depths_BT[index, : len(row) + 1].tolist() == [0, *row.depths]
        for host in (batch, replace(batch, rows=None)):
            assert host.host_depths_BT[index, : len(row) + 1].tolist() == [0, *row.depths]
        for slot in range(len(row) + 1):
            on_path = {0, *(node + 1 for node in row.path(slot - 1))}
            seen = batch.ancestors_BTT[index, slot].nonzero().flatten().tolist()
            assert set(seen) == on_path


def test_chains_of_different_lengths() -> None:
    batch = TreeBatch.chains(torch.tensor([[1, 2, 3], [4, 5, 6]]), sizes=[3, 1])
    assert batch.is_chain
    assert batch.depth == 3
    assert list(batch.row(1).tokens) == [4]
    assert batch.ancestors_BTT[0].tolist() == torch.ones(4, 4).tril().bool().tolist()
    assert batch.depths_BT.tolist() == [[0, 1, 2, 3]] * 2


def test_empty_batch_has_only_roots() -> None:
    batch = TreeBatch.empty(2)
    assert (batch.width, batch.num_slots, batch.depth, batch.is_chain) == (0, 1, 0, True)
    assert batch.ancestors_BTT.tolist() == [[[True]]] * 2


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_growing_trees_see_what_finished_ones_see(data: st.DataObject) -> None:
    """Layers of random sizes, up to past the memory that is allocated at first."""
    num_rows, grown, parents = 2, GrowingTrees(2), [[], []]
    assert (grown.newest, grown.sizes, grown.is_chain) == (range(1), (0, 0), True)
    for size in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)):
        num_old = len(parents[0])
        layer = [[data.draw(st.integers(ROOT, num_old - 1)) for _ in range(size)] for _ in range(num_rows)]
        parents = [row + more for row, more in zip(parents, layer, strict=True)]
        grown.append(Layer(tokens_BM=torch.full((num_rows, size), num_old), parents_BM=np.array(layer)))
        whole = TreeBatch.stack([TokenTree(tokens=range(len(row)), parents=row) for row in parents])
        assert (grown.sizes, grown.num_slots) == (whole.sizes, whole.num_slots)
        assert torch.equal(grown.ancestors_BTT, whole.ancestors_BTT)
        assert torch.equal(grown.seen_BMT, whole.ancestors_BTT[:, -size:])
        assert torch.equal(grown.seen_nodes_BMN, whole.ancestors_BTT[:, -size:, 1:])
        assert torch.equal(grown.depths_BM, whole.depths_BT[:, -size:])
        assert (grown.tokens_BN[:, grown.newest.start - 1 :] == num_old).all()
        assert grown.is_chain == whole.is_chain
        alone, expected = grown.single_row(1), whole.single_row(1)
        assert (alone.sizes, alone.is_chain) == (expected.sizes, expected.is_chain)
        assert alone.depth == max(whole.row(1).depths)
        assert torch.equal(alone.parents_BN, expected.parents_BN)
        assert torch.equal(alone.ancestors_BTT, expected.ancestors_BTT)
        assert (alone.host_depths_BT == grown.host_depths_BT[1:]).all()


def test_single_nodes_side_by_side_are_no_chain() -> None:
    grown = GrowingTrees(1)
    for parent, is_chain in ((ROOT, True), (0, True), (ROOT, False), (2, False)):
        grown.append(Layer(tokens_BM=torch.tensor([[7]]), parents_BM=np.array([[parent]])))
        assert grown.is_chain == is_chain
    assert grown.seen_BMT.tolist() == [[[True, False, False, True, True]]]


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 64, 300, 1000])
def test_argmax_takes_the_first_of_equals(vocab_size: int) -> None:
    x_MV = torch.randint(0, 9, (200, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    x_MV[0, vocab_size // 2] = torch.nan
    assert argmax(x_MV).tolist() == x_MV.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 300])
def test_blocks_share_the_vocabulary_out(vocab_size: int) -> None:
    x_MV = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums_MC = reduce_blocks(x_MV, lambda x: x.sum(-1))
    torch.testing.assert_close(sums_MC.sum(1), x_MV.sum(1))
    blocks_MC = torch.arange(sums_MC.shape[1]).expand_as(sums_MC)
    first_MC, entries_MCW = read_blocks(x_MV, torch.arange(3)[:, None], blocks_MC)
    assert first_MC.flatten().max() + entries_MCW.shape[2] == vocab_size
    for row, firsts in enumerate(first_MC.tolist()):
        for block, first in enumerate(firsts):
            assert torch.equal(entries_MCW[row, block], x_MV[row, first : first + entries_MCW.shape[2]])


@pytest.mark.parametrize("policy", [Chain(2), DySpec(3)])
@pytest.mark.parametrize("sample", [True, False])
def test_a_draft_from_some_tokens_is_one_of_the_whole_vocabulary(policy: GrowthPolicy, sample: bool) -> None:
    ids, generator = torch.tensor([6, 0, 3]), torch.Generator().manual_seed(0)
    grower = policy.start(Round(max_depths=[2, 1], sample=sample, generator=generator))
    scores_BMV = torch.randn(2, 1, 3, generator=generator)
    while grower.needs_scores:
        layer = grower.grow(scores_BMV)
        scores_BMV = torch.randn(2, layer.tokens_BM.shape[1], 3, generator=generator)
    narrow = grower.finish()
    wide = narrow.in_vocabulary(ids, 8)
    assert torch.equal(wide.trees.tokens_BN, ids[narrow.trees.tokens_BN])
    for row in range(2):
        tree, before = wide.trees.row(row), narrow.trees.row(row)
        assert list(tree.tokens) == [int(ids[token]) for token in before.tokens]
        assert list(tree.parents) == list(before.parents)
    assert wide.is_drawn == sample
    if sample:
        rows_B, root_B = torch.arange(2), torch.zeros(2, dtype=torch.long)
        q_BV = wide.q_at(0, rows_B, root_B)
        assert torch.allclose(q_BV[:, ids], narrow.q_at(0, rows_B, root_B))
        assert not q_BV[:, [1, 2, 4, 5, 7]].any()
