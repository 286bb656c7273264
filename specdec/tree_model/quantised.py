"""Weights that another library has quantised (torchao, bitsandbytes, ...): what that means for a tree's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specdec.kernels import prepared
from specdec.kernels.model.linear import is_dense

_PACKED = frozenset({torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2})
_DYNAMIC = "torch.ao.nn.quantized"
"""Modules of `torch.ao.quantization.quantize_dynamic`, whose scale is that of all tokens of a forward."""
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
"""Attributes of torchao's weights that say how their products round what goes into them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """
    Args:
        kinds: of those that are not just numbers; none where we have quantised them ourselves.
        round_activations: whether products round what goes into them: a token's logits then jump with what else is in
            its forward.
    """

    kinds: frozenset[type | torch.dtype]
    round_activations: bool


def weights_of(model: PreTrainedModel) -> Weights:
    """In one pass: every call asks."""
    kinds: set[type | torch.dtype] = set()
    rounds = False
    for module in model.modules():
        rounds = rounds or type(module).__module__.startswith(_DYNAMIC)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if not is_dense(tensor):
                kinds.add(type(tensor))
                rounds = rounds or any(getattr(tensor, name, None) is not None for name in _OF_ACTIVATIONS)
            elif tensor.dtype in _PACKED and tensor.ndim > 1:
                kinds.add(tensor.dtype)
    return Weights(kinds=frozenset() if prepared(model) else frozenset(kinds), round_activations=rounds)
