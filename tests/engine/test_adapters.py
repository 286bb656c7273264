"""Several LoRA adapters of one base in one engine: each row says what the model with its own adapter says."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("peft", reason="peft is not installed: pip install -e .[dev]")

import specdec
from specdec.drafters import Auto, Drafter, Plain, PromptLookup, SmallModel
from specdec.engine import Engine, Generation, LoraEngine, Request, load_adapters
from specdec.testing import tiny_model
from tests.support.engine_requests import BanAfter, alone, request_of
from tests.support.goodness import assert_drawn_from
from tests.support.sampled_rows import exact_distribution, tiny
from tests.support.wrapped import add_lora, bare

NAMES = (None, "pirate", "v1.5")  # a dot, which no module's name may have
PROMPTS = ([5, 6, 7, 5, 6, 7, 5], [9, 8, 7, 6, 5, 4, 3, 2, 9, 8, 7], [3, 4] * 9)
NUM_SEEDS = 150


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, as peft saves them."""
    found = {}
    for seed, name in enumerate(("pirate", "v1.5"), 1):
        found[name] = tmp_path_factory.mktemp("adapter")
        add_lora(bare(), "default", seed).save_pretrained(found[name])
    return found


def engine_on(model: PreTrainedModel, adapters: dict[str, str], drafter: Drafter, num_rows: int = 3) -> LoraEngine:
    def make(slots: int | None) -> Engine:
        return Engine(model, drafter=drafter, max_rows=num_rows, max_cached_tokens=slots)

    return LoraEngine(model, adapters, make, 3000)


@pytest.fixture(params=["stock", "float"])
def base(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[PreTrainedModel, dict[str, str]]:
    model = bare() if request.param == "stock" else specdec.prepare(bare(), weights="float")
    return model, load_adapters(model, folders)


def reference(model: PreTrainedModel, adapters: dict[str, str], request: Request) -> list[int]:
    """What the model says with the request's adapter, alone."""
    if request.adapter is None:
        model.disable_adapters()
        return alone(model, request)
    model.enable_adapters()
    model.set_adapter(adapters[request.adapter])
    said = alone(model, request)
    model.disable_adapters()
    return said


def requests(**options) -> list[Request]:
    own = [{}, {"repetition_penalty": 1.3}, {"processors": [BanAfter(7)]}]
    return [
        replace(request_of(prompt, max_new_tokens=10 + 3 * row, **own[row], **options), adapter=name)
        for row, prompt in enumerate(PROMPTS)
        for name in NAMES
    ]


def decode(engine: LoraEngine, asked: list[Request]) -> list[Generation]:
    """Some come while others are decoded."""
    generations = [engine.submit(request) for request in asked[:4]]
    for _ in range(5):
        engine.step()
    generations += [engine.submit(request) for request in asked[4:]]
    engine.run()
    return generations


@pytest.mark.parametrize(
    "drafter", [Plain(), PromptLookup(), Auto(), SmallModel(tiny_model("llama", seed=5))], ids=repr
)
def test_rows_of_several_adapters(base: tuple[PreTrainedModel, dict[str, str]], drafter: Drafter) -> None:
    model, adapters = base
    asked = requests()
    expected = [reference(model, adapters, request) for request in asked]
    by_adapter = {
        name: [said for said, request in zip(expected, asked, strict=True) if request.adapter == name] for name in NAMES
    }
    assert by_adapter[None] != by_adapter["pirate"] != by_adapter["v1.5"] != by_adapter[None], "adapters change nothing"
    engine = engine_on(model, adapters, drafter, num_rows=2)
    generations = decode(engine, asked)
    assert [generation.tokens for generation in generations] == expected
    assert engine.num_rows == engine.num_waiting == 0
    engine.close()
    assert alone(model, asked[0]) == expected[0], "the model is the base again"


def test_sampled_rows_depend_on_their_adapter_and_seed_only(base: tuple[PreTrainedModel, dict[str, str]]) -> None:
    model, adapters = base
    asked = requests(do_sample=True, seed=3)
    together = [generation.tokens for generation in decode(engine_on(model, adapters, PromptLookup()), asked)]
    singly = []
    for request in asked:
        one = engine_on(model, adapters, PromptLookup())
        generation = one.submit(request)
        one.run()
        one.close()
        singly.append(generation.tokens)
    assert together == singly


@pytest.mark.parametrize("drafter", [PromptLookup(num_tokens=2), SmallModel(tiny(5), num_tokens=2)], ids=repr)
def test_sampled_rows_have_the_distribution_of_the_model_with_their_adapter(drafter: Drafter) -> None:
    """Two tokens of each row of a ragged batch, all pairs enumerated by the model with that adapter alone."""
    model = tiny(0)
    adapters = {name: f"lora_{seed}" for seed, name in enumerate(NAMES[1:], 1)}
    for seed, name in enumerate(adapters.values(), 1):
        add_lora(model, name, seed)
    model.disable_adapters()
    prompts = ([1, 4, 2, 1, 4, 2, 1], [5, 3, 5])
    options = {"temperature": 1.2, "top_k": 0, "repetition_penalty": 1.3}
    expected = {}
    for name in NAMES:
        if name is not None:
            model.enable_adapters()
            model.set_adapter(adapters[name])
        for row, prompt in enumerate(prompts):
            expected[name, row] = exact_distribution(model, torch.tensor([prompt]), num_new=2, **options)
        model.disable_adapters()
    engine = engine_on(model, adapters, drafter, num_rows=6)
    drawn = defaultdict(list)
    for seed in range(NUM_SEEDS):
        for row, prompt in enumerate(prompts):
            for name in NAMES:
                asked = request_of(prompt, seed=seed, do_sample=True, max_new_tokens=2, **options)
                drawn[name, row].append(engine.submit(replace(asked, adapter=name)))
        engine.run()
    engine.close()
    for case, generations in drawn.items():
        assert_drawn_from([tuple(generation.tokens) for generation in generations], expected[case], str(case))
    with pytest.raises(AssertionError, match="chi-square"):  # it can tell one adapter from another
        assert_drawn_from([tuple(one.tokens) for one in drawn["pirate", 0]], expected["v1.5", 0])
    assert sum(one.stats.accepted for generations in drawn.values() for one in generations)


def test_a_cancelled_request_and_an_unknown_adapter(base: tuple[PreTrainedModel, dict[str, str]]) -> None:
    model, adapters = base
    engine = engine_on(model, adapters, Plain())
    assert engine.max_cached_tokens == 1000
    asked = requests()
    gone, stays = engine.submit(asked[1]), engine.submit(asked[2])
    engine.step()
    engine.cancel(gone)
    engine.run()
    assert (gone.finish_reason, stays.finish_reason) == ("cancelled", "length")
    with pytest.raises(ValueError, match="no adapter 'nobody': there are 'pirate'"):
        engine.submit(replace(asked[0], adapter="nobody"))
    engine.close()
    with pytest.raises(ValueError, match="this engine decodes with None"):
        Engine(model, drafter=Plain()).submit(asked[1])


def test_what_is_no_adapter_is_refused_before_anything_is_changed(tmp_path: Path, folders: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    model = bare()
    prompts = tmp_path / "prompts"
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4).save_pretrained(prompts)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folders["pirate"] / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"")
    for folder, message in (
        (pickled, "has no adapter_model.safetensors"),
        (tmp_path, "has no adapter_config.json"),
        (prompts, "only LoRA"),
        (tmp_path / "broken", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapters(model, {"pirate": folders["pirate"], "other": folder})
    assert not getattr(model, "peft_config", {})
    with pytest.raises(ValueError, match=r"'pirate' in .* does not fit"):
        load_adapters(tiny_model("gpt2"), {"pirate": folders["pirate"]})


def test_peft_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr("specdec.engine.adapters.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install peft"):
        load_adapters(bare(), folders)
