"""Time on a device that the host runs ahead of, and what forwards cost where they are graphs; with stand-ins."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

import specdec
from specdec.control.costs import ForwardCosts, costs_of, measure_forwards
from specdec.cuda import graphs, timing
from specdec.cuda.arena import Arena
from specdec.cuda.timing import DeviceSpan
from specdec.drafters import Auto, SmallModel
from specdec.drafters.auto import drafter as auto
from specdec.drafters.auto import sources
from specdec.drafters.auto.sources import ModelSource
from specdec.kernels.model.profile import profile_of
from specdec.testing import random_prompts, tiny_model
from tests.support.references import with_noise

CPU, PROMPT = torch.device("cpu"), random_prompts([12])
TICK = 1000.0
"""Seconds of the device between two events."""


class Ticking:
    """Events of a device that goes on by a tick for each."""

    def __init__(self) -> None:
        self.ticks, self.waits = count(), 0

    def __call__(self) -> Any:
        return _Event(self)


class _Event:
    def __init__(self, device: Ticking):
        self._device = device

    def record(self) -> None:
        self.at = next(self._device.ticks)

    def synchronize(self) -> None:
        self._device.waits += 1

    def elapsed_time(self, end_event: _Event) -> float:
        return 1000 * TICK * (end_event.at - self.at)


def test_spans() -> None:
    span = DeviceSpan(CPU)
    span.end()
    assert span.seconds(on_host=0.5) == 0.5
    with timing.standing_in(Ticking()):
        spans = [DeviceSpan(CPU), DeviceSpan(CPU)]
        for span in spans:
            span.end()
    assert [span.seconds(on_host=0.5) for span in spans] == [2 * TICK, 2 * TICK]


def test_a_calls_seconds_are_the_devices() -> None:
    model, settings = tiny_model("llama"), {"max_new_tokens": 12, "return_dict_in_generate": True}
    with timing.standing_in(Ticking()):
        stats = specdec.generate(model, **PROMPT, drafter=SmallModel(with_noise(model)), **settings).stats
    assert stats.draft_seconds == stats.verify_seconds == TICK * stats.num_rounds


def test_auto_learns_what_the_device_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draft; what the host took to launch it would be nearly nothing."""
    model, seen, learn = tiny_model("llama"), [], ModelSource.learn
    # drafts cost next to nothing beside the target, however busy the machine is: they have their turn
    for module in (auto, sources):
        monkeypatch.setattr(
            module, "costs_of", lambda asked, num_rows=1: ForwardCosts({1: 1.0 if asked is model else 1e-6})
        )
    monkeypatch.setattr(ModelSource, "learn", lambda *args: seen.append(args[3]) or learn(*args))
    with timing.standing_in(Ticking()):
        drafter = Auto(SmallModel(with_noise(model)))
        specdec.generate(model, **PROMPT, drafter=drafter, max_new_tokens=40, do_sample=False)
    assert min(seen) >= TICK  # where a copy of the target drafts for itself, there are spans within


class TestStaircase:
    def test_between_its_steps(self) -> None:
        costs = ForwardCosts(
            {1: 1.0, 4: 4.0, 8: 8.0}, filled_up=lambda num_tokens: {5: 8, 6: 8}.get(num_tokens, num_tokens)
        )
        assert [costs.seconds(num_tokens) for num_tokens in (4, 5, 6, 8)] == [4.0, 8.0, 8.0, 8.0]

    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_where_forwards_are_graphs(self, num_rows: int) -> None:
        model = tiny_model("llama")
        with graphs.standing_in():
            costs = costs_of(model, num_rows)
        assert costs.seconds(num_rows * 5) == costs.seconds(num_rows * 8)
        assert costs.seconds(num_rows * 3) == costs.seconds(num_rows * 4)
        assert costs_of(model, num_rows) is not costs

    def test_graphs_are_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of a cache of its own: a run may be under way."""
        model, arenas = tiny_model("llama"), []
        monkeypatch.setattr(Arena, "lease", lambda *args, lease=Arena.lease: arenas.append(args[0]) or lease(*args))
        with graphs.standing_in():
            assert min(measure_forwards(model).values()) > 0
        (arena,) = arenas
        assert arena.num_replays >= 6  # of one token, eight and sixteen: captured, and timed
        assert profile_of(model).part(Arena).num_replays == 0
