"""A virtual clock, which only forwards move: for `bench.simulate_auto`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from specdec.control import ForwardCosts
from specdec.control.costs import WIDTHS, remember_costs


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of what a forward takes: log-normal, and now and then another program's doing.

    Args:
        sigma: standard deviation of the logarithm.
        slow_share: of forwards are slow: up to `slow_factor` times the others.
        switch_share: of forwards after which another program begins to take half of the core, or ends.
    """

    sigma: float
    slow_share: float
    slow_factor: float = 4.0
    switch_share: float = 0.0

    def draw(self, random: Random) -> float:
        factor = random.lognormvariate(-(self.sigma**2) / 2, self.sigma)
        return factor * random.uniform(1.5, self.slow_factor) if random.random() < self.slow_share else factor

    @property
    def mean(self) -> float:
        return 1 + self.slow_share * ((1.5 + self.slow_factor) / 2 - 1)


@dataclass(kw_only=True)
class Clock:
    """What `Auto` looks at, and, apart from it, what the same forwards take on average: that is scored."""

    noise: Noise
    random: Random
    now: float = 0.0
    expected: float = 0.0
    is_shared: bool = False

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        if self.random.random() < self.noise.switch_share:
            self.is_shared = not self.is_shared
        self.now += seconds * self.noise.draw(self.random) * (2 if self.is_shared else 1)
        self.expected += seconds * self.noise.mean


class Timed(nn.Module):
    """Stands for a model: it takes time, and that is all.

    Args:
        milliseconds: of a forward, by its number of tokens.
    """

    device = torch.device("cpu")
    dtype = torch.bfloat16

    def __init__(self, milliseconds: Mapping[int, float], clock: Clock):
        super().__init__()
        self._costs = ForwardCosts({width: each / 1000 for width, each in milliseconds.items()})
        self._clock = clock
        measured = {width: self.seconds(width) * clock.noise.draw(clock.random) for width in WIDTHS}
        remember_costs(self, measured)

    def seconds(self, width: int) -> float:
        return self._costs.measured(width)

    def run(self, width: int) -> None:
        self._clock.spend(self.seconds(width))
