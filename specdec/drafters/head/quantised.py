"""Weights that a file holds in 8 bits, as floats.

A weight's scales stand beside it under its name and `_scale` (compressed-tensors, ModelOpt) or `_scale_inv` (DeepSeek,
whose inverse is that of the quantisation): one for the whole weight, one for each row, or one for each block of it.

Shape legend: N rows of a weight, K its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALE = "_scale"
_SCALES = (SCALE, "_scale_inv")
_OF_INPUTS = (".input_scale", ".activation_scale")
"""Only of use to products in 8 bits."""
_PACKED = ("qweight", "qzeros", "weight_packed", "weight_zero_point", "weight_global_scale", "weight_scale_2")
_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = (128, 128)
"""Rows and columns with one scale, where config.json does not say."""


def dequantised(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors without scales; what was in 8 bits has the type of the norms beside it.

    Args:
        fields: of config.json, whose `quantization_config` says how large blocks are.

    Raises:
        ValueError: weights that are packed in fewer bits, that have no scales, or whose scales do not fit.
    """
    if packed := [name for name in tensors if name.endswith(_PACKED)]:
        raise ValueError(f"{packed[0]} is a part of packed weights, which are not read: take a file of 16 or 8 bits")
    floats = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_OF_INPUTS, *_SCALES))}
    dtype = next((tensor.dtype for name, tensor in floats.items() if "norm" in name), torch.float32)
    block = (fields.get("quantization_config") or {}).get("weight_block_size") or _BLOCK
    for name in sorted(tensors.keys() - floats.keys()):
        if name.endswith(_OF_INPUTS):
            continue
        weight = name.removesuffix("_inv").removesuffix(SCALE)
        if weight not in floats or floats[weight].dtype not in _NARROW:
            raise ValueError(f"scales {name} that fit none of its weights")
        scale = _spread(tensors[name].float(), floats[weight], block)
        if scale is None:
            raise ValueError(
                f"scales {name} of the shape {tuple(tensors[name].shape)} that fit none of its weights: this one is "
                f"{tuple(floats[weight].shape)}, and blocks are {tuple(block)}"
            )
        floats[weight] = (floats[weight].float() * scale).to(dtype)
    if bare := [name for name, tensor in floats.items() if tensor.dtype in _NARROW]:
        raise ValueError(f"{bare[0]} is in 8 bits, and has no scales")
    return floats


def _spread(scale: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor | None:
    """Scales that multiply a weight [N, K]; None where there are not as many as it needs."""
    if scale.numel() == 1:
        return scale.reshape(())
    if weight.dim() != 2:
        return None
    num_rows, num_columns = weight.shape
    scale = scale.unsqueeze(1) if scale.dim() == 1 else scale
    if scale.shape == (num_rows, 1):
        return scale
    if scale.shape != (-(-num_rows // block[0]), -(-num_columns // block[1])):
        return None
    rows_NX = scale.repeat_interleave(block[0], 0)[:num_rows]
    return rows_NX.repeat_interleave(block[1], 1)[:, :num_columns]
