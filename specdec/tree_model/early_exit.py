"""A tree model that drafts for itself: its lower layers forward drafted tokens ahead of the verification.

Shape legend: B rows, T new slots, K tail slots (old and new), S all tail slots, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.tree_model import masks
from specdec.tree_model.layer_views import Layers
from specdec.tree_model.model import TreeModel
from specdec.tree_model.pages import PagePool
from specdec.tree_model.tail_order import PartialForward, TailOrder, tail_order
from trees import TreeBatch


class EarlyExitModel(TreeModel):
    """A tree model whose forwards may stop at a layer; the next `verify` goes on from there.

    Raises:
        UnsupportedModelError: at the first such forward, if the model's layers do not run one by one.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._partial: PartialForward | None = None
        """What the lower layers have forwarded since the last verification."""
        self._order: TailOrder | None = None
        """Of the tail that the last verification has left."""

    def begin(self, num_rows: int = 0, *, capacity: int = 0, pool: PagePool | None = None) -> None:
        """As of any `TreeModel`, but for pages: those are for layers that all run at once."""
        self._partial = self._order = None
        super().begin(num_rows, capacity=capacity)

    def verify(
        self, trees: TreeBatch, roots_B1: Tensor, grown_indices: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        if self._partial is None:
            return super().verify(trees, roots_B1)
        return self._verify_above(self._partial, trees, torch.cat([roots_B1, trees.tokens_BN], 1), grown_indices)

    def forward_below(self, exit_layer: int, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        """Append T slots to the tail of the first `exit_layer` layers only; arguments as of `forward`.

        All such forwards of a round stop at the same layer. The next `verify` goes on from there.

        Returns:
            The hidden states after those layers, [B, T, C].
        """
        if self._partial is None:
            self._partial = PartialForward(exit_layer)
        assert self._partial.exit_layer == exit_layer, "one exit layer a round"
        _, states = self._forward_layers(Layers(0, exit_layer), tokens_BT, offsets_BT, seen_BTK)
        self._partial.add(states)
        return states[exit_layer]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The states before the first layer, [B, T, C]."""
        below = self.views.below(0)
        below.run(input_ids=tokens_BT, position_ids=torch.zeros_like(tokens_BT), use_cache=False)
        return below.states[0]

    def exit_logits(self, hidden_BTC: Tensor) -> Tensor:
        """What the model's final norm and head make of hidden states, [B, T, V]."""
        head = self.views.head()
        head.set_input_states(hidden_BTC)
        unread = torch.zeros(hidden_BTC.shape[:2], dtype=torch.long, device=self.device)
        mask = masks.unread(self.device)
        return head.model(input_ids=unread, attention_mask=mask, position_ids=unread, use_cache=False).logits

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        if self._order is not None and self._order.tail_indices is not None:
            indices = self._order.tail_indices.tolist()
            kept = [[indices[row][slot] for slot in slots] for row, slots in enumerate(kept)]
        self._order = None
        super().commit(kept)

    def forget_tail(self) -> None:
        self._partial = self._order = None
        super().forget_tail()

    def _verify_above(
        self,
        partial: PartialForward,
        trees: TreeBatch,
        tokens_BT: Tensor,
        grown_indices: Sequence[Sequence[int]] | None,
    ) -> Tensor:
        """Verify where the lower layers have already forwarded some of the slots."""
        exit_layer = partial.exit_layer
        order = self._order = tail_order(trees, grown_indices, partial.num_slots)
        tokens_BS, offsets_BS = order.arrange(tokens_BT), order.arrange(trees.depths_BT)
        seen_BSS, split = order.arrange_mask(trees.ancestors_BTT), order.num_forwarded
        self._rearrange(partial, order, offsets_BS[:, :split])
        if split < tokens_BS.shape[1]:
            self.forward_below(exit_layer, tokens_BS[:, split:], offsets_BS[:, split:], seen_BSS[:, split:])
        states = partial.states()
        logits_BSV, above = self._forward_layers(
            Layers(exit_layer), tokens_BS, offsets_BS, seen_BSS, [states[exit_layer]]
        )
        self.states = order.restore_states(states | above)
        self._partial = None
        self.num_forwards += 1
        assert logits_BSV is not None, "the head is above all exits"
        return order.restore(logits_BSV)

    def _rearrange(self, partial: PartialForward, order: TailOrder, offsets_BK: Tensor) -> None:
        """Bring the lower layers' tail into the order of verification."""
        if not order.is_plain:
            self.cache.arrange_tail(partial.exit_layer, order.sources_BK)
            partial.arrange(order.sources_BK)
        elif partial.num_slots > order.num_forwarded:
            self.cache.cut_tail(partial.exit_layer, order.num_forwarded)
            partial.arrange(order.sources_BK)
        self._offsets_BS = offsets_BK
