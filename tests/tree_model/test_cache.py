"""The cache after any rounds holds what a forward from scratch would have computed."""

import mmap
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec import UnsupportedOptionError
from specdec.hf import CACHE
from specdec.testing import random_prompts, tiny_model
from specdec.tree_model.cache import RowStates, TreeCache
from specdec.tree_model.dynamic_cache import refill
from specdec.tree_model.layer_kinds import LayerKind, layer_kinds
from specdec.tree_model.model import TreeModel
from tests.support.strategies import token_trees
from trees import TokenTree, TreeBatch

MODELS = {"llama": tiny_model("llama"), "gemma3_text": tiny_model("gemma3_text", sliding_window=3)}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def states_from_scratch(model: PreTrainedModel, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each [H, S, D], all positions kept."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), **{CACHE: cache}, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


class Rounds:
    """Rows of one batch that accept whatever they are told.

    `texts` are each row's tokens that the cache must hold.
    """

    def __init__(self, model: PreTrainedModel, prompt_lengths: list[int]):
        self.model = model
        prompts = random_prompts(prompt_lengths, vocab_size=64)
        self.texts = [
            ids[mask.bool()].tolist() for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
        ]
        self.target = TreeModel(model)
        with torch.no_grad():
            self.target.prefill(**prompts)

    def verify(self, trees: list[TokenTree], roots: list[int]) -> None:
        with torch.no_grad():
            self.target.verify(TreeBatch.stack(trees), torch.tensor([[root] for root in roots]))

    def accept(self, trees: list[TokenTree], roots: list[int], leaves: list[int]) -> None:
        """Commit the root and the path down to a leaf (-1: the root alone) of each row."""
        paths = [tree.path(leaf) for tree, leaf in zip(trees, leaves, strict=True)]
        self.target.commit([[0, *(node + 1 for node in path)] for path in paths])
        for text, tree, root, path in zip(self.texts, trees, roots, paths, strict=True):
            text += [root, *(tree.tokens[node] for node in path)]

    def select_rows(self, rows: list[int]) -> None:
        self.target.select_rows(rows)
        self.texts = [self.texts[row] for row in rows]

    def join(self, text: list[int]) -> None:
        reader = TreeModel(self.model)
        reader.begin(1)
        with torch.no_grad():
            for start in range(0, len(text), 4):
                reader.read(torch.tensor([text[start : start + 4]]))
        self.target.join(reader.cache.row_views(0) if text else None)
        self.texts.append(list(text))

    def check(self) -> None:
        cache = self.target.cache
        cache.check_integrity()
        for row, text in enumerate(self.texts):
            if not text:
                assert cache.lengths[row] == 0
                continue
            wanted = states_from_scratch(self.model, text)
            for states, wanted_states in zip(cache.row_states(row).slots, wanted, strict=True):
                for held, scratch in zip(states, wanted_states, strict=True):
                    torch.testing.assert_close(held[:, held.shape[1] - len(text) :], scratch, **TOLERANCE)


@pytest.mark.parametrize("family", MODELS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_rounds_leave_the_states_of_a_run_from_scratch(family: str, data: st.DataObject) -> None:
    rounds = Rounds(MODELS[family], data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "prompts"))
    for _ in range(data.draw(st.integers(1, 4), "rounds")):
        num_rows = len(rounds.texts)
        trees = data.draw(st.lists(token_trees(), min_size=num_rows, max_size=num_rows), "trees")
        leaves = [data.draw(st.integers(-1, len(tree) - 1), "leaf") for tree in trees]
        roots = data.draw(st.lists(st.integers(0, 63), min_size=num_rows, max_size=num_rows), "roots")
        rounds.verify(trees, roots)
        if data.draw(st.booleans(), "broken off"):
            rounds.target.cache.rollback()
            rounds.verify(trees, roots)
        rounds.accept(trees, roots, leaves)
        if num_rows > 1 and data.draw(st.booleans(), "a row leaves"):
            rounds.select_rows(data.draw(st.permutations(range(num_rows)), "stay")[:-1])
        if data.draw(st.booleans(), "a row joins"):
            rounds.join(data.draw(st.lists(st.integers(0, 63), max_size=9), "its text"))
    rounds.check()


def test_forward_that_breaks_off_between_layers_leaves_nothing_behind() -> None:
    rounds = Rounds(tiny_model("llama"), [4, 2])
    tree = TokenTree.chain([1, 2, 3])
    layer = rounds.model.model.layers[1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rounds.verify([tree, tree], [5, 6])
    handle.remove()
    rounds.target.cache.rollback()
    rounds.verify([tree, tree], [5, 6])
    rounds.accept([tree, tree], [5, 6], leaves=[2, 0])
    rounds.check()


def random_states(num_rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn((num_rows, 2, count, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ragged", [False, True])
def test_cache_grows_past_its_capacity(ragged: bool) -> None:
    cache = TreeCache(num_layers=1, num_rows=2, capacity=64)
    rows: list[list[Tensor]] = [[], []]
    for step in range(50):
        states = random_states(2, 4, seed=step)
        cache.update(states, -states, 0)
        kept = [[0, 2, 3], [1, 2] if ragged else [1, 2, 3]]
        cache.commit(kept)
        for row, slots in enumerate(kept):
            rows[row].append(states[row][:, slots])
    cache.check_integrity()
    assert cache.lengths == [150, 100 if ragged else 150]
    for row, pieces in enumerate(rows):
        ((keys, values),) = cache.row_states(row).slots
        assert torch.equal(keys, torch.cat(pieces, 1))
        assert torch.equal(values, -keys)


@pytest.mark.parametrize("has_addresses", [True, False])
def test_long_texts_are_not_copied(monkeypatch: pytest.MonkeyPatch, has_addresses: bool) -> None:
    """Buffers began with what a prompt needs, and every growth left a hole of their size in the allocator."""
    if not has_addresses:
        monkeypatch.setattr(mmap, "mmap", refused_beyond_a_megabyte(mmap.mmap))
    cache = TreeCache(num_layers=1, num_rows=1)
    states = torch.randn(1, 2, 3000, 16)
    first = None
    for start in range(0, 3000, 600):
        part = states[:, :, start : start + 600]
        keys, _ = cache.update(part, -part, 0)
        first = first or keys.data_ptr()
        cache.commit([range(600)])
    assert (keys.data_ptr() == first) is has_addresses
    assert torch.equal(cache.row_states(0).slots[0][0], states[0])


def refused_beyond_a_megabyte(real: Callable[..., object]) -> Callable[..., object]:
    def limited(number: int, size: int, **options: int) -> object:
        if size > 1 << 20:
            raise OSError("Cannot allocate memory")
        return real(number, size, **options)

    return limited


def test_rows_that_stay_keep_theirs_when_a_long_one_leaves() -> None:
    cache = TreeCache(num_layers=1, num_rows=3)
    states = random_states(3, 2000)
    cache.update(states, -states, 0)
    cache.commit([range(2000), range(5), range(9)])
    cache.clear_row(1)
    cache.select_rows([2, 1])
    cache.check_integrity()
    assert torch.equal(cache.row_states(0).slots[0][0], states[2, :, :9])
    assert not cache.row_states(1).slots[0][0].any()
    keys, _ = cache.update(states[:2, :, :7], states[:2, :, :7], 0)
    assert not keys[1, :, 12:].any(), "what was never written is zero"


def test_update_returns_the_committed_slots_and_the_tail() -> None:
    cache = TreeCache(num_layers=1, num_rows=1)
    first, second = random_states(1, 3), random_states(1, 2, seed=1)
    cache.update(first, first, 0)
    cache.commit([[0, 2]])
    keys, values = cache.update(second, second, 0)
    assert torch.equal(keys, torch.cat([first[:, :, [0, 2]], second], 2))
    assert torch.equal(values, keys)
    assert cache.tail == 2
    assert cache.get_seq_length() == 4


def test_adopted_cache_is_a_copy() -> None:
    source = DynamicCache()
    states = random_states(2, 3)
    source.update(states.clone(), states.clone(), 0)
    adopted = TreeCache(1, 2, 8).filled_from(source)
    adopted.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), 0)
    adopted.commit([[0], [0]])
    assert adopted.lengths == [4, 4]
    assert torch.equal(adopted.row_states(1).slots[0][0][:, :3], states[1])
    assert torch.equal(source.layers[0].keys, states)


def test_adopted_window_keeps_its_place() -> None:
    model = MODELS["gemma3_text"]
    tokens = list(range(1, 20))
    source = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), **{CACHE: source}, use_cache=True)
    adopted = TreeCache(2, 1, 0).filled_from(source)
    assert adopted.lengths == [19]
    in_window = source.layers[0].keys.shape[2]
    assert in_window < 19
    for (keys, _), (scratch, _) in zip(adopted.row_states(0).slots, states_from_scratch(model, tokens), strict=True):
        torch.testing.assert_close(keys[:, -in_window:], scratch[:, -in_window:], **TOLERANCE)


def test_cache_of_another_batch_size_is_refused() -> None:
    source = DynamicCache()
    source.update(random_states(2, 3), random_states(2, 3), 0)
    with pytest.raises(UnsupportedOptionError, match="2 rows but the input has 3"):
        TreeCache(1, 3, 0).filled_from(source)


def test_refilled_cache_holds_all_rows() -> None:
    source = DynamicCache()
    source.update(random_states(2, 9), random_states(2, 9), 0)
    long, short = random_states(1, 5)[0], random_states(1, 3, seed=1)[0]
    rows = [RowStates(length=part.shape[1], slots=[(part, -part)], recurrent=[]) for part in (long, short)]
    refill(source, rows)
    keys, values = source.layers[0].keys, source.layers[0].values
    assert torch.equal(keys[0], long)
    assert torch.equal(keys[1, :, :3], short)
    assert not keys[1, :, 3:].any()
    assert torch.equal(values, -keys)


def test_windows_are_read_from_the_config() -> None:
    full, window = LayerKind("full_attention"), LayerKind("sliding_attention", 3)
    assert layer_kinds(MODELS["llama"].config) == [full, full]
    assert layer_kinds(MODELS["gemma3_text"].config) == [window, full]
    convolution = LayerKind("conv", num_states=1, has_slots=False)
    assert layer_kinds(tiny_model("lfm2", full_attn_idxs=[1]).config) == [convolution, full]


@pytest.mark.parametrize("name", MODELS)
def test_committed_slots_may_be_cut_off(name: str):
    """As far back as into the padded prompt; what follows then sees what is left and nothing else."""
    rounds = Rounds(MODELS[name], [5, 3])
    rounds.target.cache.truncate_committed([4, 4])
    rounds.texts = [text[:-1] for text in rounds.texts]
    trees = [TokenTree.chain([7, 8, 9]), TokenTree(tokens=[6, 5], parents=[-1, -1])]
    rounds.verify(trees, [1, 2])
    rounds.accept(trees, [1, 2], [2, 1])
    rounds.check()
