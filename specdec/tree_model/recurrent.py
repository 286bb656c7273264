"""States of recurrent layers and of convolutions in the cache: one of each row, and one of each node of the tail.

Keys and values of a token stay what they are when tokens come after it; a state is overwritten by the next token. So
there is one for every node of the tail, each made by the model's own step from its parent's, and a commit is to choose
one. The model's mixers read and write a *desk*: the fields that they find in transformers' cache layers. Before a step
the states of the nodes' parents are laid out there, and afterwards those of the nodes are taken from it
(`walking.py`). What the model reads by itself (prompts) it reads from a desk that holds the rows' own states.

A row that has read nothing has states of zeros, which is what a mixer starts from without any.

Shape legend: B rows, N nodes of a level.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.tree_model.levels import COMMITTED, Level, Place, Schedule, gather, schedule
from specdec.tree_model.tree_layer import Rows, TreeLayer

Key: TypeAlias = tuple[str, int]
"""Names a state of a layer: "conv" or "recurrent", and its number among those."""
States: TypeAlias = dict[Key, Tensor]


def states_of(layer: LinearAttentionLayer) -> States:
    """Those that the fields of a cache layer hold."""
    stores = {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
    return {
        (name, index): state for name, store in stores.items() for index, state in store.items() if state is not None
    }


def refill_states(layer: LinearAttentionLayer, rows: Sequence[States]) -> None:
    """Give an empty layer of transformers' cache the states of these rows."""
    for name, index in rows[0]:
        update = layer.update_conv_state if name == "conv" else layer.update_recurrent_state
        update(torch.stack([row[name, index] for row in rows]), index)


class StateLayer(LinearAttentionLayer):
    """One layer's states.

    Attributes:
        levels: number of a level -> states [N, ...] after its nodes; under `COMMITTED` those of the rows, [B, ...]
            (none before anything has been read). They are never written to.
    """

    def __init__(self, num_states: int):
        super().__init__(num_states)
        self.levels: dict[int, States] = {COMMITTED: {}}

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Put a state on the desk, in the place of the one before, which keeps its dtype. Nothing is copied."""
        known = self.recurrent_states[state_idx]
        state = recurrent_states if known is None else recurrent_states.to(known.dtype)
        self.recurrent_states[state_idx] = state
        self.is_recurrent_states_initialized[state_idx] = True
        return state

    def lay_out(self, states: States) -> None:
        """Put these on the desk, and nothing else. They may be written to."""
        for index in range(self.number_of_states):
            convolved, recurrent = states.get(("conv", index)), states.get(("recurrent", index))
            self.conv_states[index], self.recurrent_states[index] = convolved, recurrent
            self.is_conv_states_initialized[index] = convolved is not None
            self.is_recurrent_states_initialized[index] = recurrent is not None
            self.has_previous_state[index] = convolved is not None or recurrent is not None
            self.conv_kernel_size[index] = None if convolved is None else convolved.shape[-1]

    def begin_step(self, level: Level, keys: Collection[Key]) -> None:
        """Lay out the states that a level's nodes go on from, as far as a mixer knows them."""
        self.lay_out(self._copies(keys, level.sources))

    def end_step(self, level: Level, keys: Collection[Key]) -> None:
        """Keep the states of a level's nodes."""
        kept = self.levels.setdefault(level.number, {})
        kept.update({key: state for key, state in states_of(self).items() if key in keys})

    def slides(self, level: Level, keys: Iterable[Key]) -> bool:
        """Whether the states of a level's nodes are windows: those of their parents, moved by one token."""
        return all(
            key[0] == "conv" and torch.equal(self.levels[level.number][key][..., :-1], before[..., 1:])
            for key, before in ((key, self._gather(key, level.sources)) for key in keys)
        )

    def slide(self, levels: Sequence[Level], keys: Iterable[Key]) -> None:
        """Keep windows that end with what is on the desk of all nodes; lay out those before."""
        added = {key: states_of(self)[key][..., -1:] for key in keys}
        before: dict[Key, list[Tensor]] = {key: [] for key in keys}
        sizes = [len(level.rows) for level in levels]
        for key, parts in ((key, whole.split(sizes)) for key, whole in added.items()):
            for level, part in zip(levels, parts, strict=True):
                before[key].append(self._gather(key, level.sources))
                window = torch.cat([before[key][-1][..., 1:], part], -1)
                self.levels.setdefault(level.number, {})[key] = window
        self.lay_out({key: torch.cat(windows) for key, windows in before.items()})

    def has_slid(self, levels: Sequence[Level], keys: Iterable[Key]) -> bool:
        """Whether the windows of all nodes on the desk are those that are kept."""
        kept = {key: torch.cat([self.levels[level.number][key] for level in levels]) for key in keys}
        return all(torch.equal(states_of(self)[key], windows) for key, windows in kept.items())

    def begin_reading(self) -> None:
        """Lay out the rows' states: the model goes on from them by itself."""
        self.lay_out({key: state.clone() for key, state in self.levels[COMMITTED].items()})

    def end_reading(self) -> None:
        self.levels = {COMMITTED: states_of(self)}

    def commit(self, sources: Sequence[Place]) -> None:
        """Give each row the state at its place."""
        self.levels = {COMMITTED: {key: self._gather(key, sources) for key in self._keys}}

    def forget_nodes(self) -> None:
        self.levels = {COMMITTED: self.levels[COMMITTED]}
        self.lay_out({})

    def set_rows(self, states: Sequence[States | None]) -> None:
        """Give the rows these states, each without the dimension of rows; None for a row that has read nothing."""
        like = next((each for each in states if each), {})
        blank = {key: torch.zeros_like(state) for key, state in like.items()}
        rows = [each or blank for each in states]
        self.levels[COMMITTED] = {key: torch.stack([row[key] for row in rows]) for key in like}

    def select_states(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.levels[COMMITTED] = {
            key: gather({COMMITTED: state}, [(COMMITTED, row) for row in rows])
            for key, state in self.levels[COMMITTED].items()
            if rows
        }

    def row(self, row: int) -> States:
        """A row's states, which hold on: nobody writes to them."""
        return {key: state[row] for key, state in self.levels[COMMITTED].items()}

    @property
    def _keys(self) -> list[Key]:
        return sorted({key for states in self.levels.values() for key in states})

    def _gather(self, key: Key, sources: Sequence[Place]) -> Tensor:
        states = {number: states[key] for number, states in self.levels.items() if key in states}
        if COMMITTED not in states:
            like = next(iter(states.values()))
            states[COMMITTED] = like.new_zeros((1 + max(index for _, index in sources), *like.shape[1:]))
        return gather(states, sources)

    def _copies(self, keys: Iterable[Key], sources: Sequence[Place]) -> States:
        numbers = {number for number, _ in sources}
        states = {key: self._gather(key, sources) for key in keys if any(key in self.levels[each] for each in numbers)}
        owned = {id(each) for level in self.levels.values() for each in level.values()}
        return {key: state.clone() if id(state) in owned else state for key, state in states.items()}


class StateTreeLayer(StateLayer, TreeLayer):
    """A layer that has keys and values too."""

    def __init__(self, cache: Rows, capacity: int, num_states: int):
        TreeLayer.__init__(self, cache, capacity)
        StateLayer.__init__(self, num_states)

    def lazy_initialization(self, *states: Tensor, **named: Any) -> None:
        """transformers calls it for keys and values by position, for other states by name."""
        if states:
            TreeLayer.lazy_initialization(self, *states)
        else:
            StateLayer.lazy_initialization(self, **named)

    def get_max_length(self) -> int:
        return -1


class TreeStates:
    """The state layers of a cache, and which nodes its tail has.

    Args:
        layers: index -> layer.

    Attributes:
        plan: in which order the mixers take the tokens of the forward under way; None if the model reads by itself.
    """

    def __init__(self, layers: Mapping[int, StateLayer], num_rows: int):
        self.layers = dict(layers)
        self.plan: Schedule | None = None
        self._places: list[list[Place]] = [[] for _ in range(num_rows)]
        self._num_levels = 0
        self._is_reading = False

    @property
    def tail(self) -> int:
        """Nodes of each row."""
        return len(self._places[0]) if self._places else 0

    def adopt(self, cache: DynamicCache) -> int:
        """Begin with copies of the states in a cache of transformers; returns the number of tokens that they are of.

        Raises:
            UnsupportedOptionError: the cache does not say how many, or was not made for the model.
        """
        sources = cache.layers[: max(self.layers) + 1]
        found = [sources[index] for index in self.layers if index < len(sources)]
        if not all(isinstance(source, LinearAttentionLayer) for source in found) or len(found) < len(self.layers):
            raise UnsupportedOptionError(
                "the cache has no place for this model's states: pass DynamicCache(config=model.config), or none"
            )
        if not any(any(source.has_previous_state.values()) for source in found):
            return 0
        if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            raise UnsupportedOptionError(
                "a cache of states alone does not say how many tokens it holds: pass the whole text, and no cache"
            )
        for layer, source in zip(self.layers.values(), found, strict=True):
            layer.levels = {COMMITTED: {key: state.clone() for key, state in states_of(source).items()}}
        return cache.get_seq_length()

    def truncate_committed(self, lengths: Sequence[int], shorter: Sequence[int]) -> None:
        """Follow rows that forget what is past some of their tokens.

        Raises:
            UnsupportedModelError: a row keeps some of its tokens, but not all.
        """
        for row, (old, new) in enumerate(zip(lengths, shorter, strict=True)):
            if new and new != old:
                raise UnsupportedModelError(
                    "a recurrent state cannot be taken back to an earlier token: take a drafter or router that does "
                    "not rewrite what it has committed"
                )
            if new != old:
                self.write_row(row, None)

    def begin_step(self, seen_BTK: Tensor | None, num_new: int) -> None:
        """A forward follows that adds nodes (see `levels.schedule`)."""
        self.plan = schedule(seen_BTK, self._places, num_new, self._num_levels)
        self._num_levels += len(self.plan.levels)

    def begin_reading(self) -> None:
        """A forward follows that the model makes by itself, from where the rows are; all of its tokens are kept."""
        self.rollback()
        self._is_reading = True
        for layer in self.layers.values():
            layer.begin_reading()

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these nodes of each row: its state is that of the last."""
        for layer in self.layers.values():
            if self._is_reading:
                layer.end_reading()
            elif self.tail:
                layer.commit(self._last(kept))
        self.rollback()

    def _last(self, kept: Sequence[Sequence[int]]) -> list[Place]:
        pairs = enumerate(zip(self._places, kept, strict=True))
        return [places[slots[-1]] if slots else (COMMITTED, row) for row, (places, slots) in pairs]

    def rollback(self) -> None:
        """Forget all nodes, and a reading that broke off."""
        self.plan, self._num_levels, self._is_reading = None, 0, False
        self._places = [[] for _ in self._places]
        for layer in self.layers.values():
            layer.forget_nodes()

    def select_rows(self, rows: Sequence[int]) -> None:
        self._places = [[] for _ in rows]
        for layer in self.layers.values():
            layer.select_states(rows)

    def join(self) -> None:
        """A row more, which has read nothing."""
        num_rows = len(self._places)
        self._places.append([])
        for layer in self.layers.values():
            layer.set_rows([*(layer.row(row) for row in range(num_rows)), None])

    def write_row(self, row: int, states: Sequence[States] | None) -> None:
        """Make these a row's states, layer by layer; None for those of a row that has read nothing."""
        given: Sequence[States | None] = states or [None] * len(self.layers)
        for layer, own in zip(self.layers.values(), given, strict=True):
            layer.set_rows([own if index == row else layer.row(index) for index in range(len(self._places))])

    def row(self, row: int) -> list[States]:
        """A row's states, layer by layer."""
        return [layer.row(row) for layer in self.layers.values()]

    def check_integrity(self, num_rows: int) -> None:
        """Assert what must hold between rounds: no nodes, and states of every row or none."""
        assert len(self._places) == num_rows
        assert not self.tail
        for layer in self.layers.values():
            assert list(layer.levels) == [COMMITTED]
            assert all(len(state) == num_rows for state in layer.levels[COMMITTED].values())

    def point(self) -> tuple[States, ...]:
        """What the rows have committed, to return to: nothing is copied."""
        return tuple(layer.levels[COMMITTED] for layer in self.layers.values())

    def return_to(self, point: Sequence[States]) -> None:
        """Make what `point` gave the committed states again."""
        for layer, states in zip(self.layers.values(), point, strict=True):
            layer.levels = {COMMITTED: states}
        self.rollback()
