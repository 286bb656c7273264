"""A quantised model that is cast, moved, copied, pickled or saved: it stays exact, or says why not.

`.half()` used to leave 16-bit scales to a kernel that reads float32, past the end of the buffer: other tokens.
`save_pretrained` wrote a checkpoint without the linears, and pickling failed on the kernels' library.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.kernels import native
from specdec.kernels.model import persistence
from specdec.kernels.model.linear import BANDS, NATIVE
from specdec.kernels.model.quantized_linear import LINEARS
from specdec.testing import random_prompts, tiny_model

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192}
PROMPT = random_prompts([9], vocab_size=60)
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module", params=LINEARS)
def weights(request: pytest.FixtureRequest) -> str:
    return request.param


def quantized_model(weights: str) -> PreTrainedModel:
    return specdec.prepare(tiny_model("llama", **SIZES), weights=weights)


@pytest.fixture(scope="module")
def model(weights: str) -> PreTrainedModel:
    return quantized_model(weights)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Tensor:
    return model.generate(**PROMPT, **GREEDY)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WORKS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "to the CPU": lambda model: model.to("cpu"),
    "to float32": lambda model: model.to(torch.float32),
    "float": lambda model: model.float(),
    "train and eval": lambda model: model.train().eval(),
    "share_memory": lambda model: model.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "pickled copy": lambda model: pickled(copy.deepcopy(model)),
}

REFUSED: dict[str, Callable[[PreTrainedModel], object]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "another device": lambda model: model.to("meta"),
    "cuda": lambda model: model.cuda(),
    "half, of its layers": lambda model: model.model.half(),
    "half, of one layer": lambda model: model.model.layers[0].half(),
    "half, of what it is a part of": lambda model: nn.Sequential(model).half(),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict(tiny_model("llama", **SIZES, seed=3).state_dict()),
    "push_to_hub": lambda model: model.push_to_hub("nowhere"),
}


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(native.describe())
    return request.param


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", WORKS)
def test_what_works_stays_exact(name: str, weights: str) -> None:
    model = quantized_model(weights)
    expected = model.generate(**PROMPT, **GREEDY)
    changed = WORKS[name](model)
    assert torch.equal(changed.generate(**PROMPT, **GREEDY), expected)
    assert torch.equal(specdec.generate(changed, **PROMPT, **GREEDY), expected)
    with pytest.raises(UnsupportedOptionError, match="stays float32 on the CPU"):
        changed.half()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_so_and_changes_nothing(
    model: PreTrainedModel, expected: Tensor, name: str, weights: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"{weights}-prepared model"):
        REFUSED[name](model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.generate(**PROMPT, **GREEDY), expected)


def test_saving_writes_no_half_of_a_checkpoint(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="save the model before"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_offloading_is_refused(model: PreTrainedModel, expected: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(UnsupportedOptionError, match="save the model before"):
        accelerate.cpu_offload(model)
    assert torch.equal(model.generate(**PROMPT, **GREEDY), expected)


def test_weights_of_other_kernels_are_refused(
    model: PreTrainedModel, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights are opaque: other kernels would read other numbers."""
    stored = pickle.dumps(model)
    monkeypatch.setattr(persistence, "layout", lambda *_: "another")
    with pytest.raises(UnsupportedModelError, match=f"prepare\\(model, weights='{weights}'\\) here"):
        pickle.loads(stored)


def test_a_float_model_that_is_pickled_works_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = specdec.prepare(tiny_model("llama", **SIZES))
    expected, stored = model.generate(**PROMPT, **GREEDY), pickle.dumps(model)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(pickle.loads(stored).generate(**PROMPT, **GREEDY), expected)


# fused layers are given addresses, which may be left behind


def halved_twice(model: PreTrainedModel) -> None:
    model.half().float()


def replaced_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def replaced_parameters(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach() * 0.5)
        layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.detach() * 2)


class Adapted(nn.Module):
    """A linear with an adapter of rank one."""

    def __init__(self, base: nn.Linear, scale: float = 1.0):
        super().__init__()
        random = torch.Generator().manual_seed(base.out_features)
        self.base = base
        self.scale = scale
        self.down = nn.Linear(base.in_features, 1, bias=False)
        self.up = nn.Linear(1, base.out_features, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=random))
            self.up.weight.copy_(torch.randn(self.up.weight.shape, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def adapted(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)


@pytest.mark.skipif(native.library() is None, reason="fused layers are native")
@pytest.mark.parametrize("change", [halved_twice, replaced_data, replaced_parameters, adapted])
def test_a_prepared_float_model_that_changes_computes_with_what_it_is_now(
    change: Callable[[PreTrainedModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on with the memory of the old weights, and without the adapter."""
    monkeypatch.setattr(
        sys.modules["specdec.kernels.model.prepare"], "calibrate", lambda linears: dict.fromkeys(BANDS, NATIVE)
    )
    model, stock = specdec.prepare(tiny_model("llama", **SIZES)), tiny_model("llama", **SIZES)
    assert model._specdec_prepared.num_fused_layers == 2
    ids = PROMPT["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        for each in (model, stock):
            change(each)
        expected = stock(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 1e-3 or change is halved_twice


# linears that a model's code reads the weights of


class Router(nn.Module):
    """As in Hunyuan and LongCat: the weight is read, the module may be called or not."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(16, 4)
        self.multiplied = nn.Linear(16, 4)
        self.asked = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.asked.weight.dtype == torch.float32:
            x = x.float()
        return self.called(x) + nn.functional.linear(x, self.multiplied.weight) + self.asked(x)


@pytest.mark.parametrize("family", ["trial", "source"])
def test_linears_whose_weights_are_read_stay_float(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hunyuan's MoE crashed in the default call: 'Int8Linear' object has no attribute 'weight'."""
    model = tiny_model("llama")
    width = model.config.hidden_size
    block = Router()
    block.called, block.multiplied, block.asked = (nn.Linear(width, width) for _ in range(3))
    model.model.layers[0].mlp.act_fn = nn.SiLU()
    model.model.layers[0].mlp = block
    if family == "source":
        monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    state = torch.get_rng_state()
    copied = specdec.kernels.quantized_copy(model)
    assert torch.equal(torch.get_rng_state(), state), "the trial draws no random numbers"
    monkeypatch.undo()
    copied.__dict__.pop("forward", None)
    router = copied.model.layers[0].mlp
    assert type(router.multiplied) is type(router.asked) is nn.Linear
    assert type(router.called) is not nn.Linear
    assert copied(PROMPT["input_ids"]).logits.isfinite().all()
    assert type(block.called) is nn.Linear, "the original is as it was"
