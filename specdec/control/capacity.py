"""How many rows a machine holds, how many it is best given, and how many tokens per second it makes of them.

The model is small on purpose. Memory: for every slot of every row the keys and values of all layers. Time: a round
takes what a forward of one token for each row takes, measured on rows that hold as many tokens as yours will. What that
leaves out is in `docs/scale.md`, with measurements of how much it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.control.costs import ForwardCosts, synchroniser, varied_tokens
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.layer_kinds import layer_kinds
from specdec.tree_model.model import TreeModel

MOST_ROWS = 64
LENGTH = 128
"""Tokens that a row holds when it is timed, unless the caller knows better."""
_WORTHWHILE = 1.05
"""Twice the rows have to make so many times the tokens per second: they take memory, and every answer takes longer."""
_REPETITIONS = 3
_GROWTH = 1.5
"""Buffers grow by half of their size: at worst they take so many times what is used."""


def slot_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, in all layers. Sliding layers keep all positions too (`TreeCache`).

    States that do not grow with the text are not counted.
    """
    text = config.get_text_config(decoder=True)
    num_layers = sum(kind is not None and kind.has_slots for kind in layer_kinds(config))
    if not num_layers:
        return 1
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * num_layers * num_heads * head_size * dtype.itemsize


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class RowTimer:
    """Times forwards of one token for each of a number of rows.

    Args:
        length: tokens that a row holds, at least 2.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, *, length: int = LENGTH):
        length = max(min(length, position_limit(model) - 1), 2)
        self._scratch = TreeModel(model)
        self._scratch.begin(1)
        self._scratch.read(varied_tokens(self._scratch, 1, length))
        self._states = self._scratch.cache.row_states(0)
        self._known: dict[int, float] = {}

    @torch.no_grad()
    def seconds(self, num_rows: int) -> float:
        """The shortest of a few forwards. The number of rows must not fall from call to call."""
        cache = self._scratch.cache
        while cache.num_rows < num_rows:
            end = self._states.length - cache.num_rows % 2  # as in real batches, not all have one length
            slots = [tuple(part[:, :end] for part in layer) for layer in self._states.slots]
            self._scratch.join(replace(self._states, length=end, slots=slots))
        assert cache.num_rows == num_rows, "rows only join"
        if num_rows not in self._known:
            self._known[num_rows] = min(self._time(num_rows) for _ in range(_REPETITIONS))
        return self._known[num_rows]

    def _time(self, num_rows: int) -> float:
        tokens_B1 = varied_tokens(self._scratch, num_rows, 1)
        synchronise = synchroniser(self._scratch.device)
        synchronise()
        started = perf_counter()
        self._scratch.forward(tokens_B1, torch.zeros_like(tokens_B1), None)
        synchronise()
        seconds = perf_counter() - started
        self._scratch.forget_tail()
        return seconds


def measure_rows(model: PreTrainedModel, *, most: int = MOST_ROWS, length: int = LENGTH) -> dict[int, float]:
    """Number of rows -> seconds of a forward of one token for each, for powers of two up to `most`."""
    timer = RowTimer(model, length=length)
    return {2**power: timer.seconds(2**power) for power in range(most.bit_length())}


def best_rows(seconds: Callable[[int], float], *, most: int = MOST_ROWS) -> int:
    """A power of two, or `most`: doubled for as long as that makes noticeably more tokens per second.

    Args:
        seconds: of a round of so many rows; asked for rising numbers, for as long as it pays.
    """
    rows, now = 1, seconds(1)
    while rows < most:
        wider = min(2 * rows, most)
        then = seconds(wider)
        if wider / then < (_WORTHWHILE ** (wider / rows - 1)) * rows / now:
            break
        rows, now = wider, then
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a machine does with a model.

    Args:
        slot_bytes: of one token of one row (see `slot_bytes`).
        kv_bytes: memory for keys and values: what is left when the weights are in it.
        row_seconds: number of rows -> seconds of a round (see `measure_rows`); numbers between are interpolated.
    """

    slot_bytes: int
    kv_bytes: int
    row_seconds: Mapping[int, float]

    def most_rows(self, length: int) -> int:
        """Rows that fit, if the longest has so many tokens, prompt and answer: all are padded to it."""
        return int(self.kv_bytes / (_GROWTH * self.slot_bytes * length))

    def tokens_per_second(self, num_rows: int, *, num_committed: float = 1.0) -> float:
        """Of all rows together, while every row has something to do.

        Args:
            num_committed: tokens that a row gets for the time of a plain round: 1 without speculation, else what
                `specdec bench` shows as its speed-up.
        """
        return num_rows * num_committed / ForwardCosts(self.row_seconds).measured(num_rows)

    def job_seconds(
        self, num_tokens: float, *, num_rows: int, num_machines: int = 1, start_seconds: float = 0.0
    ) -> float:
        """Until so many tokens are made by machines like this one that never wait for each other or for anything else.

        Args:
            start_seconds: until a machine has loaded the model.
        """
        return start_seconds + num_tokens / (num_machines * self.tokens_per_second(num_rows))
