"""Trees grown by the native library: two calls for each layer instead of hundreds of small steps.

Shape legend: B rows, M tokens of a layer, V vocabulary.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import native
from specdec.kernels.native import structs
from specdec.kernels.trees.urn import is_native
from trees import ROOT, Grower, Layer, TokenTree
from trees.dynamic import ValueGrower
from trees.layered import FinishedTree, LayeredGrower
from trees.static import ShapedGrower

_NUM_COINS = 256
"""Drawn at a time; more are drawn if they do not do."""


class _NativeGrower(LayeredGrower):
    """Grows the trees of the class that it is mixed into. What the library does not do is left to that class."""

    _native_trees: Sequence[_GrowingTree | None] = ()
    """One for each row, None where nothing may be drafted; none if the library does not do it."""

    _finished_trees: Sequence[FinishedTree] = ()
    _width = 0
    _num_slots = 1

    @abstractmethod
    def _settings(self, max_depth: int, vocab_size: int) -> structs.TreeSettings | None:
        """What a row's tree is told; None if the library does not do it."""

    @property
    def hungry(self) -> bool:
        return self._width > 0 if self._native_trees else super().hungry

    def grow(self, scores_BMV: Tensor) -> Layer:
        is_first = not self._layers
        if is_first and is_native(scores_BMV):
            self._native_trees = self._new_trees(scores_BMV.shape[2])
        if not self._native_trees:
            return super().grow(scores_BMV)
        scores_BMV = scores_BMV.contiguous()
        self._device, self._width = scores_BMV.device, 0
        self._layers.append(scores_BMV)
        _, width, vocab_size = scores_BMV.shape
        for row, tree in enumerate(self._native_trees):
            if tree is not None:
                address = scores_BMV.data_ptr() + 4 * row * width * vocab_size
                self._width = max(self._width, tree.grow(address, self._round.generator))
        if not self._width:
            return _NO_LAYER
        if is_first:
            self._spares = self._spare_tokens(scores_BMV)
        return self._next_layer()

    def _new_trees(self, vocab_size: int) -> list[_GrowingTree | None]:
        trees: list[_GrowingTree | None] = []
        for depth in self._round.max_depths:
            settings = self._settings(depth, vocab_size)
            if settings is None:
                return []
            trees.append(_GrowingTree(settings) if depth > 0 else None)
        return trees

    def _next_layer(self) -> Layer:
        if not self._native_trees:
            return super()._next_layer()
        num_rows, width = len(self._native_trees), self._width
        self._num_slots += width
        # in numpy's memory: every call of torch would cost several times as much
        numbers_3BM = np.empty((3, num_rows, width), np.int64)
        seen_BMT = np.zeros((num_rows, width, self._num_slots), np.bool_)
        tokens_BM = torch.from_numpy(numbers_3BM[0])
        addresses = tokens_BM.data_ptr(), torch.from_numpy(seen_BMT).data_ptr()
        for row, (tree, spare) in enumerate(zip(self._native_trees, self._spares, strict=True)):
            if tree is not None:
                tree.write_layer(width, spare, structs.NextLayer(num_rows, row, *addresses))
            else:
                numbers_3BM[:, row] = [[spare], [ROOT], [1]]
                seen_BMT[row, :, 0] = True
                np.fill_diagonal(seen_BMT[row, :, -width:], True)
        return Layer(tokens_BM=tokens_BM, parents_BM=numbers_3BM[1], depths_BM=numbers_3BM[2], seen_BMT=seen_BMT)

    def _finished(self) -> Sequence[FinishedTree]:
        if not self._native_trees:
            return super()._finished()
        self._finished_trees = [_NOTHING if tree is None else tree.finish() for tree in self._native_trees]
        return self._finished_trees


class NativeValueGrower(_NativeGrower, ValueGrower):
    def _settings(self, max_depth: int, vocab_size: int) -> structs.TreeSettings | None:
        if self._is_shared or self._calibration is not None:
            return None
        limits = self._threshold, self._guess
        return structs.TreeSettings(vocab_size, self._budget, max_depth, self._round.sample, *limits)

    def _kept_values(self) -> list[float]:
        if not self._native_trees:
            return super()._kept_values()
        return [value for finished in self._finished_trees for value in finished.tree.values or ()]


class NativeShapedGrower(_NativeGrower, ShapedGrower):
    def _settings(self, max_depth: int, vocab_size: int) -> structs.TreeSettings:
        starts = np.cumsum([0, *map(len, self._shape)])
        spots = np.array([spot for family in self._shape for spot in family], np.int64)
        addresses = starts.ctypes.data, spots.ctypes.data
        settings = structs.TreeSettings(vocab_size, len(spots), max_depth, self._round.sample, 0.0, 0.0, *addresses)
        settings.alive = (starts, spots)
        return settings


STAND_INS: Mapping[type[Grower], type[Grower]] = {ValueGrower: NativeValueGrower, ShapedGrower: NativeShapedGrower}
"""See `trees.Round`."""

_NO_LAYER = Layer(tokens_BM=torch.empty((0, 0), dtype=torch.long), parents_BM=np.empty((0, 0), np.int64))
_NOTHING = FinishedTree(TokenTree(tokens=[], parents=[], probs=[], values=[]), [], [], [], [0.0])


class _GrowingTree:
    """A row's tree in the library's memory."""

    def __init__(self, settings: structs.TreeSettings):
        library = native.library()
        assert library is not None, "is_native() asks first"
        self._library = library
        self._settings = settings
        self._pointer = library.new_tree(settings)
        weakref.finalize(self, library.free_tree, self._pointer)

    def grow(self, scores: int | None, generator: torch.Generator | None) -> int:
        """Take the scores after the newest layer, at an address; returns the number of nodes in the next one."""
        coins, num_coins = None, 0
        while True:
            if self._settings.sample:
                num_coins = self._settings.limit if self._settings.starts else _NUM_COINS
                coins = torch.rand(num_coins, dtype=torch.float64, generator=generator)
            width: int = self._library.grow_tree(self._pointer, scores, native.address(coins), num_coins)
            if width >= 0:
                return width
            scores = None

    def write_layer(self, width: int, spare: int, layer: structs.NextLayer) -> None:
        """Number the places of the next layer, and write it."""
        self._library.write_layer(self._pointer, width, spare, layer)

    def finish(self) -> FinishedTree:
        room = self._settings.limit + 1
        integers, reals = np.empty((5, room), np.int64), np.empty((3, room))
        starts = torch.from_numpy(integers).data_ptr(), torch.from_numpy(reals).data_ptr()
        columns_at = [
            start + 8 * room * column for start, count in zip(starts, (5, 3), strict=True) for column in range(count)
        ]
        size = self._library.finish_tree(self._pointer, structs.FinishedTree(*columns_at))
        tokens, parents, places = integers[:3, :size].tolist()
        probs, values = reals[:2, :size].tolist()
        tree = TokenTree(tokens=tokens, parents=parents, probs=probs, values=values)
        return FinishedTree(tree, places, integers[3, :size], integers[4, :size], reals[2, : size + 1])
