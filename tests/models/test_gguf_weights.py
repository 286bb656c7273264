"""Models of a GGUF file's blocks: they say what the dequantised model says, drafted or not, and what cannot be executed
is refused before anything is done."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import specdec
from specdec import models
from specdec.drafters import Auto, PromptLookup, QuantizedSelf, SmallModel
from specdec.engine import Engine, Request
from specdec.errors import ModelError, UnsupportedOptionError
from specdec.kernels import native
from specdec.kernels.model.gguf_modules import GgufEmbedding, GgufLinear
from specdec.kernels.model.prepare import prepared
from specdec.models import gguf as gguf_files
from tests.support.goodness import assert_drawn_from
from tests.support.sampled_rows import continuations, exact_distribution
from tests.support.tiny_gguf import write_tiny_gguf
from trees import DySpec

MIXED = {"attn_v": "Q6_K", "ffn_down": "Q5_K", "attn_q": "Q4_0", "attn_k": "Q5_1", "token_embd": "Q8_0"}
"""Types by the beginning of a tensor's name; all others are Q4_K."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "cache_folder", lambda: folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def file(cache: Path) -> Path:
    """Llama, with tied embeddings and heads of 32, so that its layers are native."""
    write_tiny_gguf(cache / "mixed.gguf", size=256, types=MIXED, seed=3)
    return cache / "mixed.gguf"


@pytest.fixture(scope="module")
def model(file: Path):
    return models.load(file, weights="gguf").model


def ragged() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 12:] = ids[0, :12]
    mask = torch.ones_like(ids)
    for row, num_padded in ((1, 15), (2, 4)):
        ids[row, :num_padded], mask[row, :num_padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_logits_are_those_of_the_dequantised_model(file, model):
    dequantised, ids = models.load(file, device="cpu").model, ragged()["input_ids"]
    expected, actual = dequantised(ids).logits, model(ids).logits
    assert (actual - expected).norm() < 0.03 * expected.norm()
    assert model.config.eos_token_id == dequantised.config.eos_token_id
    assert model.generation_config.eos_token_id == dequantised.generation_config.eos_token_id


def test_every_linear_and_the_embedding_are_blocks_and_layers_of_mixed_types_are_native(model):
    assert type(model.get_input_embeddings()) is GgufEmbedding
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear | GgufLinear)]
    assert {type(part) for part in linears} == {GgufLinear}
    done = prepared(model)
    assert done.weights == "gguf"
    assert done.num_linears == len(linears) == 15
    if native.library():
        assert done.activations == "int8"
        assert done.num_fused_layers == 2


def test_without_native_kernels_logits_are_the_dequantised_model_s(file, monkeypatch):
    expected = models.load(file, device="cpu").model(ragged()["input_ids"]).logits
    monkeypatch.setattr(native, "library", lambda: None)
    actual = models.load(file, weights="gguf").model(ragged()["input_ids"]).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


DRAFTERS = {
    "prompt lookup": lambda model: (PromptLookup(), None),
    "auto": lambda model: (Auto(), None),
    "itself, tree": lambda model: (SmallModel(model), DySpec(budget=12)),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("rows", [slice(1), slice(3)], ids=["alone", "ragged"])
def test_greedy_output_is_the_model_s_own(model, name, rows):
    drafter, tree = DRAFTERS[name](model)
    prompts = {key: value[rows] for key, value in ragged().items()}
    settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.1, "pad_token_id": 0}
    expected = model.generate(**prompts, **settings)
    assert torch.equal(specdec.generate(model, **prompts, **settings, drafter=drafter, tree=tree), expected)


@pytest.mark.parametrize("name", DRAFTERS)
def test_samples_follow_the_model_s_own_distribution_in_ragged_batches(model, name):
    drafter, tree = DRAFTERS[name](model)
    options = {"do_sample": True, "top_k": 3, "repetition_penalty": 1.3, "pad_token_id": 0}
    prompts = {key: value[:2] for key, value in ragged().items()}
    torch.manual_seed(0)
    out = specdec.generate(
        model,
        **{key: value.repeat(1_000, 1) for key, value in prompts.items()},
        max_new_tokens=3,
        drafter=drafter,
        tree=tree,
        **options,
    )
    for row in range(2):
        ids, mask = (prompts[key][row : row + 1] for key in ("input_ids", "attention_mask"))
        expected = exact_distribution(model, ids, mask, **{key: options[key] for key in options if key != "do_sample"})
        assert_drawn_from(continuations(out[row::2], ids.shape[1]), expected, f"{name}, row {row}")


@pytest.mark.parametrize("name", ["prompt lookup", "auto"])
def test_an_engine_says_what_each_request_gets_alone(model, name):
    engine = Engine(model, drafter=DRAFTERS[name](model)[0], max_rows=2)
    prompts = ragged()
    texts = [ids[mask.bool()] for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)]
    settings = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.1}
    answers = [engine.submit(Request(prompt=ids.tolist(), config=GenerationConfig(**settings))) for ids in texts]
    engine.run()
    for ids, answer in zip(texts, answers, strict=True):
        expected = model.generate(ids.unsqueeze(0), **settings, pad_token_id=0)[0, len(ids) :]
        assert answer.tokens == expected.tolist()


def test_it_drafts_for_its_dequantised_self(file, model):
    target, settings = (
        models.load(file, device="cpu").model,
        {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0},
    )
    expected = target.generate(**ragged(), **settings)
    assert torch.equal(specdec.generate(target, **ragged(), **settings, drafter=SmallModel(model)), expected)
    assert specdec.last_stats(target).acceptance_rate > 0.5


def test_its_float_weights_are_gone(model):
    with pytest.raises(UnsupportedOptionError, match="float weights are gone"):
        specdec.generate(model, ragged()["input_ids"][:1], max_new_tokens=4, drafter=QuantizedSelf())
    with pytest.raises(UnsupportedOptionError, match="stays float32 on the CPU"):
        model.half()
    assert specdec.prepare(model, weights="gguf") is model


def test_llama_3_s_frequencies_are_the_file_s(cache, model):
    path = cache / "factors.gguf"
    write_tiny_gguf(path, size=256, types=MIXED, seed=3, rope_factors=np.linspace(1, 8, 16, dtype=np.float32))
    changed = models.load(path, weights="gguf").model
    expected = model.model.rotary_emb.inv_freq / torch.linspace(1, 8, 16)
    torch.testing.assert_close(changed.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"types": {"attn_v": "Q2_K"}},
            r"blk\.0\.attn_v\.weight is of type Q2_K, .*--weights gguf\) out",
        ),
        ({"types": dict.fromkeys(["attn", "ffn", "token"], "F16")}, "none of its weights are quantised"),
        ({"architecture": "gpt2"}, "its architecture is gpt2"),
        ({"extra": "blk.0.ffn_gate_exps.weight"}, "ffn_gate_exps.weight, which is no part of the layers"),
    ],
)
def test_what_cannot_be_executed_is_refused_before_anything_is_read(cache, monkeypatch, change, says):
    path = cache / f"{next(iter(change))}.gguf"
    write_tiny_gguf(path, size=256, **{"types": MIXED, **change})
    monkeypatch.setattr(GgufLinear, "__init__", None)
    monkeypatch.setattr(gguf_files, "describe", None)
    with pytest.raises(ModelError, match=says):
        models.load(path, weights="gguf")


def test_a_damaged_file_is_a_model_error(file, cache):
    path = cache / "short.gguf"
    path.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ModelError, match="ends beyond the end of the file"):
        models.load(path, weights="gguf")


def test_a_folder_and_another_dtype_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"executes the blocks of a \.gguf file"):
        models.load(tmp_path, weights="gguf")
    with pytest.raises(ValueError, match="leave dtype and device out"):
        models.load(tmp_path / "x.gguf", weights="gguf", dtype="bfloat16")
