"""Weights that another library has quantised (torchao, bitsandbytes, ...): what that means for a tree's logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kernels import prepared
from specdec.kernels.model.linear import is_dense

_PACKED = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_DYNAMIC = "torch.ao.nn.quantized"
"""Modules of `torch.ao.quantization.quantize_dynamic`, whose scale is that of all tokens of a forward."""
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
"""Attributes of torchao's weights that say how their products round what goes into them."""


def rounds_activations(model: PreTrainedModel) -> bool:
    """Whether products round what goes into them: a token's logits then jump with what else is in its forward."""
    return any(type(module).__module__.startswith(_DYNAMIC) for module in model.modules()) or any(
        getattr(weight, name, None) is not None for weight in _foreign_weights(model) for name in _OF_ACTIVATIONS
    )


def kinds_of_weights(model: PreTrainedModel) -> frozenset[type | torch.dtype]:
    """Of weights that are not just numbers; none where we have quantised them ourselves."""
    if prepared(model) is not None:
        return frozenset()
    packed = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if _is_packed(tensor)}
    return frozenset({*map(type, _foreign_weights(model)), *packed})


def _foreign_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    return (weight for weight in model.parameters() if not is_dense(weight))


def _is_packed(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.dtype in _PACKED
