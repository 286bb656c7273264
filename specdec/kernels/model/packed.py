"""The tokens of several texts through all layers of a model, as one list and in one native call.

Products see the sum of the texts' tokens, not the longest times their number; attention is text by text, over keys and
values in pages (`tree_model/pages.py`). Every token's result is, to the last bit, that of a forward for its text alone.

Shape legend: R tokens of all texts, T those of one, S slots of its keys, C channels, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.kernels import native
from specdec.kernels.model.layer import FusedLayer
from specdec.kernels.model.stack import Outputs, Rotations, is_fused
from specdec.kernels.native import structs


class Text(NamedTuple):
    """Some tokens at the end of a text.

    Args:
        num_tokens: T.
        num_slots: S, theirs included.
        pages: int64 addresses of the text's pages.
        places: int64 [T] addresses of the tokens' slots in their pages.
        visible_TS: bool, which slots each token sees; None: all up to its own.
    """

    num_tokens: int
    num_slots: int
    pages: np.ndarray
    places: np.ndarray
    visible_TS: np.ndarray | None = None


class PackedLayers:
    """All layers of a model for packed texts; it is for one run.

    Args:
        model: whose embedding, norm and head are used (see `can_pack`).
    """

    def __init__(self, model: PreTrainedModel, rotations: Rotations, layers: Sequence[nn.Module], norm: nn.Module):
        self._embed = model.get_decoder().embed_tokens
        self._head = model.get_output_embeddings()
        self._rotations = rotations
        self._layers: list[FusedLayer] = [layer.__dict__["forward"] for layer in layers]
        self._norm = norm
        self._constants: list[Any] = []
        self._structs: Any = None
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._hooks: list[dict[int, Any]] = []
        self._seen: list[Any] = []

    @property
    def is_as_seen(self) -> bool:
        """Whether nothing shows that the layers have changed since `is_current` said yes: modules, hooks, distrust. Of
        weights that were moved it knows nothing. It takes a tenth of the time."""
        return (
            bool(self._constants)
            and all(layer.checked is known for layer, known in zip(self._layers, self._constants, strict=True))
            and self._linked() == self._seen
            and not any(self._hooks)
        )

    def is_current(self) -> bool:
        """Whether the layers are native; their addresses are up to date then. Looks at every weight."""
        found = [layer.constants() for layer in self._layers] if self._layers[0].model_is_native else [None]
        if None in found:
            self._constants = []
            return False
        if [*map(id, found)] != [*map(id, self._constants)]:
            self._constants = found
            self._structs = (structs.Layer * len(found))(*[constants.layer for constants in found if constants])
            self._watch()
        return True

    def _watch(self) -> None:
        layers: list[Any] = [fused.layer for fused in self._layers]
        links = [link for constants in self._constants for link in constants.addresses.links]
        links += [(layer.__dict__, "forward") for layer in layers]
        self._places, self._names = [place for place, _ in links], [name for _, name in links]
        self._hooks = [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._seen = self._linked()

    def _linked(self) -> list[Any]:
        return list(map(dict.get, self._places, self._names))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of layers, heads of keys, head size."""
        attn: Any = self._layers[0].layer.self_attn
        return len(self._layers), attn.k_proj.out_features // attn.head_dim, attn.head_dim

    @property
    def num_channels(self) -> int:
        return self._embed.embedding_dim

    def __call__(
        self,
        tokens_R: Tensor,
        positions_R: Tensor,
        texts: Sequence[Text],
        *,
        num_logits: int,
        kept: Mapping[int, Tensor] | None = None,
    ) -> Outputs:
        """Forward the tokens of all texts, one text after the other. `is_current` has been asked.

        Args:
            tokens_R, positions_R: int64.
            num_logits: of the first tokens; 0 for none, nor their last states.
            kept: number of layers -> where to put the states after them, float32 [R, C].

        Returns:
            Of these first tokens, states [1, R, C] and logits [1, R, V].
        """
        hidden_1RC = self._embed(tokens_R.unsqueeze(0)).contiguous()
        cos, sin = (part.contiguous() for part in self._rotations(hidden_1RC, positions_R.unsqueeze(0)))
        out_RC = self._run(hidden_1RC[0], cos, sin, texts, kept or {})
        if not num_logits:
            return Outputs(out_RC.unsqueeze(0), None)
        last_1RC = self._norm(out_RC[:num_logits].unsqueeze(0))
        return Outputs(last_1RC, self._head(last_1RC))

    def _run(self, x_RC: Tensor, cos: Tensor, sin: Tensor, texts: Sequence[Text], kept: Mapping[int, Tensor]) -> Tensor:
        library, first = native.library(), self._constants[0]
        assert library is not None, "`can_pack` asks first"
        num_rows, H, K, D = len(x_RC), first.num_heads, first.num_kv_heads, first.head_dim
        queries, keys, values = (torch.empty(num_rows, heads, D) for heads in (H, K, K))
        hidden_RC, out_RC = torch.empty_like(x_RC), torch.empty_like(x_RC)
        attentions = (structs.Attention * len(texts))(*[_attention(text, H, K, D, first.scale) for text in texts])
        places_R = np.concatenate([text.places for text in texts])
        kept_at = [native.address(kept.get(depth)) for depth in range(1, len(self._layers) + 1)]
        forward = structs.PackedForward(
            *(ctypes.addressof(self._structs), len(self._layers), num_rows),
            *(x_RC.data_ptr(), cos.data_ptr(), sin.data_ptr(), ctypes.addressof(attentions), len(texts)),
            places_R.ctypes.data,
            *(part.data_ptr() for part in (queries, keys, values, hidden_RC, out_RC)),
            ctypes.addressof(kept_pointers := (ctypes.c_void_p * len(kept_at))(*kept_at)),
        )
        forward.alive = (kept_pointers,)
        library.packed_forward(forward, torch.get_num_threads())
        return out_RC


def _attention(text: Text, H: int, K: int, D: int, scale: float) -> structs.Attention:
    T, S, visible = text.num_tokens, text.num_slots, text.visible_TS
    strides = (K * native.PAGE_SLOTS * D, native.PAGE_SLOTS * D, D)
    mask = (None, False, (0, 0, 0)) if visible is None else (visible.ctypes.data, True, (0, 0, S))
    return structs.Attention(
        *(1, T, S, H, K, D, None, None, None, strides, strides, text.pages.ctypes.data, *mask, scale)
    )


def can_pack(model: PreTrainedModel, layers: Sequence[nn.Module]) -> bool:
    """Whether texts may go through the layers this way: fused ones of quantised weights and float32 states, which take
    any number of rows and all have the same sizes, and see everything before them."""
    inv_freq = getattr(model.get_decoder().rotary_emb, "inv_freq", None)
    if inv_freq is None or not all(map(is_fused, layers)):
        return False
    attns: list[Any] = [layer.self_attn for layer in layers]
    sizes = {(attn.q_proj.out_features, attn.k_proj.out_features, attn.head_dim, attn.scaling) for attn in attns}
    if (
        len(sizes) > 1
        or not all(getattr(attn, "use_rope", True) for attn in attns)
        or 2 * inv_freq.numel() != attns[0].head_dim
    ):
        return False
    fused: list[FusedLayer] = [layer.__dict__["forward"] for layer in layers]
    has_hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    takes_rows = all(layer.any_rows and layer.dtype is torch.float32 for layer in fused)
    return fused[0].model_is_native and takes_rows and not has_hooks
