"""Masks written by the native library: one call for every kind of batch.

Shape legend: B rows, P prompt, S slots, T new slots, K tail slots (old and new).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import native
from specdec.kernels.native import structs


def can_write(seen_BTK: Tensor) -> bool:
    return seen_BTK.device.type == "cpu" and native.library() is not None


def write(seen_BTK: Tensor, lengths: Sequence[int], prompt_BP: Tensor | None) -> Tensor:
    """See `masks.visible_slots`."""
    library = native.library()
    assert library is not None, "can_write() asks first"
    num_rows, num_new, num_tail = seen_BTK.shape
    if seen_BTK.stride(2) != 1:
        seen_BTK = seen_BTK.contiguous()
    prompt_BP = None if prompt_BP is None else prompt_BP.contiguous()
    num_slots, prompt_size = max(lengths) + num_tail, 0 if prompt_BP is None else prompt_BP.shape[1]
    # numpy allocates in a fraction of torch's time
    visible_BTS = torch.from_numpy(np.empty((num_rows, num_new, num_slots), np.bool_))
    lengths_B = (ctypes.c_int64 * num_rows)(*lengths)
    library.write_mask(
        structs.Visibility(
            *(num_rows, num_new, num_tail, num_slots, prompt_size),
            *(seen_BTK.data_ptr(), seen_BTK.stride()[:2]),
            *(ctypes.addressof(lengths_B), native.address(prompt_BP), visible_BTS.data_ptr()),
        )
    )
    return visible_BTS
