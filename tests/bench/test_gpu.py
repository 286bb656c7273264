"""The script for a GPU, on a CPU and with a stand-in for graphs."""

from __future__ import annotations

import json
import sys

import pytest

from bench import gpu
from specdec.cuda.graphs import standing_in

TINY = ["--device", "cpu", "--shape", "tiny", "--tokens", "6", "--prompt", "20", "--repetitions", "1"]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, dict]:
    monkeypatch.setattr(sys, "argv", ["gpu", *TINY, *options])
    with standing_in():
        gpu.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, capsys)
    assert {"memory", "plain", "lookup", "assisted", "batch of 4", "batch of 16", "int4"} <= found.keys()
    assert found["graphs"]["replays"] > 0
    assert found["graphs"]["refused"] is None
    assert found["plain"]["specdec, plain"]["share_of_copy_bandwidth"] > 0
    assert found["assisted"]["specdec, small model"]["verdict"] in ("identical", "tie")
    assert found["int4, as a draft"]["specdec, copy of 4 bits drafts"]["verdict"] in ("identical", "tie")
    assert "no measurements" in found["device"]


def test_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, capsys, "--parts", "bits")
    assert found["bits, 4 rows"].keys() == {
        *(
            "specdec, plain",
            "specdec, prompt lookup",
            "specdec, plain of one shape",
            "specdec, prompt lookup of one shape",
        )
    }


def test_a_part_after_the_budget_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = run(monkeypatch, capsys, "--parts", "memory,plain", "--seconds", "-1")
    assert found["left_out"] == ["memory", "plain"]
