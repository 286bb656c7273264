"""Positions of a prompt: which the model reads it at, and whether they are those of text.

Shape legend: A planes (multimodal positions have several), B rows, P prompt.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def text_positions(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The positions [B, P] that the planes [A, B, P] of multimodal positions agree on.

    None if they differ at a token that is no padding: then the prompt is more than text.
    """
    if position_ids.ndim != 3:
        return position_ids if position_ids.ndim == 2 else None
    differ_BP = (position_ids != position_ids[:1]).any(0)
    if attention_mask is not None:
        differ_BP = differ_BP & attention_mask[:, -differ_BP.shape[1] :].to(differ_BP.device).bool()
    return None if bool(differ_BP.any()) else position_ids[0]


@contextmanager
def positions_read(model: PreTrainedModel) -> Iterator[list[Tensor | None]]:
    """Within, each forward of the decoder in this thread adds the positions that it is given to the list.

    Some models do not use those that they are offered. None stands for those of the cache's slots, which a decoder
    takes that is given none.
    """
    read: list[Tensor | None] = []
    decoder, place = _takes_positions(model)
    thread = get_ident()

    def note(_: Any, inputs: Sequence[Any], named: dict[str, Any]) -> None:
        if get_ident() == thread:  # other calls may run on the same model
            read.append(inputs[place] if place < len(inputs) else named.get("position_ids"))

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def _takes_positions(model: PreTrainedModel) -> tuple[nn.Module, int]:
    """The decoder, and the place of its positions among its inputs; the model where it names its head a decoder."""
    for module in (model.get_decoder(), model):
        names = list(inspect.signature(module.forward).parameters)
        if "position_ids" in names:
            return module, names.index("position_ids")
    return model, sys.maxsize


def next_positions(read: Tensor | None) -> Tensor | None:
    """int64 [A, B] (or [A, 1] for all rows): the positions after those that a decoder was given last.

    As in plain decoding each plane goes on by itself; there is one where all planes go on alike.
    """
    if read is None:
        return None
    next_AB = read.reshape(-1, *read.shape[-2:])[:, :, -1] + 1
    return next_AB[:1] if bool((next_AB == next_AB[:1]).all()) else next_AB
