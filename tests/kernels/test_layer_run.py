"""Fused layers in one native call say, to the last bit, what they say one by one."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from specdec.kernels import native, prepare
from specdec.kernels.model import linear, stack
from specdec.kernels.model.layer_run import LayerRun
from specdec.testing import tiny_model
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.model import TreeModel

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())

WEIGHTS = ("float", "int8", "int4")


def model_of(weights: str, family: str = "llama") -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return prepare(tiny_model(family, num_hidden_layers=4, head_dim=32, **sizes), weights)


class Calls:
    """Counts runs that were native, or forbids them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_native, self.are_allowed = 0, True
        real = LayerRun.__call__

        def call(run: LayerRun, *args: object, **options: object) -> Tensor | None:
            done = real(run, *args, **options) if self.are_allowed else None
            self.num_native += done is not None
            return done

        monkeypatch.setattr(LayerRun, "__call__", call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    prepare_module = importlib.import_module("specdec.kernels.model.prepare")
    monkeypatch.setattr(prepare_module, "calibrate", lambda _: dict.fromkeys(linear.BANDS, linear.NATIVE))
    return Calls(monkeypatch)


def rounds(model: nn.Module, lengths: list[int], kept: tuple[int, ...] = ()) -> list[Tensor]:
    """Logits and kept states of a few verifications of trees, of which rows accept different numbers of tokens."""
    torch.manual_seed(1)
    target, num_rows = TreeModel(model), len(lengths)
    target.keep_states(kept)
    target.begin(num_rows)
    prompt_BP = torch.randint(0, 60, (num_rows, max(lengths)))
    target.read(prompt_BP)
    target.cache.truncate_committed(lengths)
    found = []
    for width in (1, 5, 3, 5):
        tokens_BT = torch.randint(0, 60, (num_rows, width))
        offsets_BT = torch.tensor([0, 1, 1, 2, 2][:width]).expand(num_rows, width)
        seen_TT = torch.eye(width, dtype=torch.bool)
        seen_TT[:, 0] = True
        with torch.inference_mode():
            seen_BTT = None if width == 1 else seen_TT.expand(num_rows, width, width).contiguous()
            found += [target.forward(tokens_BT, offsets_BT, seen_BTT), *target.states.values()]
        target.commit([[0, width - 1][: 1 + row % 2] if width > 1 else [0] for row in range(num_rows)])
    return [
        *found,
        *(part for row in range(num_rows) for layer in target.cache.row_states(row).slots for part in layer),
    ]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("lengths", [[7], [9, 9], [5, 11, 2]])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_states_keys_and_logits_are_those_of_single_layers(calls, weights, lengths, family):
    model = model_of(weights, family)
    together = rounds(model, lengths)
    assert calls.num_native >= 4
    calls.are_allowed = False
    assert all(map(torch.equal, together, rounds(model, lengths)))


def test_states_between_layers_can_be_kept(calls):
    """They divide the run in two; the layer whose states are kept is called by itself."""
    model = model_of("int8")
    together = rounds(model, [7, 4], kept=(2,))
    assert calls.num_native >= 8
    calls.are_allowed = False
    assert all(map(torch.equal, together, rounds(model, [7, 4], kept=(2,))))


def test_layers_with_hooks_are_called_one_by_one(calls):
    model, seen = model_of("int8"), []
    expected = rounds(model, [6])
    before = calls.num_native
    handle = model.model.layers[2].register_forward_hook(lambda *_: seen.append(1))
    assert all(map(torch.equal, expected, rounds(model, [6])))
    handle.remove()
    assert seen
    assert calls.num_native == before


def test_caches_of_other_kinds_are_left_to_single_layers():
    """What is no float32 on the CPU, or not alike in all layers, has no addresses to write to."""
    cache = TreeCache(num_layers=2, num_rows=1)
    assert cache.append_slots((0, 1), 1) is None, "nothing has been written yet"
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        states = torch.zeros(1, 2, 3, 4, dtype=dtype)
        cache.update(states, states, index)
    assert cache.append_slots((0, 1), 1) is None
    assert cache.append_slots((0,), 2) is not None
    assert [layer.tail for layer in cache.stored.values()] == [5, 3]
    assert cache.append_slots((0, 1), 1) is None, "layers of different tails"


def test_new_buffers_have_new_addresses():
    cache = TreeCache(num_layers=1, num_rows=1)
    states = torch.zeros(1, 1, 3, 4)
    cache.update(states, states, 0)
    first = cache.append_slots((0,), 1)
    cache.commit([range(4)])
    cache.join()
    second = cache.append_slots((0,), 1)
    assert first is not None
    assert second is not None
    assert second.keys[0] == cache.stored[0].keys.data_ptr() != first.keys[0]
    assert [*second.firsts] == [4, 0]
    assert second.num_slots == 5


def test_a_changed_layer_is_noticed_by_the_next_run():
    model = model_of("int8")
    expected = rounds(copy.deepcopy(model), [6])
    rounds(model, [6])
    model.model.layers[1].post_attention_layernorm.weight.data = torch.full((64,), 2.0)
    assert not torch.equal(expected[0], rounds(model, [6])[0])
    assert stack.is_fused(model.model.layers[1])
