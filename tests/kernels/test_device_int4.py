"""Linears of 4 bits on a GPU, with a stand-in for the library: which, what is refused, and that drafts stay exact."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from contextvars import Context
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec
from specdec import UnsupportedModelError, UnsupportedOptionError
from specdec.cuda import graphs
from specdec.cuda.arena import Arena
from specdec.drafters import Auto, Drafter, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.kernels import prepare_like, prepared
from specdec.kernels.model import device_int4
from specdec.kernels.model.profile import profile_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.fake_int4 import pretended_gpu, rounded
from tests.support.goodness import assert_drawn_from
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import VOCAB_SIZE, continuations, exact_distribution
from trees import Chain, DySpec

RAGGED = random_prompts([5, 9, 7])
NUM_NEW = 10


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def build(**settings: Any) -> PreTrainedModel:
    return tiny_model("llama", dtype=torch.bfloat16, **settings)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_all_linears_but_the_head_are_replaced() -> None:
    model = build()
    before = weights_of(model)
    assert specdec.prepare(model, weights="int4") is model
    for name, weight in model.named_parameters():
        is_replaced = name.endswith("_proj.weight")
        assert torch.equal(weight, rounded(before[name]) if is_replaced else before[name]), name
        assert torch.equal(weight, before[name]) is not is_replaced
    done = prepared(model)
    assert done is not None
    assert (done.weights, done.num_linears, done.activations) == ("int4", 14, "float")
    assert specdec.prepare(model, weights="int4") is model


def test_linears_of_odd_sizes_stay_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build(intermediate_size=72)
    before = weights_of(model)
    specdec.prepare(model, weights="int4")
    assert "no weights of 4 bits for model.layers.*.mlp.down_proj" in caplog.text
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before["model.layers.1.mlp.up_proj.weight"])


def refusal(kind: type[Exception], model: PreTrainedModel, weights: str = "int4") -> str:
    before = weights_of(model)
    with pytest.raises(kind) as raised:
        specdec.prepare(model, weights=weights)
    assert prepared(model) is None
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    return str(raised.value)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(UnsupportedModelError, build(), "int8") == (
        "weights='int8' is for models on the CPU; on a CUDA device there is weights='int4'"
    )
    for dtype in (torch.float32, torch.float16):
        words = refusal(UnsupportedModelError, tiny_model("llama", dtype=dtype))
        assert f"its linears are {dtype}: load it with dtype=torch.bfloat16" in words
    assert "for a multiple of 32 inputs" in refusal(
        UnsupportedModelError, build(hidden_size=24, intermediate_size=24, head_dim=6)
    )
    moved = build()
    moved.model.layers[0]._hf_hook = object()
    assert "accelerate moves its weights" in refusal(UnsupportedModelError, moved)
    monkeypatch.setattr(device_int4, "serves", lambda _: True)
    monkeypatch.setattr(device_int4, "is_installed", lambda: False)
    words = Context().run(refusal, UnsupportedOptionError, build())  # where nothing stands in
    assert words == "weights='int4' on a CUDA device needs torchao: pip install 'specdec-runtime[int4]'"
    assert device_int4.describe() == "needs torchao: pip install 'specdec-runtime[int4]'"


def test_what_may_be_done_with_such_a_model() -> None:
    model = specdec.prepare(build(), weights="int4")
    assert model.to(torch.bfloat16).to("cpu") is model
    for part in (model, model.model.layers[0].mlp):
        with pytest.raises(UnsupportedOptionError, match="stays bfloat16 on the CPU, and cannot become float32"):
            part.float()
    with pytest.raises(UnsupportedOptionError, match="no float weights to save"):
        model.save_pretrained("nowhere")
    with pytest.raises(UnsupportedOptionError, match="takes no state dict"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(UnsupportedOptionError, match="its float weights are gone"):
        specdec.unprepare(model)
    again = copy.deepcopy(model)
    ids = RAGGED["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    head = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    assert prepared(prepare_like(head, model)) is None


def test_the_copy_shares_what_is_not_quantised() -> None:
    target, drafter = build(), QuantizedSelf(weights="int4")
    before = weights_of(target)
    made = drafter.copy_of(target)
    for (name, ours), (_, theirs) in zip(target.named_parameters(), made.named_parameters(), strict=True):
        assert torch.equal(ours, before[name])
        assert (ours is theirs) is not name.endswith("_proj.weight"), name
        assert ours is theirs or torch.equal(theirs, rounded(ours))
    assert made.lm_head.weight is target.lm_head.weight
    assert drafter.copy_of(target) is made
    with torch.no_grad():
        target.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert drafter.copy_of(target) is not made
    with pytest.raises(UnsupportedModelError, match="there is weights='int4'"):
        speculate(target, RAGGED, QuantizedSelf(), max_new_tokens=4)


DRAFTERS: dict[str, tuple[Drafter, dict[str, Any]]] = {
    "copy": (QuantizedSelf(weights="int4"), {}),
    "tree by the copy": (QuantizedSelf(weights="int4"), {"tree": DySpec(8)}),
    "auto": (Auto(), {}),
}


@pytest.mark.parametrize("with_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_copy_drafts_for_the_float_model(name: str, with_graphs: bool) -> None:
    target, (drafter, options) = build(), DRAFTERS[name]
    expected = plain_alone(target, RAGGED, NUM_NEW)
    with graphs.standing_in() if with_graphs else nullcontext():
        out = speculate(target, RAGGED, drafter, max_new_tokens=NUM_NEW, **options)
        assert_same_tokens(target, expected, out.sequences, RAGGED["attention_mask"])
        if isinstance(drafter, QuantizedSelf):
            assert out.stats.num_accepted
            replayed = profile_of(drafter.copy_of(target)).part(Arena).num_replays
            assert bool(replayed) is with_graphs


def test_a_quantised_model_is_decoded_exactly() -> None:
    """As itself: it is another model than the float one, which may draft for it."""
    floats, target = build(), specdec.prepare(build(), weights="int4")
    expected = plain_alone(target, RAGGED, NUM_NEW)
    assert not torch.equal(expected, plain_alone(floats, RAGGED, NUM_NEW))
    settings = {"return_dict_in_generate": True, "output_logits": True, "exact": "bits"}
    with graphs.standing_in():
        for drafter in (PromptLookup(min_match=1), SmallModel(floats, num_tokens=4)):
            out = speculate(target, RAGGED, drafter, max_new_tokens=NUM_NEW)
            assert_same_tokens(target, expected, out.sequences, RAGGED["attention_mask"])
        logits = [
            specdec.generate(target, **RAGGED, drafter=each, max_new_tokens=NUM_NEW, do_sample=False, **settings).logits
            for each in (Plain(), SmallModel(floats, num_tokens=4))
        ]
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


def test_samples_have_the_targets_distribution() -> None:
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "initializer_range": 0.6}
    target, prompt = build(**sizes), torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    settings = {"tree": Chain(2), "max_new_tokens": 3, "do_sample": True}
    drafter = QuantizedSelf(weights="int4")
    outs = [specdec.generate(target, prompt.expand(150, -1), drafter=drafter, **settings) for _ in range(8)]
    assert_drawn_from(continuations(torch.cat(outs), 3), exact_distribution(target, prompt))


@pytest.mark.slow
def test_torchaos_weights_with_the_products_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two operators that are the GPU's."""
    pytest.importorskip("torchao")

    def packed(pairs: Tensor, _: int) -> Tensor:
        numbers = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1).int()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", packed)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", torch.ops.aten._weight_int4pack_mm_for_cpu)
    target, drafter = build(), QuantizedSelf(weights="int4")
    expected = plain_alone(target, RAGGED, NUM_NEW)
    with device_int4.standing_in(device_int4._quantise_by_torchao), graphs.standing_in():
        out = speculate(target, RAGGED, drafter, max_new_tokens=NUM_NEW)
        assert_same_tokens(target, expected, out.sequences, RAGGED["attention_mask"])
        made = drafter.copy_of(target)
    assert type(made.model.layers[0].mlp.up_proj.weight).__name__ == "Int4TilePackedTo4dTensor"
    assert type(target.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    assert profile_of(made).part(Arena).num_replays
