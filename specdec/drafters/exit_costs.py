"""What the parts of a round cost on this machine, for the choice of an exit.

Shape legend: B rows, T slots, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from statistics import median
from time import get_clock_info, perf_counter, thread_time
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from specdec.compatibility import position_limit
from specdec.control.exits import ExitCosts
from specdec.drafters.exit_heads import ExitHead
from specdec.kernels import prepared
from specdec.target import TreeModel
from trees import TreeBatch

_CONTEXT = 32
"""Tokens before the ones that are timed."""
_REPETITIONS = 4
_MEMORY = 31
"""Rounds of a kind whose median corrects what was measured at the start."""


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of work on this device: on a CPU those of the calling thread, to which other programs add nothing."""
    if device.type == "cuda":
        return _finished_time
    is_fine = get_clock_info("thread_time").resolution < 1e-5
    return thread_time if device.type == "cpu" and is_fine else perf_counter


def _finished_time() -> float:
    torch.cuda.synchronize()
    return perf_counter()


@dataclass(frozen=True, eq=False)
class _Measured:
    """Costs from the start, and by how many seconds the last rounds went beyond them: drafting a token, a round without
    a draft, and all but the draft of a round with one."""

    costs: ExitCosts
    draft: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    drafted: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))


_measured: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], _Measured]] = WeakKeyDictionary()


class RoundCosts:
    """Costs measured once for a model, and corrected by its rounds, in all runs.

    Args:
        heads: of the candidate exits, in increasing order.
        max_length: longest draft.
    """

    def __init__(self, target: TreeModel, heads: Sequence[ExitHead], num_rows: int, max_length: int):
        self._excess = _measure_once(target, heads, num_rows, max_length)
        self._start = self._excess.costs
        self._places = {head.layer: place for place, head in enumerate(heads)}

    def note(self, exit_layer: int | None, steps: int, draft_seconds: float, drafted: int, rest_seconds: float) -> None:
        """A round took this long.

        Args:
            exit_layer: None if nothing was drafted.
            steps: forwards of the draft, which took `draft_seconds`; 0 if those say nothing of other rounds.
            drafted: nodes of the largest row's draft; verifying, accepting and committing took `rest_seconds`.
        """
        start, verify = self._start, self._start.verify
        if exit_layer is None:
            self._excess.plain.append(rest_seconds - start.plain)
            return
        place = self._places[exit_layer]
        if steps:
            self._excess.draft.append(draft_seconds / steps - start.draft[place])
        drafted = min(drafted, len(verify) - 1)
        widening = (1 - start.saved[place]) * (verify[drafted] - verify[0])
        self._excess.drafted.append(rest_seconds - verify[0] - widening)

    def current(self, shadow_seconds: float) -> ExitCosts:
        """The costs as they are now.

        Args:
            shadow_seconds: what gathering the statistics takes, on average over the rounds.
        """
        start, excess = self._start, self._excess
        draft = median(excess.draft or [0.0])
        plain, drafted = (median(own or other or [0.0]) for own, other in permutations((excess.plain, excess.drafted)))
        smallest = start.plain / 10  # a correction is no licence for negative seconds
        return ExitCosts(
            plain=max(start.plain + plain, smallest),
            draft=[max(seconds + draft, 0.0) for seconds in start.draft],
            verify=[max(seconds + drafted, smallest) for seconds in start.verify],
            saved=start.saved,
            shadow=shadow_seconds,
        )


def _measure_once(target: TreeModel, heads: Sequence[ExitHead], num_rows: int, max_length: int) -> _Measured:
    known = _measured.setdefault(target.model, {})
    kinds = tuple((head.layer, type(head)) for head in heads)
    key = (
        kinds,
        num_rows,
        max_length,
        torch.get_num_threads(),
        target.model.dtype,
        target.device,
        prepared(target.model),
    )
    if key not in known:
        known[key] = _Measured(_measure(target, heads, num_rows, max_length))
    return known[key]


@torch.no_grad()
def _measure(target: TreeModel, heads: Sequence[ExitHead], num_rows: int, max_length: int) -> ExitCosts:
    scratch = TreeModel(target.model)
    context = max(min(_CONTEXT, position_limit(target.model) - 2), 1)
    scratch.prefill(torch.zeros((num_rows, context), dtype=torch.long, device=scratch.device))
    widths = sorted({1, 2, 4, 8, max_length + 1} & set(range(1, max_length + 2)))
    depths = sorted({max(heads[0].layer, 1), heads[-1].layer, target.num_layers - 1} - {0})
    embedded_B1C = scratch.embed(torch.zeros((num_rows, 1), dtype=torch.long, device=scratch.device))
    parts: dict[object, Callable[[], object]] = {
        **{("verify", width): partial(_forward, scratch, width) for width in widths},
        **{("below", depth): partial(_forward_below, scratch, depth) for depth in depths},
    }
    parts["head"] = partial(heads[0].rehearsal(scratch, num_rows), embedded_B1C)  # all heads of a run are alike
    parts["split"] = partial(_draft_and_verify, scratch, depths[0])
    seconds = _time(parts, scratch)
    below = [0.0 if not head.layer else _interpolate(head.layer, seconds, "below", depths) for head in heads]
    whole = [_interpolate(width, seconds, "verify", widths) for width in range(1, max_length + 2)]
    saved = [min(layers / whole[0], 1.0) for layers in below]
    # verifying in two parts is more calls than one: the last token has to catch up with the others
    two_parts = seconds["split"] - seconds["below", depths[0]] - whole[1] + saved[0] * (whole[1] - whole[0])
    extra = max(two_parts, 0.0) if heads[0].layer else 0.0
    return ExitCosts(
        plain=whole[0],
        draft=[layers + seconds["head"] for layers in below],
        verify=[forward + extra for forward in whole],
        saved=saved,
    )


def _time(parts: dict[object, Callable[[], object]], scratch: TreeModel) -> dict[object, float]:
    """The shortest of several interleaved runs of each part: a busy machine only ever adds."""
    clock = clock_of(scratch.device)
    seconds = dict.fromkeys(parts, float("inf"))
    for _ in range(_REPETITIONS):
        for name, part in parts.items():
            started = clock()
            part()
            seconds[name] = min(seconds[name], clock() - started)
            scratch.forget_tail()
    return seconds


def _forward(scratch: TreeModel, width: int) -> None:
    tokens_BT = torch.zeros((scratch.cache.num_rows, width), dtype=torch.long, device=scratch.device)
    order_BT = torch.arange(width, device=scratch.device).expand_as(tokens_BT)
    seen_BTT = None if width == 1 else order_BT[:, :, None] >= order_BT[:, None]
    scratch.forward(tokens_BT, torch.zeros_like(tokens_BT), seen_BTT)  # the model may not have so many positions


def _forward_below(scratch: TreeModel, depth: int) -> None:
    tokens_B1 = torch.zeros((scratch.cache.num_rows, 1), dtype=torch.long, device=scratch.device)
    scratch.forward_below(depth, tokens_B1, tokens_B1, None)


def _draft_and_verify(scratch: TreeModel, depth: int) -> None:
    token_B1 = torch.zeros((scratch.cache.num_rows, 1), dtype=torch.long, device=scratch.device)
    scratch.forward_below(depth, token_B1, token_B1, None)
    scratch.verify(TreeBatch.chains(token_B1, [1] * len(token_B1)), token_B1)


def _interpolate(x: int, seconds: dict[object, float], kind: str, points: Sequence[int]) -> float:
    """Between increasing points. What took longer than a larger part did was disturbed."""
    least = np.minimum.accumulate([seconds[kind, point] for point in reversed(points)])[::-1]
    return float(np.interp(x, points, least))
