"""The kernels against their naive twins, and prepared models against unprepared ones. Tiny models, no downloads."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from specdec import kernels
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.hf import CACHE
from specdec.kernels import native
from specdec.kernels.model import layer as layers
from specdec.kernels.model import linear as linears
from specdec.kernels.model.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear

prepare_module = importlib.import_module("specdec.kernels.model.prepare")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0]}),
}

needs_native = pytest.mark.skipif(native.library() is None, reason=native.describe())


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test sets is undone; torch's own small operators are slow on several threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(family="llama", **changes):
    config, architecture, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = architecture(config(**{**SIZES, **extra, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms start as 0 and 1, which would hide a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name:
                parameter.mul_(3)
    return model.requires_grad_(False)


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch):
    """Each test once with native kernels and once as on a machine without a compiler; no timing decides anything."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(native.describe())
    choice = linears.NATIVE if request.param == "native" else linears.TURNED
    monkeypatch.setattr(prepare_module, "calibrate", lambda _: dict.fromkeys(linears.BANDS, choice))
    return request.param


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---- linears ----


def test_int8_is_close_to_float(backend):
    linear, x_MK = nn.Linear(576, 192), torch.randn(9, 576)
    assert relative(Int8Linear(linear)(x_MK), linear(x_MK)) < 0.01


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 31, 32, 33])
def test_small_batch_float_is_within_rounding_of_torch(backend, num_rows):
    model = nn.Sequential(nn.Linear(96, 130)).requires_grad_(False)
    x = torch.randn(num_rows, 1, 96)
    expected = model(x)
    assert relative(kernels.prepare(model)(x), expected) < 1e-5


def test_training_still_works_on_a_float_prepared_model():
    model = make_model().requires_grad_(True)
    ids = torch.randint(1, 300, (1, 6))
    model(ids, labels=ids).loss.backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    kernels.prepare(model)(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected)


# ---- attention ----


# ---- whole models ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_float_model_is_the_model(backend, family, implementation):
    model = make_model(family, attn_implementation=implementation)
    ids = torch.randint(1, 300, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    expected, expected_padded = model(ids).logits, model(ids, attention_mask=padding).logits
    generated = model.generate(ids, attention_mask=padding, max_new_tokens=12, do_sample=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    assert kernels.prepare(model) is model
    assert model._specdec_prepared.num_fused_layers == (2 if backend == "native" else 0)
    assert relative(model(ids).logits, expected) < 1e-5
    assert relative(model(ids, attention_mask=padding).logits[1, 4:], expected_padded[1, 4:]) < 1e-5
    assert torch.equal(model.generate(ids, attention_mask=padding, max_new_tokens=12, do_sample=False), generated)

    kernels.unprepare(model)
    assert torch.equal(model(ids).logits, expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.05), ("int4", 0.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_is_close_and_its_rows_are_exact(backend, family, weights, bound):
    """A chain or a tree verified at once gives the very logits of decoding its tokens one by one."""
    model, ids = make_model(family), torch.randint(1, 300, (1, 9))
    expected = model(ids).logits
    kernels.prepare(model, weights)
    logits = model(ids).logits
    assert relative(logits, expected) < bound
    if backend == "native":
        cache = None
        for t in range(9):
            step = model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True)
            cache = step[CACHE]
            assert torch.equal(step.logits[:, 0], logits[:, t])


def to_nearest_of_16(weight_NK):
    """The nearest of 16 numbers between the lowest and the highest of each 32 inputs."""
    group_NGK = weight_NK.unflatten(1, (-1, 32))
    low_NG1, high_NG1 = group_NGK.amin(2, keepdim=True), group_NGK.amax(2, keepdim=True)
    step_NG1 = (high_NG1 - low_NG1) / 15
    return (((group_NGK - low_NG1) / step_NG1).round() * step_NG1 + low_NG1).flatten(1)


def test_int4_logits_are_nearer_than_those_of_rounded_weights(backend):
    sizes = {"hidden_size": 192, "intermediate_size": 256}
    model, ids = make_model(**sizes), torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, rounded = model(ids).logits, make_model(**sizes)
    for layer in rounded.model.layers:
        for part in layer.modules():
            if isinstance(part, nn.Linear):
                part.weight.copy_(to_nearest_of_16(part.weight))
    logits = kernels.prepare(model, "int4")(ids).logits
    assert relative(logits, expected) < 0.97 * relative(rounded(ids).logits, expected)


def test_the_lm_head_of_an_int4_model_has_8_bits(backend):
    model = kernels.prepare(make_model(), "int4")
    kinds = {type(part) for part in model.modules() if isinstance(part, QuantizedLinear)}
    assert kinds == {Int4Linear, Int8Linear}
    assert type(model.lm_head) is Int8Linear
    assert all(type(layer.mlp.up_proj) is Int4Linear for layer in model.model.layers)


def test_what_drafts_beside_an_int4_model_has_8_bits(backend):
    """Nobody knows which of its linears is a head."""
    part = kernels.prepare_like(nn.Sequential(nn.Linear(96, 96)), kernels.prepare(make_model(), "int4"))
    assert type(part[0]) is Int8Linear


@needs_native
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_a_tree_is_verified_to_the_bit(backend, weights):
    """Two branches in one forward, against each branch decoded alone."""
    model = kernels.prepare(make_model("qwen2"), weights)
    prompt, branches = torch.randint(1, 300, (1, 6)), [[11, 12, 13], [21, 22]]
    flat = torch.tensor([[11, 21, 12, 22, 13]])
    parents = [-1, -1, 0, 1, 2]
    mask = torch.ones(5, 11, dtype=torch.bool).tril(6)
    mask[:, 6:] = False
    for node in range(5):
        ancestor = node
        while ancestor >= 0:
            mask[node, 6 + ancestor] = True
            ancestor = parents[ancestor]
    positions = torch.tensor([[6, 6, 7, 7, 8]])
    past = model(prompt, use_cache=True)[CACHE]
    tree = model(flat, attention_mask=mask[None, None], position_ids=positions, **{CACHE: past}).logits[0]
    for branch, nodes in zip(branches, ([0, 2, 4], [1, 3]), strict=True):
        past = model(prompt, use_cache=True)[CACHE]
        for token, node in zip(branch, nodes, strict=True):
            out = model(torch.tensor([[token]]), **{CACHE: past}, use_cache=True)
            if backend == "native":
                assert torch.equal(out.logits[0, 0], tree[node])
            else:
                assert relative(out.logits[0, 0], tree[node]) < 0.05


@needs_native
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_tree_wider_than_small_batches_is_exact_too(backend, weights):
    """Once layers of more than 64 rows went to torch, which rounds otherwise: trees of 64 nodes said something else."""
    model, ids = kernels.prepare(make_model(), weights), torch.randint(1, 300, (1, 130))
    wide, narrow = model(ids).logits[:, :5], model(ids[:, :5]).logits
    assert torch.equal(wide, narrow) if backend == "native" else relative(wide, narrow) < 0.05


@needs_native
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fused_layers_match_the_module_wise_quantized_model(weights):
    model, ids = (
        kernels.prepare(make_model("qwen3", attn_implementation="eager"), weights),
        torch.randint(1, 300, (3, 7)),
    )
    fused = model(ids).logits
    module_wise = model(ids, output_attentions=True)  # asks for what fused layers do not have
    assert relative(fused, module_wise.logits) < 0.02
    assert len(module_wise.attentions) == 2


def test_wide_forwards_take_the_original_path(backend):
    model, ids = make_model(), torch.randint(1, 300, (2, 50))
    expected = model(ids).logits
    assert relative(kernels.prepare(model)(ids).logits, expected) < 1e-5
    kernels.prepare(model, "int8")
    assert relative(model(ids).logits, expected) < 0.05


def test_hidden_states_and_static_caches_work(backend):
    model, ids = make_model(), torch.randint(1, 300, (2, 9))
    expected = model(ids, output_hidden_states=True).hidden_states
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    generated = model.generate(ids, **options)
    kernels.prepare(model)
    actual = model(ids, output_hidden_states=True).hidden_states
    assert all(relative(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))
    assert torch.equal(model.generate(ids, **options), generated)


def test_a_layer_that_computes_something_else_is_left_alone(backend):
    """The structure may fit and the formula not (a norm with weight + 1, say): the self-check tells."""
    model = make_model()
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda x: nn.functional.rms_norm(x, x.shape[-1:], norm.weight + 1, norm.variance_epsilon)
    ids = torch.randint(1, 300, (1, 7))
    expected = model(ids).logits
    kernels.prepare(model)
    assert model._specdec_prepared.num_fused_layers == (1 if backend == "native" else 0)
    assert relative(model(ids).logits, expected) < 1e-5


def test_gpt2_is_prepared_only_where_it_has_linears(backend):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (1, 5))
    expected = model(ids).logits
    kernels.prepare(model)  # its LM head; Conv1D stays
    assert relative(model(ids).logits, expected) < 1e-5
    assert model._specdec_prepared.num_linears == 1
    with pytest.raises(UnsupportedModelError, match="Conv1D"):
        kernels.prepare(nn.LayerNorm(4))


def test_prepare_is_idempotent_and_int8_is_final(backend):
    model = kernels.prepare(kernels.prepare(make_model()))
    kernels.prepare(model, "int8")
    names = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert names == {"embed_tokens"}, "all other float weights are gone"
    assert model.get_output_embeddings().__class__ is Int8Linear
    assert model.get_input_embeddings().weight.dtype is torch.float32, "tied embeddings stay float"
    state = model._specdec_prepared
    assert kernels.prepare(model, "int8")._specdec_prepared is state
    with pytest.raises(UnsupportedOptionError, match="reload"):
        kernels.unprepare(model)
    with pytest.raises(UnsupportedOptionError, match="reload"):
        kernels.prepare(model)


def test_unknown_options_are_refused():
    for options in ({"weights": "int3"}, {"weights": "stock"}, {"compile": True}):
        with pytest.raises(UnsupportedOptionError):
            kernels.prepare(make_model(), **options)


def test_bfloat16_model_becomes_int8_and_float32(backend):
    model, ids = make_model(), torch.randint(1, 300, (1, 5))
    expected = model(ids).logits
    model = kernels.prepare(model.to(torch.bfloat16), "int8")
    assert model(ids).logits.dtype is torch.float32
    assert relative(model(ids).logits, expected) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_are_nearer_to_float32_and_their_rows_are_exact(family):
    """Weights stay in two bytes; a chain or a tree verified at once gives the very logits of its tokens one by one."""
    if native.library() is None:
        pytest.skip(native.describe())
    model, ids = make_model(family).to(torch.bfloat16), torch.randint(1, 300, (1, 70))
    expected, own = copy.deepcopy(model).float()(ids).logits, model(ids).logits
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    kernels.prepare(model)
    assert model._specdec_prepared.num_fused_layers == 2
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    logits, cache = model(ids).logits, None
    assert logits.dtype is torch.bfloat16
    assert relative(logits.float(), expected) < relative(own.float(), expected)
    for t in range(9):
        step = model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True)
        cache = step[CACHE]
        assert torch.equal(step.logits[:, 0], logits[:, t])

    model.model.layers[1].input_layernorm.weight.mul_(2)  # of which the kernels read a copy
    assert not torch.equal(model(ids).logits, logits)
    model.model.layers[1].input_layernorm.weight.div_(2)
    assert torch.equal(model(ids).logits, logits)
    kernels.unprepare(model)
    assert torch.equal(model(ids).logits, own)


def test_quantized_copy_shares_what_it_can(backend):
    model, ids = make_model("qwen2"), torch.randint(1, 300, (1, 5))
    expected = model(ids).logits
    quantized = kernels.quantized_copy(model)
    assert torch.equal(model(ids).logits, expected), "the original is as it was"
    assert relative(quantized(ids).logits, expected) < 0.05
    assert quantized.get_input_embeddings().weight is model.get_input_embeddings().weight
    again = kernels.quantized_copy(kernels.prepare(model))
    assert torch.equal(again(ids).logits, quantized(ids).logits)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_a_deep_copy_is_independent(backend, weights):
    model, ids = kernels.prepare(make_model(), weights), torch.randint(1, 300, (1, 5))
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids).logits, expected)


# ---- the library itself ----


def test_without_a_compiler_everything_works(tmp_path):
    """In a fresh process with an empty PATH and an empty cache: torch does the work, and says so."""
    code = (
        "import torch; from specdec import kernels\n"
        "from specdec.kernels.model.quantized_linear import Int8Linear\n"
        "linear = torch.nn.Linear(64, 64); x = torch.randn(2, 64)\n"
        "print(kernels.describe()); print((Int8Linear(linear)(x) - linear(x)).norm().item() < 0.1)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first.startswith("torch kernels, no native ones: ")
    assert second == "True"


def test_thread_calibration_measures_and_restores():
    before = torch.get_num_threads()
    assert 1 <= kernels.calibrate_threads(make_model()) <= (os.cpu_count() or 1)
    assert torch.get_num_threads() == before


def test_exported_names():
    expected = ["calibrate_threads", "describe", "prepare", "prepare_like", "prepared", "quantized_copy", "unprepare"]
    assert sorted(kernels.__all__) == expected
    assert layers.is_supported(make_model().model.layers[0]) is False, "not before its linears are prepared"
