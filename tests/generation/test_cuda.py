"""On a GPU: the same tokens as `model.generate()` there, and what only a CPU can do is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import routers
import specdec
from specdec import UnsupportedModelError
from specdec.control.costs import measure_forwards
from specdec.cuda.arena import Arena
from specdec.cuda.attention import reference, tree_attention
from specdec.cuda.model import reads_all, why_not
from specdec.cuda.seen import Seen
from specdec.cuda.timing import DeviceSpan
from specdec.drafters import (
    Auto,
    Drafter,
    EarlyExit,
    ForeignModel,
    Mixed,
    Plain,
    PromptLookup,
    QuantizedSelf,
    SmallModel,
    SparseSelf,
)
from specdec.exits.module import Exit, load_exits, save_exits
from specdec.hf import CACHE
from specdec.kernels.model.profile import profile_of
from specdec.testing import ByteTokenizer, ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.testing.equality import TIE_BOUND
from specdec.training.heads.collect import self_generation
from specdec.training.heads.exits import ExitRecipe
from specdec.training.heads.run import ExitTraining, Source
from tests.support.goodness import assert_drawn_from
from tests.support.references import PartlyWrongScript, plain_alone, speculate, with_noise
from tests.support.tree_attention import SHAPES, given
from trees import Chain, DySpec, DySpecThreshold, Fixed, GrowthPolicy, Sequoia

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

NUM_NEW = 24
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of these models are around 10: neighbours in bfloat16 lie 0.06 apart, and layers add to that."""
    monkeypatch.setitem(TIE_BOUND, torch.bfloat16, 0.5)


def on_gpu(prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in prompts.items()}


@lru_cache
def target(dtype: torch.dtype = torch.float32, family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, dtype=dtype, num_hidden_layers=4).cuda()


@lru_cache
def draft(dtype: torch.dtype = torch.float32, device: str = "cuda") -> PreTrainedModel:
    return with_noise(tiny_model("llama", dtype=dtype, num_hidden_layers=4)).to(device)


def check(
    model: PreTrainedModel, drafter: Drafter, prompts: dict[str, Tensor] = RAGGED, **options: Any
) -> specdec.SpeculativeOutput:
    """Greedy, each row like the row alone."""
    prompts = on_gpu(prompts)
    expected = plain_alone(model, prompts, NUM_NEW)
    out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW, **options)
    assert out.sequences.device == prompts["input_ids"].device
    assert_same_tokens(model, expected, out.sequences, prompts["attention_mask"])
    return out


DRAFTERS: dict[str, Callable[[torch.dtype], Drafter]] = {
    "plain": lambda _: Plain(),
    "prompt lookup": lambda _: PromptLookup(),
    "prompt lookup, tree": lambda _: PromptLookup(),
    "small model": lambda dtype: SmallModel(draft(dtype)),
    "early exit": lambda _: EarlyExit(2),
    "early exit, adaptive": lambda _: EarlyExit(),
    "early exit, DEL": lambda _: EarlyExit(objective="tokens-per-layer"),
    "mixed": lambda dtype: Mixed([PromptLookup(), SmallModel(draft(dtype))]),
    "mixed, with an exit": lambda _: Mixed([PromptLookup(), EarlyExit(2)]),
    "auto": lambda _: Auto(),
    "auto, with a draft model": lambda dtype: Auto(SmallModel(draft(dtype))),
    "sparse self": lambda _: SparseSelf(budget=8),
    "foreign model": lambda dtype: ForeignModel(draft(dtype), ByteTokenizer(), ByteTokenizer()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter(name: str, dtype: torch.dtype) -> None:
    tree = {"tree": DySpec(8)} if name.endswith("tree") else {}
    for prompts in (RAGGED, ONE):
        check(target(dtype), DRAFTERS[name](dtype), prompts, **tree)


def test_every_drafter_is_in_the_list() -> None:
    """One that refuses has a test of its own."""
    made = {type(make(torch.float32)) for make in DRAFTERS.values()}
    assert {*made, QuantizedSelf} == {getattr(specdec.drafters, name) for name in _drafters()}


def _drafters() -> list[str]:
    exported = {name: getattr(specdec.drafters, name) for name in specdec.drafters.__all__}
    return [name for name, value in exported.items() if issubclass(value, Drafter) and value is not Drafter]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3", "mistral", "phi3", "opt"])
def test_families(family: str) -> None:
    model = tiny_model(family).cuda()
    script = PartlyWrongScript(plain_alone(model, on_gpu(RAGGED), NUM_NEW))
    out = check(model, ScriptedDrafter(script))
    assert out.stats.num_accepted == script.num_true > 0
    check(model, PromptLookup(), ONE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forwards_are_replayed(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype).cuda()
    for prompts in (ONE, RAGGED, ONE):
        check(model, PromptLookup(), prompts)
    assert why_not(model) is reads_all(model) is None
    assert profile_of(model).part(Arena).num_replays > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_tree_attention(name: str, dtype: torch.dtype) -> None:
    """The kernels, compiled, against their twin."""
    inputs = {key: part.cuda() if isinstance(part, Tensor) else part for key, part in given(name, dtype).items()}
    firsts_BW, lengths_B, bits_BW = (part.cuda() for part in inputs["seen"])
    inputs["seen"] = Seen(firsts_BW, lengths_B, bits_BW)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    actual, expected = tree_attention(**inputs), reference(**inputs)
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
    alone = Seen(firsts_BW[:, :1], lengths_B, bits_BW[:, :1])
    few = {**inputs, "queries_BQWD": inputs["queries_BQWD"][:, :, :1], "seen": alone}
    torch.testing.assert_close(tree_attention(**few), expected[:, :1], rtol=bound, atol=bound)


def test_time_is_the_devices() -> None:
    model = target()
    large = torch.randn(4096, 4096, device="cuda")
    span = DeviceSpan(large.device)
    for _ in range(20):
        large @ large
    span.end()
    assert span.seconds(on_host=0.0) > 0
    out = speculate(model, on_gpu(ONE), SmallModel(draft()), max_new_tokens=NUM_NEW)
    assert 0 < out.stats.draft_seconds < out.stats.total_seconds


def test_eager_attention() -> None:
    check(tiny_model("llama", attn_implementation="eager").cuda(), SmallModel(draft()), tree=DySpec(8))


POLICIES = [
    Chain(4),
    Fixed((3, 2, 1)),
    Sequoia(12, (0.5, 0.2, 0.1)),
    DySpec(12),
    DySpec(12, max_depth=3, shared=True),
    DySpecThreshold(threshold=0.05, max_nodes=12),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_growth_policy(policy: GrowthPolicy) -> None:
    out = check(target(), SmallModel(draft()), tree=policy)
    assert out.stats.num_accepted > 0


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_sampling_follows_the_generator(policy: GrowthPolicy, verify: str) -> None:
    outputs = [
        speculate(
            target(),
            on_gpu(RAGGED),
            SmallModel(draft()),
            max_new_tokens=NUM_NEW,
            do_sample=True,
            temperature=0.8,
            top_k=20,
            tree=policy,
            verify=verify,
            generator=torch.Generator("cuda").manual_seed(seed),
        ).sequences
        for seed in (0, 0, 1)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("verify", ["topdown", "traversal"])
@pytest.mark.parametrize("name", ["small model", "mixed", "early exit", "foreign model"])
def test_samples_have_the_targets_distribution(name: str, verify: str) -> None:
    """Of the second new token, which a draft was verified for; false alarm: `tests.support.goodness.FALSE_ALARM`."""
    model, num_rows = target(), 1500
    prompt = random_prompts([6])["input_ids"].cuda()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 4, "max_new_tokens": 3}
    prompts = {"input_ids": prompt.expand(num_rows, -1), "attention_mask": torch.ones_like(prompt).expand(num_rows, -1)}
    generator = torch.Generator("cuda").manual_seed(0)
    drafter = DRAFTERS[name](torch.float32)
    out = speculate(model, prompts, drafter, verify=verify, generator=generator, **settings)
    first = int(out.sequences[:, 6].mode().values)
    drawn = out.sequences[out.sequences[:, 6] == first][:, 7]
    read = torch.cat([prompt, torch.tensor([[first]], device="cuda")], 1)
    with torch.no_grad():
        top = (model(read).logits[0, -1].float() / 0.6).topk(4)
    expected = dict(zip(top.indices.tolist(), top.values.double().softmax(-1).tolist(), strict=True))
    assert_drawn_from(drawn.tolist(), expected)


def test_torchs_own_randomness_will_do() -> None:
    torch.manual_seed(0)
    first, second = (
        speculate(target(), on_gpu(RAGGED), SmallModel(draft()), do_sample=True).sequences for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_a_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.Generator\('cuda'\)"):
        speculate(target(), on_gpu(ONE), Plain(), do_sample=True, generator=torch.Generator())


def test_processors_that_look_at_the_prefix() -> None:
    prompts, settings = on_gpu(ONE), {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5}
    expected = target().generate(**prompts, max_new_tokens=NUM_NEW, do_sample=False, **settings)
    out = speculate(target(), prompts, SmallModel(draft()), tree=DySpec(8), max_new_tokens=NUM_NEW, **settings)
    assert_same_tokens(target(), expected, out.sequences, **settings)


def test_prompts_on_the_cpu_are_moved() -> None:
    """transformers warns of them, and fails."""
    out = speculate(target(), ONE, PromptLookup(), max_new_tokens=NUM_NEW)
    expected = plain_alone(target(), on_gpu(ONE), NUM_NEW)
    assert torch.equal(out.sequences.cpu(), expected.cpu())


WITH_A_MODEL: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "small model": SmallModel,
    "tree": SmallModel,
    "foreign model": lambda small: ForeignModel(small, ByteTokenizer(), ByteTokenizer()),
    "mixed": lambda small: Mixed([PromptLookup(), SmallModel(small)]),
    "auto": lambda small: Auto(SmallModel(small)),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", WITH_A_MODEL)
@pytest.mark.parametrize(("own", "other"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_draft_model_on_another_device(own: str, other: str, name: str, sampled: bool) -> None:
    model = target() if own == "cuda" else tiny_model("llama", num_hidden_layers=4)
    drafter = WITH_A_MODEL[name](draft(device=other))
    tree = {"tree": DySpec(8)} if name == "tree" else {}
    prompts = {key: tensor.to(own) for key, tensor in RAGGED.items()}
    if sampled:
        generator = torch.Generator(own).manual_seed(0)
        out = speculate(model, prompts, drafter, do_sample=True, generator=generator, **tree)
        assert out.sequences.shape[1] == prompts["input_ids"].shape[1] + 24
        return
    out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW, **tree)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out.sequences, prompts["attention_mask"])


@pytest.mark.parametrize("name", ["plain", "prompt lookup", "small model", "early exit", "auto"])
def test_a_target_split_over_devices(name: str) -> None:
    """Its first layers on the GPU, the others on the CPU, as `device_map` does it."""
    parts = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": 0,
        "model.layers.2": "cpu",
        "model.layers.3": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = dispatch_model(tiny_model("llama", num_hidden_layers=4), parts, main_device=0, force_hooks=True)
    check(model, DRAFTERS[name](torch.float32))


def test_the_gpu_holds_the_cache() -> None:
    cache = speculate(target(), on_gpu(RAGGED), SmallModel(draft()))[CACHE]
    assert {layer.keys.device.type for layer in cache.layers} == {"cuda"}


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streaming() -> None:
    streamers = Collected(), Collected()
    prompts, settings = on_gpu(ONE), {"max_new_tokens": NUM_NEW, "do_sample": False}
    target().generate(**prompts, **settings, streamer=streamers[0])
    speculate(target(), prompts, SmallModel(draft()), streamer=streamers[1])
    assert streamers[0].tokens == streamers[1].tokens


def test_routing() -> None:
    settings = {"max_new_tokens": 40, "do_sample": False, "tokenizer": ByteTokenizer()}
    steps = routers.Steps(separators=("a", "q", "z", "1", "\x80"), max_tokens=11)
    prompts = on_gpu(RAGGED)
    for device in ("cuda", "cpu"):
        out = specdec.generate(
            target(), **prompts, drafter=draft(device=device), router=routers.AlwaysTarget(steps=steps), **settings
        )
        assert_same_tokens(target(), plain_alone(target(), prompts, 40), out, prompts["attention_mask"])
    out = specdec.generate(
        target(), **prompts, drafter=draft(), router=routers.SelfScore(threshold=5, steps=steps), **settings
    )
    assert out.shape[0] == 4


def test_int8_is_refused() -> None:
    for call in (
        lambda: specdec.prepare(tiny_model("llama").cuda(), weights="int8"),
        lambda: SmallModel(tiny_model("llama").cuda(), weights="int8"),
        lambda: speculate(target(), on_gpu(ONE), QuantizedSelf()),
    ):
        with pytest.raises(UnsupportedModelError, match="on the CPU"):
            call()


def test_prepared_float_is_harmless() -> None:
    model = specdec.prepare(tiny_model("llama", num_hidden_layers=4).cuda())
    check(model, SmallModel(draft()))


def test_a_moved_model_is_measured_anew() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    speculate(model, ONE, Auto())
    check(model.cuda(), Auto())
    assert min(measure_forwards(model).values()) > 0


class TestExits:
    def test_trained_exits_draft(self, tmp_path: Path) -> None:
        model = target()
        torch.manual_seed(0)
        exits = [Exit(model, layer, torch.arange(0, 250, 2), window=8) for layer in (0, 2)]
        save_exits(tmp_path / "exits.safetensors", exits, model, {})
        for settings in ({"exit_layer": 2}, {"exit_layer": 0}, {}, {"objective": "tokens-per-layer"}):
            check(model, EarlyExit(exits=tmp_path / "exits.safetensors", **settings))
        speculate(model, on_gpu(RAGGED), EarlyExit(exits=tmp_path / "exits.safetensors"), do_sample=True)

    def test_training(self, tmp_path: Path) -> None:
        """A file that was trained on the GPU is read on the CPU."""
        out, source = tmp_path / "exits.safetensors", Source("test", self_generation(ByteTokenizer()), 8 * 48)
        recipe = ExitRecipe(layers=(0, 2), batch_rows=2, num_passes=3)
        training = ExitTraining(target(), source, recipe, out, length=48, num_rows=4)
        assert list(training.collect())
        agreements = [state.shown for state in training.train()]
        assert all(0 <= share <= 1 for shown in agreements for share in shown)
        assert [report.layer for report in training.finish()] == [0, 2]
        assert [exit_.layer for exit_ in load_exits(out, tiny_model("llama", num_hidden_layers=4))] == [0, 2]
