"""What a forward costs, by the number of tokens in it: measured once for a model, then corrected by every round.

The measured curve gives the *shape* (how much dearer 8 tokens are than 1); rounds move it, as the context grows, other
programs take the cores, or the user's own processors and streamers add to what a round takes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from math import inf
from statistics import median
from threading import Lock, RLock
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda.fixed_shape import WIDTH, FixedShapeModel
from specdec.cuda.model import GraphedTreeModel, filling_up, scratch_of
from specdec.cuda.seen import TAIL_SLOTS
from specdec.disk_cache.measurements import keep, recall
from specdec.kernels.model.changes import structure_name, structure_of
from specdec.kernels.model.origin import files_of
from specdec.kernels.model.profile import profile_of
from specdec.kernels.native import identity
from specdec.stages import stage
from specdec.tree_model.cache import RowStates
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.model import TreeModel

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of the forwards that are timed. All of them cost the demo model half a second, once."""
_ORDER = (1, 8, 16, 1, 8, 2, 4, 1, 2, 4, 8, 16, 32, 64, 16, 32, 64, 32, 64)
"""In which they are timed. If time is short, three widths say what the others take: up to 8 a forward waits for the
weights, from there on for the arithmetic, and a line through 1 and 8 would know nothing of that."""
_LEAST_TIMED = 5
"""Forwards that are timed whatever they take: two of the narrow ones, as a single one may have been disturbed."""
_TIME_LIMIT_S = 1.0
"""No further forward is timed after this; what was not measured follows from what was."""
_LONG_TIME_LIMIT_S = 0.2
"""The same with a long past, while somebody waits: forwards of one token and of eight are timed in any case."""
_FAR_AWAY_S = 5.0
"""A short prompt that takes so long waits for weights that are not in memory, and so does every forward."""
_CONTEXT = 32
_LONG_CONTEXT = 2048
"""Slots of the past of the forwards that say what each of them adds; timed when a run is first past `_SHORT`."""
_SHORT = 1024
"""Slots of a past of which it is not asked what they add: rounds show it."""
_SCATTER = 7919
"""A prime: its multiples do not come again within a vocabulary."""
_MEMORY = 9
"""Rounds whose median is what the machine does now: another program shows after five of them."""
_MIN_OWN = 3
"""Rounds of a width before its own correction counts."""
_noting = Lock()


@dataclass(slots=True, eq=False)
class _Learned:
    """What rounds have shown of forwards that were measured."""

    drifts: deque[float] = field(default_factory=lambda: deque([1.0, 1.0], maxlen=_MEMORY))
    """The measurement is two of them: a first slow round does not outvote it."""
    drift: float = 1.0
    own: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_MEMORY)))
    corrections: dict[int, float] = field(default_factory=dict)
    """Of octaves of widths, beside the drift. A new dictionary each time: another thread may be reading the old one."""


class ForwardCosts:
    """Seconds of a round's forward and of what comes with it, by the number of tokens of all rows.

    Several threads may read it and update it.

    Args:
        seconds: number of tokens -> seconds, for one number at least. Numbers between are interpolated; past the widest
            the last slope goes on.
        plain: number of tokens of a plain round. What these rounds take says how the machine is doing; other widths
            have corrections of their own on top.
        slopes: asked once for the seconds that each further slot of the past adds to a forward, by number of tokens;
            None where that is not known. It may take its time.
        filled_up: how many tokens a forward has in fact, by those that are asked for: then its costs are a staircase.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        plain: int = 1,
        slopes: Callable[[], Mapping[int, float] | None] = lambda: None,
        filled_up: Callable[[int], int] | None = None,
    ):
        self._plain = _octave(plain)
        self._widths = sorted(seconds)
        # a wider forward is not cheaper: the narrower one was disturbed
        least = list(accumulate((seconds[width] for width in reversed(self._widths)), min))
        self._seconds = least[::-1]
        self._table: dict[int, float] = {}
        self._expected: tuple[dict[int, float], dict[int, float]] = {}, {}
        """What is expected where the machine does as it did, by number of tokens, and the corrections of which."""
        self._learned = _Learned()
        self._slopes = cache(slopes)
        self._filled_up = filled_up
        self._short = self
        """The same where the past is short."""
        self._added = 0
        """Slots of the past beyond those that were measured with."""
        self._slope: ForwardCosts | None = None
        """Seconds of each of them, by the number of tokens, once they have been asked for."""

    def at(self, length: int) -> ForwardCosts:
        """The same where rows have a past of so many slots; what rounds show is learned for all lengths together."""
        short = self._short
        slopes = short._slopes() if length > _SHORT else None
        if slopes is None:
            return short
        if short._slope is None:
            short._slope = ForwardCosts(slopes, filled_up=self._filled_up)
        longer = copy(short)  # with the same tables: a round asks for a length, and no length comes twice
        longer._added = length - _CONTEXT
        longer._expected = {}, {}  # but for this one, which is of a length
        return longer

    @property
    def drift(self) -> float:
        """How much longer rounds take now than was measured."""
        return self._learned.drift

    def measured(self, num_tokens: int) -> float:
        """As measured at the start."""
        if num_tokens not in self._table:
            self._table[num_tokens] = self._interpolate(num_tokens)
        seconds = self._table[num_tokens]
        if self._slope is not None and self._added:
            seconds += self._added * self._slope.measured(num_tokens)
        return seconds

    def seconds(self, num_tokens: int) -> float:
        """As expected now: no more than wider rounds have taken."""
        learned, (corrections, expected) = self._learned, self._expected
        if corrections is not learned.corrections:
            corrections, expected = self._expected = learned.corrections, {}
        if num_tokens not in expected:
            octave = _octave(num_tokens)
            seconds = self.measured(num_tokens) * corrections.get(octave, 1.0)
            for other, share in corrections.items():
                if other > octave:
                    seconds = min(seconds, self.measured(1 << other) * share)
            expected[num_tokens] = seconds
        return learned.drift * expected[num_tokens]

    def update(self, num_tokens: int, seconds: float) -> None:
        """A round with so many tokens took so long."""
        with _noting:
            self._update(seconds / self.measured(num_tokens), _octave(num_tokens))

    def _update(self, ratio: float, octave: int) -> None:
        learned = self._learned
        if octave == self._plain or octave in learned.corrections:
            learned.drifts.append(ratio / learned.corrections.get(octave, 1.0))
            learned.drift = median(learned.drifts)
        if octave != self._plain:
            own = learned.own[octave]
            own.append(ratio / learned.drift)
            if len(own) >= _MIN_OWN and (correction := median(own)) != learned.corrections.get(octave):
                learned.corrections = {**learned.corrections, octave: correction}

    def _interpolate(self, num_tokens: int) -> float:
        widths, seconds = self._widths, self._seconds
        if self._filled_up is not None:
            num_tokens = self._filled_up(num_tokens)
        if len(widths) == 1 or num_tokens <= widths[0]:
            return seconds[0]
        right = min(bisect_left(widths, num_tokens), len(widths) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (widths[right] - widths[left])
        return seconds[left] + slope * (num_tokens - widths[left])


class StepSeconds:
    """Seconds of the steps after a draft's first one, which reads what was committed and gets the draft under way.

    Several threads may read it and update it.
    """

    def __init__(self) -> None:
        self._first: tuple[float, ...] = ()
        """Drafts of one step, and what each further step of longer ones has added to the median of these."""
        self._later: tuple[float, ...] = ()

    def update(self, num_steps: int, seconds: float) -> None:
        """A draft of so many steps took so long."""
        with _noting:
            if num_steps == 1:
                self._first = (*self._first, seconds)[-_MEMORY:]
            elif len(self._first) >= _MIN_OWN:
                self._later = (*self._later, (seconds - median(self._first)) / (num_steps - 1))[-_MEMORY:]

    def expected(self, average: float) -> float:
        """Between a quarter and all of what steps take on average; all of it as long as nothing is known."""
        known = self._later
        return average if len(known) < _MIN_OWN else min(max(median(known), average / 4), average)


def _octave(num_tokens: int) -> int:
    return (num_tokens - 1).bit_length()


measuring = RLock()
"""Held while forwards are timed: two measurements at once would slow each other down."""


class _Known(dict[tuple[object, ...], ForwardCosts]):
    """The costs of a model's forwards, by what they depend on."""


def costs_of(model: PreTrainedModel, num_rows: int = 1) -> ForwardCosts:
    """The costs of a model's forwards, measured when they are first asked for.

    They hold for the model as it is prepared now and the modules that it consists of, its device and dtype, the number
    of threads, and the size of the batch up to a factor of two (each has corrections of its own). Of a model from files
    they are kept on disk: later processes begin with them. Threads that ask at the same time wait for one measurement.
    """
    with measuring:
        key, known = _state(model), profile_of(model).part(_Known)
        if key not in known:
            seconds = _known_seconds(model, _CONTEXT)
            known[key] = ForwardCosts(seconds, slopes=partial(_slopes, ref(model), seconds))
        filled_up = filling_up(model, num_rows)
        sized = (*key, _octave(num_rows)) if filled_up is None else (*key, "filled up", num_rows)
        if sized not in known:
            measured = {width: known[key].measured(width) for width in WIDTHS}
            known[sized] = ForwardCosts(measured, num_rows, known[key]._slopes, filled_up)
        return known[sized]


def costs_of_one_shape(target: FixedShapeModel, num_rows: int) -> ForwardCosts:
    """The same where every forward has one shape (`exact="bits"`): a token costs what a whole one does.

    Args:
        num_rows: that are left of those that the run began with, all of which are forwarded.
    """
    model = target.model
    with measuring:
        key, known = (*_state(model), "one shape", target.num_rows, num_rows), profile_of(model).part(_Known)
        if key not in known:
            ordinary, in_one = costs_of(model), num_rows * WIDTH
            seconds = ordinary.measured(target.num_rows * WIDTH)
            known[key] = ForwardCosts(
                {in_one * count: seconds * count for count in range(1, TAIL_SLOTS // WIDTH + 1)},
                num_rows,
                ordinary._slopes,
                lambda num_tokens: -(-num_tokens // in_one) * in_one,
            )
        return known[key]


def _slopes(model: ref[PreTrainedModel], short: Mapping[int, float]) -> dict[int, float] | None:
    """Seconds that each further slot of the past adds to a forward, from forwards with a short and with a long one.

    Args:
        short: forwards with a short one.
    """
    found = model()
    if found is None or len(short) == 1:
        return None
    length = min(_LONG_CONTEXT, position_limit(found) - 1)
    if length <= _SHORT:
        return None
    with measuring:
        long, near = _known_seconds(found, length), ForwardCosts(short)
    widths = sorted(long)
    added = [max(long[width] - near.measured(width), 0.0) / (length - _CONTEXT) for width in widths]
    return dict(zip(widths, accumulate(added, max), strict=True))


def _known_seconds(model: PreTrainedModel, context: int) -> dict[int, float]:
    return _recalled(model, context) or _measured(model, context)


def _recalled(model: PreTrainedModel, context: int) -> dict[int, float] | None:
    """What an earlier process has measured for the same files."""
    key = _key_on_disk(model, context)
    try:
        kept: Any = {} if key is None else recall(key) or {}
        seconds = {int(width): float(value) for width, value in kept.items()}
        return seconds if all(width >= 1 and 0 < value < inf for width, value in seconds.items()) else None
    except (AttributeError, TypeError, ValueError):  # of another version
        return None


def _measured(model: PreTrainedModel, context: int) -> dict[int, float]:
    if context > _CONTEXT:  # while somebody waits for the next token
        seconds = measure_forwards(model, context=context, time_limit_s=_LONG_TIME_LIMIT_S, least_timed=2)
    else:
        seconds = measure_forwards(model)
    if (key := _key_on_disk(model, context)) is not None:
        keep(key, seconds)
    return seconds


def _key_on_disk(model: PreTrainedModel, context: int) -> tuple[object, ...] | None:
    """None for a model that does not come from files, or has been changed since."""
    files = files_of(model)
    if files is None or model.device.type != "cpu":
        return None
    return "forwards", context, files, structure_name(model), model.dtype, torch.get_num_threads(), identity()


def costs_are_known(model: PreTrainedModel) -> bool:
    """Whether `costs_of` answers without measuring."""
    return _state(model) in profile_of(model).part(_Known)


def remember_costs(model: PreTrainedModel, seconds: Mapping[int, float]) -> None:
    """Take these as measured for the model as it is now: number of tokens -> seconds."""
    profile_of(model).part(_Known)[_state(model)] = ForwardCosts(seconds)


def _state(model: PreTrainedModel) -> tuple[object, ...]:
    """What the costs depend on."""
    return structure_of(model), model.device, model.dtype, torch.get_num_threads()


@stage("timing forwards")
@torch.no_grad()
def measure_forwards(
    model: PreTrainedModel,
    *,
    time_limit_s: float = _TIME_LIMIT_S,
    context: int = _CONTEXT,
    least_timed: int = _LEAST_TIMED,
) -> dict[int, float]:
    """Number of tokens -> seconds of a forward of the model: the shortest of a few interleaved ones.

    Args:
        context: slots of the past. Of a long one a single token is read; the rest is zeros, which cost as much.
        time_limit_s: after this no more is measured than the forwards that are always timed.
        least_timed: their number (it is one, where a prompt takes seconds).
    """
    scratch = scratch_of(model)
    started = perf_counter()
    num_read = 1 if context > _CONTEXT else max(min(_CONTEXT, position_limit(model) - 1), 1)
    scratch.prefill(varied_tokens(scratch, 1, num_read))
    if perf_counter() - started > _FAR_AWAY_S:
        return {1: _time(scratch, 1)}
    _lengthen(scratch, context - num_read if context > _CONTEXT else 0)
    seconds: dict[int, float] = {}
    for num_timed, width in enumerate(_ORDER):
        if num_timed >= least_timed and perf_counter() - started > time_limit_s:
            break
        if width not in seconds and isinstance(scratch, GraphedTreeModel):
            scratch.capture(*_forwarded(scratch, width))
        seconds[width] = min(seconds.get(width, float("inf")), _time(scratch, width))
    return seconds


def _lengthen(scratch: TreeModel, count: int) -> None:
    """So many slots more, of zeros."""
    if count > 0:
        layers = scratch.cache.row_views(0).slots
        slots = [tuple(part.new_zeros(1).expand(len(part), count, part.shape[2]) for part in layer) for layer in layers]
        scratch.cache.append_row(0, RowStates(length=count, slots=slots, recurrent=[]))


def _time(scratch: TreeModel, width: int) -> float:
    forwarded = _forwarded(scratch, width)
    synchronise = synchroniser(scratch.device)
    synchronise()
    started = perf_counter()
    scratch.forward(*forwarded)
    synchronise()
    seconds = perf_counter() - started
    scratch.forget_tail()
    return seconds


def _forwarded(scratch: TreeModel, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens in one position (the model may not have so many), of which each sees those before it."""
    tokens_BT = varied_tokens(scratch, 1, width)
    order_BT = torch.arange(width, device=scratch.device).unsqueeze(0)
    seen_BTT = None if width == 1 else order_BT[:, :, None] >= order_BT[:, None]
    return tokens_BT, torch.zeros_like(tokens_BT), seen_BTT


def varied_tokens(model: TreeModel, num_rows: int, width: int) -> Tensor:
    """int64 [B, T] tokens to time a forward with, all different: of equal ones a mixture reads the same few experts."""
    numbers = torch.arange(1, num_rows * width + 1, device=model.device).view(num_rows, width)
    return numbers * _SCATTER % model.vocab_size


def synchroniser(device: torch.device) -> Callable[[], None]:
    """Waits for the work that a device has been given: before a clock is looked at."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
