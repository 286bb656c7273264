"""What drafting from an exit costs on this machine, in the same terms as `Auto`'s forwards.

Shape legend: B rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import get_clock_info, perf_counter, thread_time
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdec.control import ForwardCosts, costs_of
from specdec.control.costs import WIDTHS
from specdec.drafters.early_exit.heads import ExitHead
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.model import TreeModel

_CONTEXT = 32
"""Tokens before the ones that are timed."""
_REPETITIONS = 4


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of work on this device: on a CPU those of the calling thread, to which other programs add nothing."""
    if device.type == "cuda":
        return _finished_time
    is_fine = get_clock_info("thread_time").resolution < 1e-5
    return thread_time if device.type == "cpu" and is_fine else perf_counter


def _finished_time() -> float:
    torch.cuda.synchronize()
    return perf_counter()


class ExitCosts:
    """Seconds of a round's parts, for all rows together; measured once, and corrected by every round.

    Args:
        target: of whole forwards.
        steps: seconds of a draft step by its depth, which is the exit's number of layers and one more for the head.
        num_rows: of the batch.

    Attributes:
        forward: of a round's verification, by tokens. Not the target's own costs: above an exit fewer layers are left,
            and what is left takes more calls.
    """

    def __init__(self, target: ForwardCosts, steps: dict[int, float], num_rows: int):
        self.forward = ForwardCosts({width: target.measured(width) for width in WIDTHS}, plain=num_rows)
        self._steps = ForwardCosts(steps, plain=min(steps))

    def step_seconds(self, exit_layer: int) -> float:
        return self.forward.drift * self._steps.seconds(exit_layer + 1)

    def note_step(self, exit_layer: int, seconds: float) -> None:
        """What a step took beyond what the machine makes of all forwards now."""
        self._steps.note(exit_layer + 1, seconds / self.forward.drift)


_measured: WeakKeyDictionary[ForwardCosts, dict[object, ExitCosts]] = WeakKeyDictionary()
"""By the target's own costs: there are others when it is prepared otherwise, moved, or given other threads."""


def exit_costs(target: TreeModel, heads: Sequence[ExitHead], num_rows: int) -> ExitCosts:
    """The costs of these exits, measured when they are first asked for.

    Args:
        heads: of the candidates, in increasing order.
    """
    costs = costs_of(target.model, num_rows)
    known, kinds = _measured.setdefault(costs, {}), tuple((head.layer, type(head)) for head in heads)
    if kinds not in known:
        known[kinds] = ExitCosts(costs, _measure_steps(target, heads, num_rows), num_rows)
    return known[kinds]


@torch.no_grad()
def _measure_steps(target: TreeModel, heads: Sequence[ExitHead], num_rows: int) -> dict[int, float]:
    """Depth -> seconds of a draft step from the lowest and from the highest exit: the shortest of a few.

    What is between follows from these, as all heads of a run are alike.
    """
    scratch = TreeModel(target.model)
    context = max(min(_CONTEXT, position_limit(target.model) - 2), 1)
    scratch.prefill(torch.zeros((num_rows, context), dtype=torch.long, device=scratch.device))
    steps = {head.layer + 1: _step(head, scratch, num_rows) for head in (heads[0], heads[-1])}
    seconds = dict.fromkeys(steps, float("inf"))
    clock = clock_of(scratch.device)
    for _ in range(_REPETITIONS):
        for depth, step in steps.items():
            started = clock()
            step()
            seconds[depth] = min(seconds[depth], clock() - started)
            scratch.forget_tail()
    return seconds


def _step(head: ExitHead, scratch: TreeModel, num_rows: int) -> Callable[[], Tensor]:
    tokens_B1 = torch.zeros((num_rows, 1), dtype=torch.long, device=scratch.device)
    score = head.timing_run(scratch, num_rows)
    if head.layer == 0:
        return lambda: score(scratch.embed(tokens_B1))
    return lambda: score(scratch.forward_below(head.layer, tokens_B1, tokens_B1, None))
