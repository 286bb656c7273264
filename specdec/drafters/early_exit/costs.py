"""What drafting from an exit costs on this machine, in the same terms as `Auto`'s forwards.

Shape legend: B rows, T slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import get_clock_info, perf_counter, thread_time

import torch

from specdec.control import ForwardCosts
from specdec.control.costs import measuring, varied_tokens
from specdec.cuda import GraphedExitModel, exit_model_of
from specdec.cuda.arena import USES, Arena
from specdec.drafters.early_exit.heads import ExitHead
from specdec.kernels import prepared
from specdec.kernels.model.profile import profile_of
from specdec.stages import stage
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.model import TreeModel

_CONTEXT = 32
"""Tokens before the ones that are timed."""
_WIDTHS = (1, 2, 4, 8, 16)
"""Slots of a row in the verifications that are timed."""
_REPETITIONS = 4
_TIME_LIMIT_S = 1.0
"""No further repetition begins after this."""


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
        forward: seconds of a verification, by the tokens of all rows.
        steps: seconds of a draft step by its depth, which is the exit's number of layers and one more for the head.
        num_rows: of the batch.

    Attributes:
        forward: not what `Auto` knows of the target: above an exit fewer layers are left, in more calls.
    """

    def __init__(self, forward: Mapping[int, float], steps: Mapping[int, float], num_rows: int):
        self.forward = ForwardCosts(forward, plain=num_rows)
        self._steps = ForwardCosts(steps, plain=min(steps))

    def step_seconds(self, exit_layer: int) -> float:
        return self.forward.drift * self._steps.seconds(exit_layer + 1)

    def update_step(self, exit_layer: int, seconds: float) -> None:
        """What a step took, beyond what the machine makes of all forwards now."""
        self._steps.update(exit_layer + 1, seconds / self.forward.drift)


class _Measured(dict[object, ExitCosts]):
    """By what the costs of a model's exits depend on."""


def exit_costs(target: TreeModel, heads: Sequence[ExitHead], num_rows: int) -> ExitCosts:
    """The costs of these exits, measured when they are first asked for.

    Args:
        heads: of the candidates, in increasing order.
    """
    model = target.model
    kinds = tuple((head.layer, type(head)) for head in heads)
    key = kinds, num_rows, torch.get_num_threads(), model.dtype, target.device, prepared(model)
    known = profile_of(model).part(_Measured)
    with measuring:
        if key not in known:
            known[key] = _measure(target, heads, num_rows)
        return known[key]


@stage("timing exits")
@torch.no_grad()
def _measure(target: TreeModel, heads: Sequence[ExitHead], num_rows: int) -> ExitCosts:
    """Time verifications, and draft steps from the lowest and the highest exit: all heads of a run are alike."""
    scratch = exit_model_of(target.model, Arena())
    context = max(min(_CONTEXT, position_limit(target.model) - 2), 1)
    scratch.prefill(varied_tokens(scratch, num_rows, context))
    forward = _time({num_rows * width: partial(_verify, scratch, num_rows, width) for width in _WIDTHS}, scratch)
    steps = {head.layer + 1: _step(head, scratch, num_rows) for head in (heads[0], heads[-1])}
    return ExitCosts(forward, _time(steps, scratch), num_rows)


def _time(parts: Mapping[int, Callable[[], object]], scratch: EarlyExitModel) -> dict[int, float]:
    """The shortest of several interleaved runs of each part: a busy machine only ever adds."""
    for _ in range(USES if isinstance(scratch, GraphedExitModel) else 0):  # what is replayed is timed as a replay
        for part in parts.values():
            part()
            scratch.forget_tail()
    clock, began = clock_of(scratch.device), perf_counter()
    seconds = dict.fromkeys(parts, float("inf"))
    for repetition in range(_REPETITIONS):
        if repetition and perf_counter() - began > _TIME_LIMIT_S:
            break
        for name, part in parts.items():
            started = clock()
            part()
            seconds[name] = min(seconds[name], clock() - started)
            scratch.forget_tail()
    return seconds


def _verify(scratch: EarlyExitModel, num_rows: int, width: int) -> None:
    tokens_BT = varied_tokens(scratch, num_rows, width)
    order_BT = torch.arange(width, device=scratch.device).expand_as(tokens_BT)
    seen_BTT = None if width == 1 else order_BT[:, :, None] >= order_BT[:, None]
    scratch.forward(tokens_BT, torch.zeros_like(tokens_BT), seen_BTT)  # the model may not have so many positions


def _step(head: ExitHead, scratch: EarlyExitModel, num_rows: int) -> Callable[[], object]:
    tokens_B1 = varied_tokens(scratch, num_rows, 1)
    score = head.timing_run(scratch, num_rows)
    if head.layer == 0:
        return lambda: score(scratch.embed(tokens_B1))
    return lambda: score(scratch.forward_below(head.layer, tokens_B1, torch.zeros_like(tokens_B1), None))
