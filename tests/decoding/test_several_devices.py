"""One target on several devices, or in several processes: the same tokens as in one place, or a clear refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec import UnsupportedModelError
from specdec.drafters import Auto, EarlyExit, Mixed, PromptLookup, QuantizedSelf, SmallModel
from specdec.testing import assert_same_tokens, tiny_model
from tests.support.references import plain_alone, speculate, with_noise
from tests.support.split_run import NUM_NEW, PROMPTS

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def results(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process of a split run got."""
    folder = tmp_path_factory.mktemp("split")
    model.save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_PROCESSES}"]
    done = subprocess.run(
        [*command, "-m", "tests.support.split_run", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


@pytest.mark.ranks
def test_split_over_processes(model: PreTrainedModel, results: list[dict[str, Any]]) -> None:
    """Greedy output is plain decoding's in every process, whoever drafts."""
    reference = plain_alone(model, PROMPTS, NUM_NEW)
    greedy = {name: tokens for name, tokens in results[0]["tokens"].items() if name.startswith("greedy")}
    assert len(greedy) == 10
    for tokens in greedy.values():
        assert_same_tokens(model, reference, torch.tensor(tokens), PROMPTS["attention_mask"])


@pytest.mark.ranks
def test_all_processes_say_the_same(results: list[dict[str, Any]]) -> None:
    """With a seed, without one, and where the clock decides."""
    assert results[0]["tokens"] == results[1]["tokens"]
    tokens = results[0]["tokens"]
    assert tokens["sampled plain"] != tokens["greedy plain"]
    assert tokens["sampled plain"] == tokens["unseeded plain"]  # the first process has seed 0 both times


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("early exit", "UnsupportedModelError", "PromptLookup"),
        ("quantized self", "", "split over processes"),
        ("split draft", "DraftError", "load the draft without tp_plan"),
        ("broken drafter", "RuntimeError", "out of ideas"),
        ("engine", "UnsupportedModelError", "load it whole"),
        ("prepare", "UnsupportedModelError", "leave prepare"),
        ("router", "UnsupportedOptionError", "load it whole"),
    ],
)
def test_refusals_in_every_process(results: list[dict[str, Any]], name: str, error: str, reason: str) -> None:
    first, *others = (result["errors"][name] for result in results)
    assert error in first
    assert reason in first
    for other in others:
        assert other == first or "the first process has failed" in other


DEVICE_MAP = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
LONG = 40
"""Tokens: enough for `Auto` to think of an int8 copy of the target."""


@pytest.fixture(scope="module")
def mapped(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The model as `from_pretrained(device_map=...)` loads it: some layers in memory, some on the disk."""
    folder = tmp_path_factory.mktemp("mapped")
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE_MAP, offload_folder=folder / "offload")
    assert {weights.device.type for weights in loaded.parameters()} == {"cpu", "meta"}
    return loaded.eval()


@pytest.mark.parametrize(
    "name", ["default", "auto-small", "prompt-lookup", "small-model", "mapped draft", "mixed", "exit"]
)
def test_layers_by_device_map(model: PreTrainedModel, mapped: PreTrainedModel, name: str) -> None:
    """The target in parts, the draft whole; and a draft in parts."""
    draft, lookup = with_noise(model), PromptLookup(min_match=1)
    drafter = {
        "default": None,
        "auto-small": Auto(SmallModel(draft)),
        "prompt-lookup": lookup,
        "small-model": SmallModel(draft),
        "mapped draft": SmallModel(mapped),
        "mixed": Mixed([lookup, SmallModel(draft)]),
        "exit": EarlyExit(exit_layer=1),
    }[name]
    out = speculate(mapped, PROMPTS, drafter, max_new_tokens=LONG)
    assert_same_tokens(model, plain_alone(model, PROMPTS, LONG), out.sequences, PROMPTS["attention_mask"])
    assert name in ("default", "auto-small") or out.stats.num_drafted > 0


def test_what_layers_by_device_map_do_not_take(mapped: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="on the CPU"):
        speculate(mapped, PROMPTS, QuantizedSelf())
    with pytest.raises(UnsupportedModelError, match="on the CPU"):
        SmallModel(mapped, weights="int8")


def test_sampling_from_layers_by_device_map(model: PreTrainedModel, mapped: PreTrainedModel) -> None:
    outs = [
        speculate(each, PROMPTS, PromptLookup(min_match=1), do_sample=True, generator=torch.Generator().manual_seed(0))
        for each in (model, mapped)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
