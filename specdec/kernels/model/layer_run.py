"""Fused layers one after the other in one native call, keys and values of which are written straight into a cache.

A layer by itself takes two calls, four tensors and the cache's `update`: 0.2 ms, on one thread whatever their number,
of 0.4 ms for a layer of a small model.

Shape letters: B rows, T tokens, C channels, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from specdec.kernels import native
from specdec.kernels.model.layer import FusedLayer, Rotation
from specdec.kernels.native import structs


class NewSlots(NamedTuple):
    """Where keys and values of new tokens go.

    Args:
        keys, values: addresses of every layer's buffers, float32 [B, K, capacity, D].
        strides: of their first three dimensions.
        firsts: int64 [B], the first new slot of every row.
        num_slots: that there are now, of the longest row.
    """

    keys: ctypes.Array[ctypes.c_void_p]
    values: ctypes.Array[ctypes.c_void_p]
    strides: tuple[int, int, int]
    firsts: ctypes.Array[ctypes.c_int64]
    num_slots: int


class StackCall(NamedTuple):
    """A native call that is ready to be made. `forward` holds on to what it points into.

    Args:
        out_BTC: where it leaves the states.
        queries_LBTHD: rotated queries of each layer, or of the last.
    """

    forward: structs.StackForward
    out_BTC: Tensor
    queries_LBTHD: Tensor


class SlotCache(Protocol):
    """A cache that keys and values can be written to directly (a `TreeCache`)."""

    @property
    def num_rows(self) -> int: ...

    def append_slots(self, layers: tuple[int, ...], num_new: int) -> NewSlots | None: ...


def _is_slot_cache(cache: object) -> TypeGuard[SlotCache]:
    return hasattr(cache, "append_slots")  # isinstance() of a protocol takes as long as a layer's call


class LayerRun:
    """Some fused layers; it is for one run.

    Args:
        layers: for which `stack.is_fused` holds.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self._fused: list[FusedLayer] = [layer.__dict__["forward"] for layer in layers]
        self._constants: list[Any] = []
        self._structs: Any = None

    def __call__(
        self, hidden_BTC: Tensor, mask: Tensor | None, cache: object, rotation: Rotation, *, is_checked: bool
    ) -> Tensor | None:
        """What all layers do to the states; None, and nothing has happened, where they have to be called one by one.

        Args:
            mask: broadcasts to [B, H, T, S].
            is_checked: nobody has changed a layer since the last call of this run.
        """
        library, call = native.library(), self.begin(hidden_BTC, mask, cache, rotation, is_checked=is_checked)
        if library is None or call is None:
            return None
        library.stack_forward(call.forward, torch.get_num_threads())
        if (watch := getattr(cache, "watch", None)) is not None:  # see `tree_model/selection.py`
            for constants, query_BTHD in zip(self._constants, call.queries_LBTHD, strict=True):
                watch(constants.layer_idx, query_BTHD.transpose(1, 2), constants.scale)
        return call.out_BTC

    def begin(
        self, hidden_BTC: Tensor, mask: Tensor | None, cache: object, rotation: Rotation, *, is_checked: bool
    ) -> StackCall | None:
        """The call that does it, for which the cache has made room; None, and nothing has happened, as above.

        Args:
            hidden_BTC, rotation: contiguous, they may be written before the call is made.
        """
        B, T, _ = hidden_BTC.shape
        if native.library() is None or not _is_slot_cache(cache) or cache.num_rows != B:
            return None
        if mask is None and T > 1:  # which may be the sign for a prefill, see `FusedLayer`
            return None
        if not self._covers(hidden_BTC, mask, rotation) or not self._are_current(rotation, is_checked=is_checked):
            return None
        slots = cache.append_slots(tuple([constants.layer_idx for constants in self._constants]), T)
        if slots is None:
            return None
        first = self._constants[0]
        H, K, D = first.num_heads, first.num_kv_heads, first.head_dim
        x_BTC, is_watched = hidden_BTC.contiguous(), getattr(cache, "watch", None) is not None
        query_LBTHD = torch.empty(len(self._fused) if is_watched else 1, B, T, H, D)
        key_BTKD, value_BTKD = torch.empty(B, T, K, D), torch.empty(B, T, K, D)
        scratch_BTC, out_BTC = torch.empty_like(x_BTC), torch.empty_like(x_BTC)
        cos, sin = self._fused[0].angles(rotation, B) if first.rotates else (None, None)
        visible = native.visibility(mask)
        attention = structs.Attention(
            *(B, T, slots.num_slots, H, K, D, None, None, None, slots.strides, slots.strides, None),
            *(*visible.fields, first.scale),
        )
        forward = structs.StackForward(
            *(ctypes.addressof(self._structs), len(self._fused), B * T * H * D if is_watched else 0),
            *(x_BTC.data_ptr(), native.address(cos), native.address(sin), ctypes.addressof(attention)),
            *(ctypes.addressof(slots.keys), ctypes.addressof(slots.values), ctypes.addressof(slots.firsts)),
            *(part.data_ptr() for part in (query_LBTHD, key_BTKD, value_BTKD, scratch_BTC, out_BTC)),
        )
        forward.alive = self._structs, attention, slots, visible, x_BTC, cos, sin, key_BTKD, value_BTKD, scratch_BTC
        return StackCall(forward, out_BTC, query_LBTHD)

    def _covers(self, hidden_BTC: Tensor, mask: Tensor | None, rotation: Rotation) -> bool:
        B, T, _ = hidden_BTC.shape
        return (
            B * T <= native.BLOCK_ROWS
            and hidden_BTC.dtype is torch.float32
            and self._fused[0].covers(hidden_BTC, mask, rotation, {})
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers)
        )

    def _are_current(self, rotation: Rotation, *, is_checked: bool) -> bool:
        """Whether the layers are native and unchanged; their addresses are up to date then."""
        if is_checked and self._constants:
            return all(layer.checked is known for layer, known in zip(self._fused, self._constants, strict=True))
        found = [layer.constants(rotation) for layer in self._fused]
        self._constants = [constants for constants in found if constants is not None]
        if len(self._constants) < len(found) or len({each.attends_as for each in self._constants}) > 1:
            self._constants = []
            return False
        self._structs = (structs.Layer * len(found))(*[constants.layer for constants in self._constants])
        return True
