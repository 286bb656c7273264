"""What a draft head computes for a few tokens in two native calls: its layers with what is before them, and its logits.

Called one by one, the parts around two layers of a small head take longer than the layers: each is a dozen operators of
a few microseconds, whose code the weights have driven out of the caches.

Shape legend: B rows, T tokens, C channels, R rows of logits, V vocabulary, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import native
from specdec.kernels.model.layer import is_native, matrix_of
from specdec.kernels.model.layer_run import LayerRun
from specdec.kernels.model.linear import is_plain
from specdec.kernels.model.quantized_linear import QuantizedLinear
from specdec.kernels.model.stack import Rotations, is_fused
from specdec.kernels.native import structs


class HeadStep:
    """Fused layers between two products, then a norm and an LM head; it is for one run.

    Args:
        first_NK: weights that make of an embedding and a state beside it what the layers read.
        layers: for which `covers` holds.
        last: reads what they leave.
        norm: after it.
        lm_head: after that.
        embeddings: by token, [N, C].
        rotations: of the layers.
    """

    def __init__(
        self,
        *,
        first_NK: Tensor,
        layers: Sequence[nn.Module],
        last: nn.Module,
        norm: Any,
        lm_head: nn.Module,
        embeddings: Tensor,
        rotations: Rotations,
    ):
        self._layers = LayerRun(layers)
        self._rotations = rotations
        self._packed = [part for part in (last, lm_head) if isinstance(part, QuantizedLinear)]
        bits, weights = 8 * first_NK.element_size(), norm.weight.detach()
        first = native.matrix(first_NK, *first_NK.shape, bits=bits, scale=None, bias=None)
        self._forward = structs.HeadForward(
            first=first, embeddings=embeddings.data_ptr(), num_embeddings=len(embeddings)
        )
        self._logits = structs.HeadLogits(
            last=(before := matrix_of(last)),
            lm_head=(after := matrix_of(lm_head)),
            norm=weights.data_ptr(),
            eps=norm.variance_epsilon,
        )
        self._alive = first, before, after, embeddings, weights
        self._sizes = first_NK.shape[0], first_NK.shape[1] - first_NK.shape[0]
        attention: Any = layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._is_checked = False

    @staticmethod
    def covers(
        *,
        first: nn.Module,
        layers: Sequence[nn.Module],
        last: nn.Module,
        norm: Any,
        lm_head: nn.Module | None,
        embeddings: Tensor | None,
    ) -> bool:
        """Whether there are native kernels for all of these parts, in float32 or packed."""
        if native.library() is None or lm_head is None or embeddings is None or not all(map(is_fused, layers)):
            return False
        if not isinstance(first, nn.Linear) or first.bias is not None or not (is_native(last) and is_native(lm_head)):
            return False
        floats = (embeddings, first.weight, norm.weight)
        is_alike = all(type(norm) is type(layer.input_layernorm) for layer in layers)
        rotates = all(getattr(layer.self_attn, "use_rope", True) for layer in layers)
        has_float32 = all(each.dtype is torch.float32 and is_plain(each) for each in floats)
        return is_alike and rotates and has_float32 and embeddings.shape[1] == first.out_features

    def states(
        self, tokens_BT: Tensor, states_BTX: Tensor, positions_BT: Tensor, mask: Tensor | None, cache: object
    ) -> Tensor | None:
        """What the layers leave of T more tokens, [B, T, C]; None, and nothing has happened, where their parts have to
        be called one by one.

        Args:
            tokens_BT: int64.
            states_BTX: float32, beside their embeddings.
            positions_BT: int64.
            mask: broadcasts to [B, heads, T, slots].
        """
        library, (num_channels, num_states) = native.library(), self._sizes
        if library is None or states_BTX.dtype is not torch.float32 or states_BTX.shape[-1] != num_states:
            return None
        x_BTC, angles = torch.empty(*tokens_BT.shape, num_channels), torch.empty(2, *tokens_BT.shape, self._head_dim)
        tables = self._rotations.tables(x_BTC, int(positions_BT.numpy().max()) + 1)
        if tables is None or tables[0].shape[1] != self._head_dim:
            return None
        call = self._layers.begin(x_BTC, mask, cache, (angles[0], angles[1]), is_checked=self._is_checked)
        if call is None:
            return None
        self._is_checked = True
        told = tokens_BT.contiguous(), positions_BT.contiguous(), states_BTX.contiguous(), *tables
        forward, self._forward.layers = self._forward, call.forward
        forward.tokens, forward.positions, forward.states, forward.cos, forward.sin = map(Tensor.data_ptr, told)
        library.head_forward(forward, torch.get_num_threads())
        return call.out_BTC

    def logits(self, states_BTC: Tensor) -> Tensor | None:
        """What the LM head says of what the layers have left, [B, T, V]; None as above."""
        library, num_rows = native.library(), states_BTC.shape[0] * states_BTC.shape[1]
        if library is None or num_rows > native.BLOCK_ROWS or any(part.weight_only for part in self._packed):
            return None
        logits_BTV, x_BTC = torch.empty(*states_BTC.shape[:2], self._logits.lm_head.n), states_BTC.contiguous()
        call = self._logits
        call.x, call.rows, call.logits = x_BTC.data_ptr(), num_rows, logits_BTV.data_ptr()
        library.head_logits(call, torch.get_num_threads())
        return logits_BTV
