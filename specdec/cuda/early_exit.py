"""An `EarlyExitModel` whose layers below and above an exit are replayed as well, and norm and head alone.

Shape legend: B rows, T slots, W their number rounded up, C channels, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.cuda.arena import Arena
from specdec.cuda.captured import Inputs, Shape
from specdec.cuda.graphs import graphs_for
from specdec.cuda.model import GraphedTreeModel, filled_up, forwarded
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_views import Layers


class GraphedExitModel(EarlyExitModel, GraphedTreeModel):
    """Where some layers cannot be captured they run one by one, and forwards of all layers are still replayed."""

    def __init__(self, model: PreTrainedModel, arena: Arena | None = None):
        super().__init__(model)
        self._arena = arena or self._arena

    def exit_logits(self, hidden_BTC: Tensor) -> Tensor:
        ordinary, pool = partial(super().exit_logits, hidden_BTC), graphs_for(self.device)
        layers, (num_rows, num_new, _) = Layers(self.num_layers), hidden_BTC.shape
        width = self._width(layers, num_rows, num_new)
        shape = Shape(num_rows, width or 0, 0, layers=layers)
        if width is None or pool is None or not self._arena.is_worth(shape):
            return ordinary()
        unread_BW = torch.zeros((num_rows, width), dtype=torch.long, device=self.device)
        hidden_BWC = filled_up(hidden_BTC, (0, 0, *shape.padding(hidden_BTC)))
        filled = Inputs(unread_BW, unread_BW, unread_BW, seen=(), hidden=(hidden_BWC,))
        if self._arena.has(shape):
            logits_BTV, _ = forwarded(shape, self._replay(shape, filled, pool), num_rows, num_new)
        else:
            logits_BTV, _ = self._capture(shape, filled, pool, lambda: (ordinary(), {}))
        assert logits_BTV is not None
        return logits_BTV
