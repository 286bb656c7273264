"""Batches of what a model wrote, with the model's states there.

Shape legend: B rows, T positions, C channels, K likeliest tokens, V draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.hf import home_device
from specdec.training.heads.collect import Shard
from specdec.tree_model.layer_views import LayerViews


class Batch(NamedTuple):
    """Rows of a corpus. tokens_BT, best_ids_BTK: int64. hidden: layers passed -> [B, T, C]. final_BTC: the target's
    last states. All but integers are float32."""

    tokens_BT: Tensor
    hidden: dict[int, Tensor]
    final_BTC: Tensor
    best_ids_BTK: Tensor
    best_p_BTK: Tensor
    learned_BT: Tensor
    """bool: the next token is one to be predicted."""


class Corpus:
    """What the model wrote. Rows are read when they are needed, so that shards may be larger than memory.

    Args:
        reader: where shards have kept no states, this makes them again; a copy of the model, in its own dtype perhaps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shards: Sequence[Shard],
        layers: Sequence[int],
        reader: PreTrainedModel | None = None,
    ):
        self._shards = shards
        self.layers = tuple(layers)
        self._views = LayerViews(model)
        self._reader = LayerViews(reader or model)
        self._device = home_device(model)
        self._rows = [(shard, row) for shard in shards for row in range(shard.tokens_BT.shape[0])]
        self.vocab_size: int = model.config.get_text_config(decoder=True).vocab_size

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def length(self) -> int:
        """T, the same for all rows."""
        return self._shards[0].tokens_BT.shape[1]

    @torch.no_grad()
    def batch(self, rows: Tensor) -> Batch:
        chosen = [self._rows[row] for row in rows.tolist()]

        def gather(part: Callable[[Shard], Tensor]) -> Tensor:
            return torch.stack([part(shard)[row] for shard, row in chosen]).to(self._device)

        depths = {*filter(None, self.layers), self._views.num_layers}
        if self._shards[0].states:
            states = {depth: gather(lambda shard, depth=depth: shard.states[depth]) for depth in depths}  # type: ignore[misc]
        else:
            states = self._read(rows, depths)
        return Batch(
            tokens_BT=self.tokens(rows).to(self._device),
            hidden={layer: states[layer].float() if layer else self._embed(rows) for layer in self.layers},
            final_BTC=states[self._views.num_layers].float(),
            best_ids_BTK=gather(lambda shard: shard.best_ids_BTK).long(),
            best_p_BTK=gather(lambda shard: shard.best_logits_BTK).float().softmax(-1),
            learned_BT=F.pad(gather(lambda shard: shard.learned_BT)[:, 1:], (0, 1)),
        )

    def rows(self, step: int, batch_rows: int, seed: int) -> Tensor:
        """The rows of a step: an epoch has every row once, in an order that depends on it and on the seed alone."""
        epoch, batch = divmod(step, self.steps_per_epoch(batch_rows))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator)[batch * batch_rows :][:batch_rows]

    def steps_per_epoch(self, batch_rows: int) -> int:
        return math.ceil(self.num_rows / batch_rows)

    def tokens(self, rows: Tensor) -> Tensor:
        """int64 [B, T]."""
        return torch.stack([shard.tokens_BT[row] for shard, row in map(self._rows.__getitem__, rows.tolist())]).long()

    def _read(self, rows: Tensor, depths: set[int]) -> dict[int, Tensor]:
        view = self._reader.whole(depths)
        view.model.base_model(input_ids=self.tokens(rows).to(self._device), use_cache=False)
        return view.states

    def _embed(self, rows: Tensor) -> Tensor:
        view = self._views.below(0)
        view.model(input_ids=self.tokens(rows).to(self._device), use_cache=False)
        return view.states[0].float()

    def frequent_ids(self, count: int) -> Tensor:
        """The tokens that the model finds likeliest most often, increasing: int64 [V]."""
        weights = torch.zeros(self.vocab_size, device=self._device)
        for shard in self._shards:
            p_BTK = shard.best_logits_BTK.to(self._device).float().softmax(-1)
            weights.scatter_add_(0, shard.best_ids_BTK.to(self._device).long().flatten(), p_BTK.flatten())
        return weights.topk(min(count, len(weights))).indices.sort().values
