"""The tree attention of `attention.py` in Triton, and the moves of `slots.py`.

Keys and values are read once for all queries of their head. The slots of a row are cut into splits of a fixed size,
which programs take side by side (`_attend_to_split`); those past a row's end return at once. A second kernel adds the
splits up in their order (`_merge`). So neither the number of splits that a graph provides for, nor a row's neighbours,
change a bit of what a query gets.

Shape legend: B rows, Q heads of queries, H heads of keys, W new slots, D head size, S slots of the buffers, K tail
slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.cuda.seen import SPLIT_SLOTS as _SPLIT_SLOTS
from specdec.cuda.seen import TAIL_SLOTS as _TAIL_SLOTS
from specdec.cuda.seen import Buffers, Seen

TAIL_SLOTS = tl.constexpr(_TAIL_SLOTS)
SPLIT_SLOTS = tl.constexpr(_SPLIT_SLOTS)
_BLOCK_SLOTS = 64
_LEAST_ROWS, _MOST_ROWS = 16, 64
"""Of a tile of queries: what a matrix instruction takes, and what leaves registers for the sums."""
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_TILE_WORDS = 2048
"""That a program moves at once, in its registers."""


@triton.jit
def _attend_to_split(
    queries, keys, values, firsts, lengths, bits, sums, maxima, weights,
    query_strides_0, query_strides_1, query_strides_2,
    key_strides_0, key_strides_1, key_strides_2,
    value_strides_0, value_strides_1, value_strides_2,
    scale, num_heads, num_queries,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PADDED_HEAD: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What the queries of one head of keys get from one split: sums [.., D] of values, maxima and weights of scores."""
    row, head = (tl.program_id(0) // num_heads).to(tl.int64), (tl.program_id(0) % num_heads).to(tl.int64)
    split, tile = tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first, stop = split * SPLIT_SLOTS, length + TAIL_SLOTS
    if first >= stop:
        return
    places = tile * ROWS + tl.arange(0, ROWS)
    slots_new, heads = places // GROUP, head * GROUP + places % GROUP
    is_query = slots_new < num_queries
    channels = tl.arange(0, PADDED_HEAD)
    is_channel = channels < HEAD
    query = tl.load(
        queries
        + row * query_strides_0
        + (heads * query_strides_1 + slots_new * query_strides_2)[:, None]
        + channels[None, :],
        mask=is_query[:, None] & is_channel[None, :],
        other=0.0,
    )
    seen = tl.load(bits + row * num_queries + slots_new, mask=is_query, other=0)
    since = tl.load(firsts + row * num_queries + slots_new, mask=is_query, other=0)
    start = tl.min(tl.where(is_query, since, length), 0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_HEAD], tl.float32)
    for offset in range(0, SPLIT_SLOTS, SLOTS):
        slots = first + offset + tl.arange(0, SLOTS)
        is_slot = (slots >= start) & (slots < stop)
        is_read = is_slot[:, None] & is_channel[None, :]
        slots_wide = slots.to(tl.int64)[:, None]
        places_key = row * key_strides_0 + head * key_strides_1 + slots_wide * key_strides_2
        places_value = row * value_strides_0 + head * value_strides_1 + slots_wide * value_strides_2
        key = tl.load(keys + places_key + channels[None, :], mask=is_read, other=0.0)
        value = tl.load(values + places_value + channels[None, :], mask=is_read, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        shifts = tl.minimum(tl.maximum(slots - length, 0), TAIL_SLOTS - 1).to(tl.int64)
        in_tail = ((seen[:, None] >> shifts[None, :]) & 1) != 0
        is_committed = (slots < length)[None, :] & (slots[None, :] >= since[:, None])
        is_seen = is_slot[None, :] & (is_committed | ((slots >= length)[None, :] & in_tail))
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing seen yet: no -inf - -inf
        parts = tl.exp(scores - base[:, None])
        kept = tl.exp(highest - base)
        weight = weight * kept + tl.sum(parts, 1)
        total = total * kept[:, None] + tl.dot(parts.to(value.dtype), value, input_precision="ieee")
        highest = new_highest
    place = ((split * (tl.num_programs(0) // num_heads) + row) * num_heads * GROUP + heads) * num_queries + slots_new
    tl.store(
        sums + place[:, None] * HEAD + channels[None, :],
        total,
        mask=is_query[:, None] & is_channel[None, :],
    )
    tl.store(maxima + place, highest, mask=is_query)
    tl.store(weights + place, weight, mask=is_query)


@triton.jit
def _merge(
    sums, maxima, weights, lengths, output, num_rows, num_heads, num_queries,
    HEAD: tl.constexpr, PADDED_HEAD: tl.constexpr,
):  # fmt: skip
    """Of one query of one head: its splits, added up in their order."""
    slot, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PADDED_HEAD)
    is_channel = channels < HEAD
    num_splits = tl.cdiv(tl.load(lengths + row) + TAIL_SLOTS, SPLIT_SLOTS)
    highest = tl.full([1], float("-inf"), tl.float32)
    weight = tl.zeros([1], tl.float32)
    total = tl.zeros([PADDED_HEAD], tl.float32)
    for split in range(0, num_splits):
        place = ((split * num_rows + row) * num_heads + head) * num_queries + slot
        maximum = tl.load(maxima + place)
        new_highest = tl.maximum(highest, maximum)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        kept, share = tl.exp(highest - base), tl.exp(maximum - base)
        part = tl.load(sums + place.to(tl.int64) * HEAD + channels, mask=is_channel, other=0.0)
        total = total * kept + part * share
        weight = weight * kept + tl.load(weights + place) * share
        highest = new_highest
    place_out = ((row * num_queries + slot).to(tl.int64) * num_heads + head) * HEAD
    tl.store(output + place_out + channels, (total / weight).to(output.dtype.element_ty), mask=is_channel)


def tree_attention(
    queries_BQWD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor, seen: Seen, *, scale: float, num_slots: int
) -> Tensor:
    """See `attention.tree_attention`."""
    num_rows, num_heads, num_queries, size = queries_BQWD.shape
    num_key_heads = keys_BHSD.shape[1]
    group = num_heads // num_key_heads
    rows = min(max(_LEAST_ROWS, triton.next_power_of_2(num_queries * group)), _MOST_ROWS)
    num_splits = triton.cdiv(num_slots, SPLIT_SLOTS.value)
    seen = Seen(*(part.contiguous() for part in seen))
    queries_BQWD = _with_channels_last(queries_BQWD)
    keys_BHSD, values_BHSD = _with_channels_last(keys_BHSD), _with_channels_last(values_BHSD)
    sums = queries_BQWD.new_empty((num_splits, num_rows, num_heads, num_queries, size), dtype=torch.float32)
    maxima, weights = sums.new_empty(sums.shape[:-1]), sums.new_empty(sums.shape[:-1])
    output_BWQD = queries_BQWD.new_empty((num_rows, num_queries, num_heads, size))
    padded = max(16, triton.next_power_of_2(size))
    _attend_to_split[(num_rows * num_key_heads, num_splits, triton.cdiv(num_queries * group, rows))](
        queries_BQWD, keys_BHSD, values_BHSD, *seen, sums, maxima, weights,
        *queries_BQWD.stride()[:3], *keys_BHSD.stride()[:3], *values_BHSD.stride()[:3],
        scale, num_key_heads, num_queries,
        GROUP=group, HEAD=size, PADDED_HEAD=padded, ROWS=rows, SLOTS=_BLOCK_SLOTS,
    )  # fmt: skip
    _merge[(num_queries, num_heads, num_rows)](
        sums,
        maxima,
        weights,
        seen.lengths_B,
        output_BWQD,
        num_rows,
        num_heads,
        num_queries,
        HEAD=size,
        PADDED_HEAD=padded,
    )
    return output_BWQD


def _with_channels_last(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


@triton.jit
def _arrange(
    table, starts, sources, source_stride_0, source_stride_1, num_slots, most_heads,
    WORD: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Of one row in one head of one buffer: some words of all slots."""
    row, buffer = tl.program_id(0).to(tl.int64), tl.program_id(1) // most_heads
    head = (tl.program_id(1) % most_heads).to(tl.int64)
    num_heads, capacity = tl.load(table + 4 * buffer + 1), tl.load(table + 4 * buffer + 2)
    num_words = tl.load(table + 4 * buffer + 3)
    if head >= num_heads:
        return
    places = tl.arange(0, SLOTS)
    words = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    source = tl.load(sources + row * source_stride_0 + places * source_stride_1, mask=places < num_slots, other=0)
    is_moved = ((places < num_slots) & (source != places))[:, None] & (words < num_words)[None, :]
    tail = tl.load(table + 4 * buffer).to(tl.pointer_type(WORD))
    tail += ((row * num_heads + head) * capacity + tl.load(starts + row)) * num_words
    moved = tl.load(tail + source[:, None] * num_words + words[None, :], mask=is_moved, other=0)
    tl.debug_barrier()  # a slot may be the source of one and the target of another
    tl.store(tail + places[:, None] * num_words + words[None, :], moved, mask=is_moved)


def arrange(buffers: Buffers, starts_B: Tensor, sources_BK: Tensor) -> None:
    """See `slots.arrange`. Programs share nothing: each has words of its own, in all slots."""
    num_rows, num_slots = sources_BK.shape
    slots = triton.next_power_of_2(num_slots)
    words = min(triton.next_power_of_2(buffers.most_words), max(_TILE_WORDS // slots, 1))
    _arrange[(num_rows, len(buffers.parts) * buffers.most_heads, triton.cdiv(buffers.most_words, words))](
        buffers.table_N4, starts_B, sources_BK, *sources_BK.stride(), num_slots, buffers.most_heads,
        WORD=_WORDS[buffers.word_bytes], SLOTS=slots, WORDS=words,
    )  # fmt: skip
