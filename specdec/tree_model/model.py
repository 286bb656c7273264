"""A Hugging Face causal LM that forwards token trees: prefill, then speculative forwards, then commit or rollback.

The target is one; so is a small draft model. What a single forward takes is in `forwards.py`. A model that drafts for
itself is an `early_exit.EarlyExitModel`. `docs/structures.md` walks a round through the modules.

Shape legend: A planes of positions (one for text, several past an image), B rows, P prompt, T new slots, K tail slots
(old and new), S all tail slots, C channels, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from specdec.kernels import native
from specdec.tree_model.cache import RowStates, TreeCache
from specdec.tree_model.forwards import Forwards
from specdec.tree_model.layer_views import ALL_LAYERS
from specdec.tree_model.packing import pack_tokens, pack_trees, run_packed
from specdec.tree_model.pages import PagedCache, PagePool, RowPages
from specdec.tree_model.positions import next_positions, positions_read
from specdec.tree_model.state_owners import reads_on
from trees import Ragged, TreeBatch
from trees.uploads import upload


@dataclass(slots=True, eq=False)
class Along:
    """Tokens [B, T] that a reader of the same model takes in with a verification of another; whether it has."""

    reader: TreeModel
    tokens_BT: Tensor
    is_read: bool = False


_STEPS = 16
"""Tokens of a prompt that are stepped before their states are forgotten."""


class TreeModel(Forwards):
    """A causal LM with its cache and masks, for the length of one run.

    Attributes:
        states: as of any `Forwards`, of the last prefill or verification.
        num_read_along: tokens of a prompt that the last verification has read besides.
        joined_states: the same of the row that has joined last, [S, C], of the last tokens that it holds: those whose
            states are known.
    """

    keeps_bits = False
    """Whether logits are the same bits in whatever rounds a text is verified, as long as all that is committed has been
    verified in one chain from the root."""
    most_drafted = sys.maxsize
    """Nodes of a tree that it can verify."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.num_read_along = 0
        self.joined_states: dict[int, Tensor] = {}
        self._along: Along | None = None

    @contextmanager
    def row_subset(self, rows: Sequence[int], room: int) -> Iterator[None]:
        """Within, the model is one of these rows alone. What it appends becomes their tail; others' means nothing.

        Their states are copied, and what is appended is copied back: cheaper than a wide forward of rows that wait.

        Args:
            room: slots that will be appended to a row.
        """
        whole = self.cache, self._lag_AB, self._prompt_BP
        self.cache, self._lag_AB = self.cache.row_subset(rows, room), self._lag_AB[:, list(rows)]
        self._prompt_BP = None if self._prompt_BP is None else self._prompt_BP[list(rows)]
        try:
            yield
            whole[0].take_tail(self.cache, rows)
        finally:
            self.cache, self._lag_AB, self._prompt_BP = whole

    def prefill(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        generation_config: GenerationConfig | None = None,
        capacity: int = 0,
        **model_inputs: Any,
    ) -> Tensor:
        """Read the prompt the way `model.generate()` does and commit it.

        Args:
            input_ids: int64 [B, P].
            attention_mask: [B, P] (with a cache: [B, past + P]), None if nothing is masked.
            past_key_values: states of earlier tokens; copied, never written to.
            capacity: expected number of slots of the run, to allocate once.
            model_inputs: what else the model is given with a prompt, images included.

        Returns:
            The logits after the last token, [B, 1, V].
        """
        config = generation_config or GenerationConfig()
        if attention_mask is None and not hasattr(config, "_mask_length"):
            config._mask_length = input_ids.shape[1]
        num_rows = input_ids.shape[0]
        past = past_key_values
        if past is None:
            past = DynamicCache(config=self.model.config) if self.keeps_states else DynamicCache()
        self.cache = self._new_cache(num_rows, capacity).filled_from(past)
        if attention_mask is not None and model_inputs.get("position_ids") is None:
            model_inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if self.model._supports_logits_to_keep():
            model_inputs["logits_to_keep"] = 1
        cached = {"attention_mask": attention_mask, self._cache_name: self.cache, "use_cache": True}
        if self.cache.states is not None:
            self.cache.states.begin_reading()
        whole = self._whole()
        # transformers' own prefill: chunking, inputs_embeds and caches behave there as they always do
        with positions_read(whole.model) as read:
            outputs = whole.model._prefill(input_ids, config, {**model_inputs, **cached})
        self.states = self._at_home(whole.states)
        self.num_forwards += 1
        widths = [
            part.shape[1] for part in (input_ids, attention_mask, model_inputs.get("inputs_embeds")) if part is not None
        ]
        num_new = self.cache.tail if self.cache.stored else max(widths)
        self.cache.commit([range(num_new)] * num_rows)
        self._start_masks(attention_mask, next_positions(read[-1] if read else model_inputs.get("position_ids")))
        return outputs.logits[:, -1:]

    def begin(self, num_rows: int = 0, *, capacity: int = 0, pool: PagePool | None = None) -> None:
        """Start with rows that hold nothing; others may join.

        Args:
            capacity: expected number of slots of a row.
            pool: whose pages the rows are to have, as long as `can_pack`; None pads them to the longest.
        """
        if pool is not None and self.can_pack:
            self.cache = PagedCache(pool, num_rows)
        else:
            self.cache = self._new_cache(num_rows, capacity)
        self.states = {}
        self._prompt_BP = None
        self._lag_AB = torch.zeros(1, num_rows, dtype=torch.long, device=self.device)

    def _new_cache(self, num_rows: int, capacity: int) -> TreeCache:
        return TreeCache(self.num_layers, num_rows, capacity, **self._layers)

    def join(self, states: RowStates | None = None, hidden: dict[int, Tensor] | None = None) -> None:
        """A row more, at the end, without padding.

        Args:
            states: see `TreeCache.join`.
            hidden: see `joined_states`.
        """
        if isinstance(states, RowPages) and not self.is_packed:
            states = states.copied()
        self.cache.join(states)
        self.joined_states = hidden or {}
        self._lag_AB = torch.nn.functional.pad(self._lag_AB, (0, 1))
        if self._prompt_BP is not None:
            self._prompt_BP = torch.nn.functional.pad(self._prompt_BP, (0, 0, 0, 1), value=True)

    def read(self, tokens_BT: Tensor) -> None:
        """Commit T more tokens of every row; what the model says to them is not wanted, but for states that are kept.

        Args:
            tokens_BT: int64, T at least 1.
        """
        if self.is_packed:
            parts, by_steps = tokens_BT.split(native.BLOCK_ROWS, 1), True
        elif not self.keeps_states:
            parts, by_steps = (tokens_BT,), True
        elif not any(self.cache.lengths) or reads_on(self.model):
            parts, by_steps = (tokens_BT,), False
        else:
            parts, by_steps = tokens_BT.split(_STEPS, 1), True
        read = [self._read_part(part_BT, by_steps=by_steps) for part_BT in parts]
        self.states = {depth: torch.cat([part[depth] for part in read], 1) for depth in read[0]}

    def _read_part(self, tokens_BT: Tensor, *, by_steps: bool) -> dict[int, Tensor]:
        """Returns the states that are kept."""
        if self._packs(look=True):
            packed = pack_tokens(self._pages, tokens_BT)
            _, states = run_packed(self.views.packed, packed, [], self._kept)
            self._take_new(tokens_BT)
            return states
        view, inputs = self._whole() if self._kept else self._body, self._new_inputs(tokens_BT)
        if not by_steps:
            assert self.cache.states is not None
            self.cache.states.begin_reading()
        self._run(view, inputs, num_logits=1)
        self._take_new(tokens_BT)
        return self._at_home(view.states)

    @property
    def can_read_along(self) -> bool:
        """Whether `reading_along` is possible."""
        return self.is_packed

    @contextmanager
    def reading_along(self, reader: TreeModel, tokens_BT: Tensor) -> Iterator[Along]:
        """Within, the next `verify` also does what `reader.read(tokens_BT)` would, to the last bit, at less cost.

        Args:
            reader: of the same model. What it has is as before if no forward comes, or one that fails.
        """
        if not reader.is_packed:  # it has begun when the model was another
            reader.cache = self._pages.of_rows(reader.cache)
        along = self._along = Along(reader, tokens_BT)
        try:
            yield along
        finally:
            self._along = None
            if not along.is_read:
                reader.forget_tail()

    @property
    def can_pack(self) -> bool:
        """Whether rows can have pages: then what is verified is what they draft, not as much as the longest of them."""
        return self._is_fused and self.views.can_pack and all(kind is not None and kind.sees_all for kind in self.kinds)

    @property
    def is_packed(self) -> bool:
        """Whether rows have pages."""
        return isinstance(self.cache, PagedCache)

    @property
    def _pages(self) -> PagedCache:
        assert isinstance(self.cache, PagedCache), "`is_packed` is asked first"
        return self.cache

    def _packs(self, *, look: bool) -> bool:
        """Whether rows have pages that the layers can read. If the model has changed they have not, from now on.

        Args:
            look: at all of the model; else only if something shows that it has changed.
        """
        if not self.is_packed:
            return False
        packed = self.views.packed
        if not ((packed.is_as_seen and not look) or (self.can_pack and packed.is_current())):
            self.cache = self._pages.copied()
        return self.is_packed

    def _verify_packed(self, trees: TreeBatch, roots_B1: Tensor) -> Ragged:
        packed, along = pack_trees(self._pages, trees, roots_B1), self._along
        sizes = packed.sizes
        self.num_read_along = 0 if along is None else along.tokens_BT.numel()
        if along is not None:
            packed = packed.followed_by(pack_tokens(along.reader._pages, along.tokens_BT))
        logits, states = run_packed(self.views.packed, packed, sizes, self._kept)
        if along is not None:
            self._along = None
            num_rows, num_read = along.tokens_BT.shape
            along.reader.states = {depth: kept_BTC[-num_rows:, :num_read] for depth, kept_BTC in states.items()}
            along.reader._take_new(along.tokens_BT)
            along.is_read = True
        self.states = {depth: kept_BTC[: len(sizes), : max(sizes)] for depth, kept_BTC in states.items()}
        self.num_forwards += 1
        assert logits is not None
        return logits

    def _take_new(self, tokens_BT: Tensor) -> None:
        """They have been forwarded."""
        self.num_forwards += 1
        self.cache.commit([range(tokens_BT.shape[1])] * tokens_BT.shape[0])

    def share_cache_with(self, other: TreeModel) -> None:
        """Work on the cache of another model, which has the same layers and has been prefilled.

        Whoever goes on with that cache has to forget this model's tail first.
        """
        assert not any(layer.tail for layer in other.cache.stored.values()), "the other model is between two rounds"
        self.cache = other.cache
        self._prompt_BP, self._lag_AB = other._prompt_BP, other._lag_AB

    def verify(
        self, trees: TreeBatch, roots_B1: Tensor, grown_indices: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Forward the root and the nodes of every tree; they become the tail, the root its first slot.

        Args:
            roots_B1: int64 the last committed token of each row.
            grown_indices: of the nodes among those that an `EarlyExitModel` has forwarded in part (see `trees.Draft`).

        Returns:
            Logits after every slot, [B, 1 + N, V], in the model's dtype. Where rows have pages it is a `Ragged` of
            their own slots: whoever asks for pages (`begin`) reads those, row by row.
        """
        if self._packs(look=self._along is not None):
            return cast(Tensor, self._verify_packed(trees, roots_B1))
        tokens_BT = torch.cat([roots_B1, trees.tokens_BN], 1)
        return self.forward(tokens_BT, trees.depths_BT, trees.ancestors_BTT if trees.width else None)

    def forward(self, tokens_BT: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> Tensor:
        """Append T slots to the tail.

        Args:
            tokens_BT: int64.
            offsets_BT: int64 distance of each token from its row's first uncommitted position.
            seen_BTK: bool: which tail slots, old and new, each token sees. None says that T is 1 and the token
                sees the whole tail.

        Returns:
            Logits after every new slot, [B, T, V], in the model's dtype.
        """
        assert not self.is_packed, "rows in pages are verified"
        logits_BTV, self.states = self._forward_layers(ALL_LAYERS, tokens_BT, offsets_BT, seen_BTK)
        self.num_forwards += 1
        assert logits_BTV is not None
        return logits_BTV

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these slots of each row (see `TreeCache.commit`)."""
        self.cache.commit(kept)

    def forget_tail(self) -> None:
        """Forget all slots that are not committed."""
        self.cache.rollback()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.cache.select_rows(rows)
        rows_B = upload(list(rows), self.device)
        self.states = {depth: states.index_select(0, rows_B) for depth, states in self.states.items()}
        self._lag_AB = self._lag_AB.index_select(1, rows_B)
        if self._prompt_BP is not None:
            self._prompt_BP = self._prompt_BP.index_select(0, rows_B)
