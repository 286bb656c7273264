"""Weights that were packed once come from the cache: the same bits, and no others' weights."""

import logging

import pytest
import torch
from torch import nn

from specdec.control import costs
from specdec.disk_cache.folders import MEASUREMENTS, PACKED_WEIGHTS
from specdec.drafters import QuantizedSelf
from specdec.errors import ModelError
from specdec.kernels import native, prepare
from specdec.kernels.model import linear, packing
from specdec.kernels.model.quantized_linear import QuantizedLinear
from specdec.model_options import ModelOptions
from specdec.models import checkpoint, files, load
from specdec.models.pair import load_pair
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())

IDS = torch.arange(1, 9)[None]


def int8(folder):
    return prepare(load(folder, device="cpu", weights="int8").model, "int8")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def no_packing(monkeypatch):
    """From here on, linears are not packed any more."""

    def forbid():
        def refuse(*_):
            raise AssertionError("it was packed again")

        monkeypatch.setattr(native.library(), "pack", refuse)
        monkeypatch.setattr(packing, "read_by_others", refuse)
        monkeypatch.setattr(packing, "layout", lambda library, bits: f"layout of {bits}")

    monkeypatch.setattr(packing, "layout", lambda library, bits: f"layout of {bits}")
    return forbid


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_start_maps_what_the_first_has_packed(tmp_path, monkeypatch, no_packing, weights, dtype):
    """Weights of a narrower checkpoint are packed as they lie; they have the same bits as those of a float32 model."""
    folder = save_tiny_model(tmp_path)
    load(folder, device="cpu").model.to(dtype).save_pretrained(folder)
    monkeypatch.setattr(packing, "_SMALL_BYTES", 0)
    in_memory = load(folder, device="cpu").model
    in_memory.model.norm.weight = nn.Parameter(in_memory.model.norm.weight.clone())  # not the files' any more
    expected = logits(prepare(in_memory, weights))
    assert PACKED_WEIGHTS.files() == []

    first = prepare(load(folder, device="cpu", weights=weights).model, weights)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert torch.equal(logits(first), expected)
    assert len(PACKED_WEIGHTS.files()) == 1
    no_packing()
    second = prepare(load(folder, device="cpu", weights=weights).model, weights)
    assert {parameter.dtype for parameter in second.parameters()} == {torch.float32}
    assert torch.equal(logits(second), expected)


def test_the_copy_of_a_float_model_is_the_same_file(tiny, no_packing):
    expected = [module.packed for module in int8(tiny).modules() if isinstance(module, QuantizedLinear)]
    no_packing()
    target = load(tiny, device="cpu").model
    before = target.get_input_embeddings().weight.clone()
    copy = QuantizedSelf().copy_of(target)
    actual = [module.packed for module in copy.modules() if isinstance(module, QuantizedLinear)]
    assert all(map(torch.equal, actual, expected))
    assert len(actual) == len(expected)
    assert torch.equal(target.get_input_embeddings().weight, before)


def test_a_model_that_was_edited_is_packed_itself(tiny):
    kept = logits(int8(tiny))
    model = load(tiny, device="cpu", weights="int8").model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(logits(prepare(model, "int8")), kept)
    assert len(PACKED_WEIGHTS.files()) == 1


def test_another_checkpoint_in_the_same_place_is_packed_anew(tmp_path):
    first = logits(int8(save_tiny_model(tmp_path)))
    second = logits(int8(save_tiny_model(tmp_path, seed=5)))
    assert not torch.equal(first, second)
    assert len(PACKED_WEIGHTS.files()) == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_ignored_and_made_again(tiny, caplog, damage):
    expected = logits(int8(tiny))
    (file,) = PACKED_WEIGHTS.files()
    content = bytearray(file.read_bytes())
    content[-70] ^= 1
    file.write_bytes({"flipped": content, "truncated": content[:-200], "empty": b""}[damage])
    caplog.set_level(logging.DEBUG, "specdec")
    assert torch.equal(logits(int8(tiny)), expected)
    assert "its checksum is another" in caplog.text


def test_without_a_cache_weights_are_packed_in_memory(tiny):
    expected = logits(int8(tiny))
    PACKED_WEIGHTS.clear()
    PACKED_WEIGHTS.path.chmod(0o777)
    assert torch.equal(logits(int8(tiny)), expected)
    assert PACKED_WEIGHTS.files() == []


def test_costs_and_products_are_measured_once(tiny, monkeypatch):
    monkeypatch.setattr(linear, "_calibrated", {})
    first = prepare(load(tiny, device="cpu").model)
    measured = costs.costs_of(first).measured(4)

    def forbid(*_, **__):
        raise AssertionError("it was measured again")

    monkeypatch.setattr(linear, "_calibrated", {})
    monkeypatch.setattr(linear, "_time_candidates", forbid)
    monkeypatch.setattr(costs, "measure_forwards", forbid)
    again = prepare(load(tiny, device="cpu").model)
    assert costs.costs_of(again).measured(4) == pytest.approx(measured)
    with pytest.raises(AssertionError, match="measured again"):
        costs.costs_of(load(tiny, device="cpu").model)  # other linears, other costs
    MEASUREMENTS.clear()
    with pytest.raises(AssertionError, match="measured again"):
        costs.costs_of(prepare(load(tiny, device="cpu").model))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda: 1_000)
    monkeypatch.setattr(checkpoint.Checkpoint, "_read", None)
    with pytest.raises(ModelError, match=r"takes about 0\.0 GB of memory with weights 'float', and 0\.0 GB are free"):
        load_pair(tiny, None, ModelOptions())


def test_what_would_fit_is_said(tiny, monkeypatch):
    found = files.weight_files(tiny)
    full, half, least = (files._num_bytes(found, torch.float32, weights) for weights in ("float", "int8", "int4"))
    assert full > half > least
    for free, advice in ((half, "--weights int8 takes .* and --weights int4"), (least - 1, "take a smaller model")):
        monkeypatch.setattr(files, "free_memory", lambda free=free: free)
        with pytest.raises(ModelError, match=advice):
            files.check_memory("tiny", found, torch.float32, "float")
