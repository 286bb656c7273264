"""Graphs of functions of a few tensors, beside those of forwards: what is accepted of a draft, above all.

A function's inputs lie in buffers that all functions share, and so do the random numbers that it takes: these are drawn
before a replay, by the caller's generator and in the order in which the function would draw them. So a replay chooses
what the function would have chosen.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.cuda.graphs import Graph, GraphPool, graphs_for
from trees.randomness import Randomness, Tape

_logger = logging.getLogger("specdec")
_USES = 2
"""The call of a kind that captures it."""
_MOST_GRAPHS = 64
_MOST_BYTES = 1 << 26
"""Of a function's inputs: with larger ones the launches are not what takes the time."""

Function = Callable[[Sequence[Tensor], Randomness], Tensor]
"""Of static inputs and a source of random numbers; it asks no tensor for its values."""


@dataclass(slots=True)
class _Captured:
    graph: Graph
    inputs: list[Tensor]
    tape: Tape


class GraphedFunctions:
    """Of one model, for one run at a time.

    Attributes:
        num_replays: of all graphs so far.
    """

    def __init__(self) -> None:
        self.num_replays = 0
        self._pool: GraphPool | None = None
        self._graphs: dict[Hashable, _Captured] = {}
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._uses: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()

    def call(
        self,
        key: Hashable,
        function: Function,
        given: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """What a function makes of its inputs: int64, which holds until the next call.

        Args:
            key: of what the function does, and of the shapes and dtypes of its inputs.
            given: not written to.
            generator: of its random numbers; None for torch's global source.
        """
        if key in self._graphs:
            self.num_replays += 1
            return self._replay(self._graphs[key], given, generator)
        self._uses[key] += 1
        pool, is_small = graphs_for(given[0].device), sum(part.nbytes for part in given) <= _MOST_BYTES
        is_worth = self._uses[key] >= _USES and key not in self._refused and len(self._graphs) < _MOST_GRAPHS
        if pool is None or not is_worth or not is_small:
            return function(given, generator)
        tape = Tape(generator)
        result = function(given, tape)
        try:
            captured = self._capture(function, given, tape, pool)
            if not torch.equal(captured.graph.replay()[0], result):
                raise RuntimeError("a replay gives something else")
        except Exception as error:  # of PyTorch or of a processor: whatever it is, there is another way
            self._refused.add(key)
            _logger.warning("acceptance runs without a CUDA graph (%s: %s)", type(error).__name__, error)
        else:
            self._graphs[key] = captured
        return result

    def _replay(self, captured: _Captured, given: Sequence[Tensor], generator: torch.Generator | None) -> Tensor:
        _copy(captured.inputs, given)
        captured.tape.draw(generator)
        return captured.graph.replay()[0]

    def _capture(self, function: Function, given: Sequence[Tensor], tape: Tape, pool: type[GraphPool]) -> _Captured:
        self._pool = self._pool or pool()
        inputs = [self._static(place, part) for place, part in enumerate(given)]
        numbers = [self._static(place, part) for place, part in enumerate(tape.numbers, len(inputs))]
        _copy([*inputs, *numbers], [*given, *tape.numbers])
        tape.numbers = numbers

        def run() -> tuple[Tensor]:
            tape.rewind()
            return (function(inputs, tape),)

        return _Captured(self._pool.capture(run, [*inputs, *numbers]), inputs, tape)

    def _static(self, place: int, part: Tensor) -> Tensor:
        """A tensor of that shape in the buffer of a place, which grows when it has to: then graphs begin anew."""
        key = place, part.dtype
        if key not in self._buffers or self._buffers[key].numel() < part.numel():
            self._graphs.clear()
            size = 1 << math.ceil(math.log2(max(1, part.numel())))
            with torch.inference_mode(False):  # or no run outside of it could write to it
                self._buffers[key] = torch.empty(size, dtype=part.dtype, device=part.device)
        return self._buffers[key][: part.numel()].view(part.shape)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """In one launch what is of one dtype."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        pairs[target.dtype].append((target, source))
    for of_dtype in pairs.values():
        torch._foreach_copy_([target for target, _ in of_dtype], [source for _, source in of_dtype])
