"""Routers on the command line: calibrated, and measured beside lossless methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.bench.routed import ROUTERS, RouterSpec
from tests.support.commands import specdec_command

FAST = ("--max-new-tokens", "8", "-r", "1", "--warmup", "0", "--limit", "1")


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": text, "prompt": text}) + "\n" for text in ("one", "two")))
    return str(path)


def test_bench_measures_routers_beside_lossless_methods(tiny: str, problems: str) -> None:
    shared = "self-confidence:threshold=0.5:look_every=2:shares_cache=true:lookahead=2"
    specs = ("--router", "random:escalation_rate=0.5", "--router", shared)
    options = ("--prompts", problems, "--methods", "plain", *specs, *FAST)
    result = specdec_command("bench", "-m", tiny, *options, "--json")
    assert result.exit_code == 0, result.output
    methods = {row["name"]: row for row in json.loads(result.stdout)["methods"]}
    lossy = [name for name in methods if name.endswith(" LOSSY")]
    assert lossy == [f"{spec} LOSSY" for spec in specs[1::2]]
    assert {methods[name]["identical_to_plain"] for name in lossy} == {None}, "nobody promises that"
    assert methods["plain"]["identical_to_plain"]
    told = ("target_step_share", "target_token_share", "vain_tokens_per_token", "router_us_per_step")
    assert all(methods[name][field] >= 0 for name in lossy for field in told)
    assert all(methods["plain"][field] is None for field in told)
    table = specdec_command("bench", "-m", tiny, *options, "-o", "md")
    assert table.stdout.count("LOSSY") >= 2 * 3, "in every table"
    assert "in vain" in table.stdout
    assert table.stdout.rstrip().endswith("another text than the target's")


def test_a_draft_writes_the_steps_if_there_is_one(tiny: str, tiny_draft: str, problems: str) -> None:
    router = ("--router", "first-token-entropy:escalation_rate=0.5")
    options = ("--prompts", problems, "--methods", "plain", *router, *FAST, "--json")
    for writer in ((), ("--step-writer", "quantized-self")):
        result = specdec_command("bench", "-m", tiny, "--draft", tiny_draft, *options, *writer)
        assert result.exit_code == 0, result.output
        assert sum(row["name"].endswith("LOSSY") for row in json.loads(result.stdout)["methods"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--router", "oracle"), "unknown router 'oracle'; choose from: self-confidence"),
        (("--router", "self-confidence"), "either a threshold or an escalation_rate"),
        (("--router", "random:escalation_rate=2"), "share of steps"),
        (("--router", "random:rate=0.5"), "it takes: escalation_rate, seed, lookahead, shares_cache"),
        (("--router", "random:escalation_rate=1:lookahead=0"), "a positive number of steps"),
        (("--step-writer", "quantized-self"), "give --router too"),
        (("--router", "random:escalation_rate=0.5", "--step-writer", "plain"), "unknown step writer"),
        (("--router", "random:escalation_rate=0.5", "--step-writer", "small-model"), "give it with --draft"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(options: tuple[str, ...], message: str) -> None:
    result = specdec_command("bench", "-m", "no/such/model", *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("random", "self-score", "arbitrage")])
def test_routers_by_name(name: str) -> None:
    spec = RouterSpec.parse(f"{name}:escalation_rate=0.25")
    assert spec.build().gate.budget.rate == 0.25
    assert spec.build() is not spec.build(), "a rate is held by one instance"


@pytest.mark.parametrize("name", ["self-confidence", "first-token-entropy"])
def test_a_calibrated_threshold_holds_its_rate(tiny: str, problems: str, name: str) -> None:
    options = ("--data", problems, "--router", name, "--rate", "0.5", "-n", "24", "--json")
    result = specdec_command("calibrate-router", "-m", tiny, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_problems"] == 2
    assert found["num_steps"] >= 2
    assert abs(found["escalation_rate"] - 0.5) <= 1 / found["num_steps"]
    assert RouterSpec.parse(found["router"]).build().gate.threshold == pytest.approx(found["threshold"], rel=1e-3)


def test_a_router_without_a_threshold_is_not_calibrated(tiny: str, problems: str) -> None:
    result = specdec_command("calibrate-router", "-m", tiny, "--data", problems, "--router", "random")
    assert result.exit_code == 2
    assert "unknown router to calibrate 'random'" in " ".join(result.output.split())
