"""What the model is given for a tree, and what it says, beside one forward for every path."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from specdec.testing import random_prompts, tiny_model
from specdec.tree_model.model import TreeModel
from tests.support.strategies import token_trees
from trees import ROOT, TokenTree, TreeBatch

WINDOW = 3
MODELS = {
    "llama": tiny_model("llama"),
    "gemma3_text": tiny_model("gemma3_text", sliding_window=WINDOW),
    "mistral": tiny_model("mistral", sliding_window=WINDOW, attn_implementation="eager"),
    "gpt2": tiny_model("gpt2"),
    "gemma2": tiny_model("gemma2", sliding_window=WINDOW),
}
LAYERS = {"full_attention": None, "sliding_attention": WINDOW}


def prefilled(model: PreTrainedModel, prompt_lengths: Sequence[int], chain_lengths: Sequence[int]) -> TreeModel:
    """A target that has read ragged prompts, and after them chains of different lengths."""
    target = TreeModel(model)
    with torch.no_grad():
        target.prefill(**random_prompts(prompt_lengths))
        chains = [TokenTree.chain([9] * (length - 1)) for length in chain_lengths]
        target.verify(TreeBatch.stack(chains), torch.tensor([[9]] * len(chains)))
    target.commit([range(length) for length in chain_lengths])
    return target


def verify(target: TreeModel, trees: Sequence[TokenTree], root: int = 11) -> tuple[Tensor, dict[str, Any]]:
    """The logits, and the inputs that the model was given."""
    inputs: dict[str, Any] = {}
    hook = target.model.register_forward_pre_hook(lambda _, __, given: inputs.update(given), with_kwargs=True)
    with torch.no_grad():
        logits = target.verify(TreeBatch.stack(trees), torch.tensor([[root]] * len(trees)))
    hook.remove()
    return logits, inputs


def visible(mask: Any, layer_type: str, dtype: torch.dtype) -> Tensor:
    """bool [B, T, S] of the mask that a layer gets."""
    mask = mask[layer_type] if isinstance(mask, dict) else mask
    if mask.dtype != torch.bool:
        assert bool(((mask == 0) | (mask == torch.finfo(dtype).min)).all())
        mask = mask == 0
    return mask[:, 0]


def slots_on_path(
    tree: TokenTree, node: int, committed: int, num_padding: int, window: int | None
) -> tuple[int, set[int]]:
    """Brute force: the position of a node (-1: the root), and the cache slots that it sees."""
    path = [committed - num_padding]  # positions of the root and of the nodes down to this one
    slots = [committed]
    for step in tree.path(node):
        path.append(path[-1] + 1)
        slots.append(committed + 1 + step)
    earlier = {slot: slot - num_padding for slot in range(num_padding, committed)}
    positions = {**earlier, **dict(zip(slots, path, strict=True))}
    own = path[-1]
    return own, {slot for slot, position in positions.items() if window is None or own - position < window}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_nodes_see_their_path_at_the_positions_of_their_depth(family: str, data: st.DataObject) -> None:
    model = MODELS[family]
    num_rows = data.draw(st.integers(1, 3), "rows")

    def draw_lengths(what: str) -> list[int]:
        return data.draw(st.lists(st.integers(1, 7), min_size=num_rows, max_size=num_rows), what)

    prompt_lengths, chain_lengths = draw_lengths("prompts"), draw_lengths("chains")
    trees = data.draw(st.lists(token_trees(), min_size=num_rows, max_size=num_rows), "trees")
    _, inputs = verify(prefilled(model, prompt_lengths, chain_lengths), trees)
    kinds = ["sliding_attention"] if family == "mistral" else getattr(model.config, "layer_types", ["full_attention"])
    for kind in set(kinds):
        seen_BTS = visible(inputs["attention_mask"], kind, model.dtype)
        for row, tree in enumerate(trees):
            committed = max(prompt_lengths) + chain_lengths[row]
            num_padding = max(prompt_lengths) - prompt_lengths[row]
            for node in range(ROOT, len(tree)):
                position, slots = slots_on_path(tree, node, committed, num_padding, LAYERS[kind])
                assert inputs["position_ids"][row, node + 1] == position
                assert set(seen_BTS[row, node + 1].nonzero().flatten().tolist()) == slots


@pytest.mark.parametrize("family", MODELS)
@given(trees=st.lists(token_trees(max_nodes=6), min_size=3, max_size=3))
@settings(max_examples=6, deadline=None)
def test_logits_of_a_tree_are_those_of_its_paths(family: str, trees: list[TokenTree]) -> None:
    model = MODELS[family]
    lengths, chains = [3, 8, 5], [4, 1, 2]
    prompts = random_prompts(lengths)
    logits_BTV, _ = verify(prefilled(model, lengths, chains), trees)
    for row, tree in enumerate(trees):
        text = [*prompts["input_ids"][row, -lengths[row] :].tolist(), *[9] * chains[row], 11]
        for node in range(ROOT, len(tree)):
            path = [*text, *(tree.tokens[step] for step in tree.path(node))]
            with torch.no_grad():
                wanted_V = model(input_ids=torch.tensor([path])).logits[0, -1]
            torch.testing.assert_close(logits_BTV[row, node + 1], wanted_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_layer_by_layer_forwards_equal_one_forward(family: str) -> None:
    rows = [
        TokenTree(tokens=[1, 2, 3, 4, 5], parents=[ROOT, ROOT, 0, 1, 1]),
        TokenTree(tokens=[6, 7, 8, 9, 10], parents=[ROOT, ROOT, 1, 0, 1]),
    ]
    trees = TreeBatch.stack(rows)
    at_once, _ = verify(prefilled(MODELS[family], [3, 6], [2, 4]), rows)
    target = prefilled(MODELS[family], [3, 6], [2, 4])
    pieces = []
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 3), (3, 6)):
            tokens_BT = torch.cat([torch.full((2, 1), 11), trees.tokens_BN], 1)[:, start:stop]
            depths_BT, seen_BTK = trees.depths_BT[:, start:stop], trees.ancestors_BTT[:, start:stop, :stop]
            pieces.append(target.forward(tokens_BT, depths_BT, seen_BTK))
    torch.testing.assert_close(torch.cat(pieces, 1), at_once, rtol=1e-4, atol=1e-4)
    assert target.num_forwards == 2 + 3


def test_plain_step_of_equal_rows_needs_no_mask() -> None:
    target = TreeModel(MODELS["llama"])
    with torch.no_grad():
        target.prefill(random_prompts([4, 4])["input_ids"])
    _, inputs = verify(target, [TokenTree.chain([])] * 2)
    assert inputs["attention_mask"] is None
    assert inputs["position_ids"].tolist() == [[4], [4]]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("rows", [[2], [0, 3], [1, 2, 3]])
def test_rows_that_are_read_alone_are_read_as_in_the_batch(family: str, rows: list[int]) -> None:
    """Same logits, and a tail that can be committed and gone on from; the other rows stay as they were."""
    lengths, tree = ([5, 2, 7, 4], [3, 1, 2, 4]), TokenTree.chain([7, 3, 8])
    target, apart = prefilled(MODELS[family], *lengths), prefilled(MODELS[family], *lengths)
    expected, _ = verify(target, [tree] * 4)
    with apart.row_subset(rows, 4):
        logits, _ = verify(apart, [tree] * len(rows))
    torch.testing.assert_close(logits, expected[rows])
    for model in (target, apart):
        model.commit([range(3) if row in rows else () for row in range(4)])
        model.cache.check_integrity()
    (later, _), (expected_later, _) = (verify(model, [tree] * 4, root=4) for model in (apart, target))
    torch.testing.assert_close(later, expected_later)


def test_a_forward_of_some_rows_that_breaks_off_leaves_the_batch_as_it_was() -> None:
    target = prefilled(MODELS["llama"], [5, 2], [3, 1])
    whole, lengths = target.cache, [*target.cache.lengths]
    with pytest.raises(KeyboardInterrupt), target.row_subset([1], 4):
        raise KeyboardInterrupt
    assert target.cache is whole
    assert whole.lengths == lengths
    assert whole.tail == 0
