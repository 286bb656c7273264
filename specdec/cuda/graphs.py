"""Capture and replay of a function of static tensors, and a stand-in that finds what a graph would get wrong.

What a graph returns lies in memory that all graphs of a pool share: it holds until the next replay of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
_stands_in: ContextVar[bool] = ContextVar("stands_in", default=False)
_WARM_UPS = 2
"""Calls before a capture: libraries allocate their workspaces in the first."""


class GraphPool(Protocol):
    """Makes graphs that share their memory."""

    def capture(self, run: Callable[[], Outputs], inputs: Sequence[Tensor]) -> Graph:
        """
        Args:
            run: reads the inputs and whatever else stays where it is; returns new tensors.
            inputs: tensors whose addresses have to stay the same.
        """
        ...


class Graph(Protocol):
    """Captured once."""

    def replay(self) -> Outputs:
        """What the function returns for what its inputs hold now."""
        ...


def graphs_for(device: torch.device) -> type[GraphPool] | None:
    """The kind of graphs for a device; None where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return CudaGraphPool
    return StandInPool if _stands_in.get() else None


@contextmanager
def standing_in() -> Iterator[None]:
    """For tests: within, models on any device get the stand-in for graphs."""
    token = _stands_in.set(True)
    try:
        yield
    finally:
        _stands_in.reset(token)


class CudaGraphPool:
    """Of one model."""

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Outputs], inputs: Sequence[Tensor]) -> Graph:
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                expected = run()
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        return _CudaGraph(run, expected, self._handle)


class _CudaGraph:
    def __init__(self, run: Callable[[], Outputs], expected: Outputs, pool: Any):
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run()
        check_replay(self.replay(), expected)

    def replay(self) -> Outputs:
        self._graph.replay()
        return self._outputs


class StandInPool:
    """Calls the function again, and spoils what a graph would: other outputs of the pool."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.num_replays = 0

    def capture(self, run: Callable[[], Outputs], inputs: Sequence[Tensor]) -> Graph:
        return _StandIn(self, run, inputs)


class _StandIn:
    def __init__(self, pool: StandInPool, run: Callable[[], Outputs], inputs: Sequence[Tensor]):
        self._pool, self._run, self._inputs = pool, run, inputs
        self._addresses = [tensor.data_ptr() for tensor in inputs]
        expected = run()
        with torch.inference_mode(False):  # a graph's output is not written to by PyTorch
            self._outputs = tuple(output.clone() for output in expected)
        pool.outputs += self._outputs
        check_replay(self.replay(), expected)

    def replay(self) -> Outputs:
        assert [tensor.data_ptr() for tensor in self._inputs] == self._addresses, "an input of the graph has moved"
        for output in self._pool.outputs:
            output.fill_(torch.nan if output.is_floating_point() else torch.iinfo(output.dtype).min)
        self._pool.num_replays += 1
        return tuple(output.copy_(part) for output, part in zip(self._outputs, self._run(), strict=True))


def check_replay(replayed: Outputs, expected: Outputs) -> None:
    """Raise `RuntimeError` if a replay does not give what the function gave: then it is not one of its inputs alone."""
    for output, part in zip(replayed, expected, strict=True):
        if output.is_floating_point():
            is_same = torch.allclose(output, part, rtol=1e-2, atol=1e-2 * float(part.abs().max()))
        else:
            is_same = torch.equal(output, part)
        if not is_same:
            raise RuntimeError("a replayed forward gives other logits than the forward that was captured")
