"""How often the host waits for a GPU in a round, counted on one that does not exist.

The fake registers its device with PyTorch for the life of a process, so it has processes of its own here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from specdec.testing.fake_gpu import FakeGpu

ROOT = Path(__file__).parents[2]


def in_a_process(function: Callable[[], None]) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(function).result()


def run_script(*options: str) -> dict[str, dict[str, int]]:
    """Greedy outputs are compared with the CPU's there."""
    command = [sys.executable, "-m", "bench.launches", "--json", *options]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    return run_script("--layers", "3")


def test_a_round_waits_once(counts: dict[str, dict[str, int]]) -> None:
    """For what was accepted. Trees whose shape depends on what is drawn wait for every layer besides, and chains that
    may end wherever an exit is unsure for every token."""
    waits = {name: each["syncs"] for name, each in counts.items()}
    grown = {name: number for name, number in waits.items() if "(16)" in name or name == "adaptive exit"}
    assert len(grown) > 3
    assert all(number == 1 for name, number in waits.items() if name not in grown), waits
    assert max(grown.values()) <= 8, waits


def test_what_is_uploaded_is_queued(counts: dict[str, dict[str, int]]) -> None:
    assert all(0 < each["queued_copies"] < each["launches"] for each in counts.values())


def test_a_replayed_round_is_as_long_for_any_number_of_layers() -> None:
    most = {"plain": 20, "early exit": 160}
    few, many = (run_script("--graphs", "--only", *most, "--layers", layers) for layers in "36")
    assert few == many
    assert all(few[kind]["launches"] < number and few[kind]["syncs"] == 1 for kind, number in most.items()), few


def _check_what_waits() -> None:
    cases: list[tuple[int, Callable[[torch.Tensor], object]]] = [
        (0, lambda x_N: x_N * 2 + x_N[1:2]),
        (0, lambda x_N: x_N[torch.zeros(2, dtype=torch.long, device=x_N.device)]),
        (0, lambda x_N: torch.zeros(3).pin_memory().to(x_N.device, non_blocking=True)),
        (0, lambda x_N: x_N.fill_(1.0)),
        (1, lambda x_N: torch.zeros(3).to(x_N.device)),
        (1, lambda x_N: torch.tensor([1, 2], device=x_N.device)),
        (1, lambda x_N: x_N[[0, 1]]),
        (1, lambda x_N: x_N[torch.tensor([0])]),
        (1, lambda x_N: x_N[x_N > 0]),
        (1, lambda x_N: bool((x_N > 0).all())),
        (1, lambda x_N: x_N.tolist()),
        (1, lambda x_N: x_N.cpu()),
        (1, lambda x_N: x_N.unique()),
        (2, lambda x_N: torch.multinomial(x_N, 1)),
    ]
    with torch.no_grad(), FakeGpu() as gpu:
        x_N = torch.arange(1.0, 4.0, device=gpu.device())
        for number, (waits, function) in enumerate(cases):
            gpu.forget()
            function(x_N)
            assert gpu.num_syncs == waits, (number, gpu.syncs)
        with pytest.raises(RuntimeError, match="of the host and of the GPU"):
            x_N + torch.ones(3)
        x_N[0] = 5
        assert x_N.tolist() == [5.0, 1.0, 1.0]


def test_the_fake_knows_what_waits() -> None:
    in_a_process(_check_what_waits)
