"""What a draft model is told of the trees that it grows, layer by layer.

Shape legend: B rows, M nodes of the newest layer, N nodes so far, T = N + 1 slots (slot 0 is the root), C slots that
there is room for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trees.policy import Layer
from trees.tree import TreeBatch
from trees.uploads import upload

_CAPACITY = 128


class GrowingTrees:
    """The layers so far, in the order in which they were grown: who sees whom, and how deep it is.

    All is worked out on the host, in memory that is allocated ahead: a layer costs what its own nodes cost. Nodes that
    fill up a layer (see `Layer`) count like others.

    Args:
        num_rows: B.
        device: of what the properties return.

    Attributes:
        num_slots: T.
        newest: slots of the newest layer, or the root's where there is none.
        is_chain: whether every node hangs on the one before it.
    """

    def __init__(self, num_rows: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._is_host = self.device.type == "cpu"
        self.num_slots = 1
        self.newest = range(1)
        self.is_chain = True
        self._layers: list[Layer] = []
        self._num_known, self._next = 0, 1  # layers that are worked out, and the slot after them
        self._seen_BCC = np.zeros((num_rows, _CAPACITY, _CAPACITY), np.bool_)
        self._depths_BC = np.zeros((num_rows, _CAPACITY), np.int64)
        self._seen_BCC[:, 0, 0] = True

    def append(self, layer: Layer) -> None:
        """Take a layer; its parents have been grown before."""
        start, stop = self.num_slots, self.num_slots + layer.parents_BM.shape[1]
        self.is_chain = self.is_chain and stop == start + 1 and bool((layer.parents_BM == start - 2).all())
        self._layers.append(layer)
        self.newest = range(start, stop)
        self.num_slots = stop

    @property
    def tokens_BM(self) -> Tensor:
        """int64 tokens of the newest layer."""
        return self._layers[-1].tokens_BM

    @property
    def parents_BM(self) -> np.ndarray:
        """int64 on the host: grown indices of their parents, `ROOT` for children of the root."""
        return self._layers[-1].parents_BM

    @property
    def depths_BM(self) -> Tensor:
        """int64 depths of the newest layer; children of the root have depth 1."""
        return self._tensor(self.host_depths_BT[:, self.newest.start :])

    @property
    def seen_BMT(self) -> Tensor:
        """bool: the slots that each node of the newest layer sees: its ancestors and itself."""
        return self._tensor(self._newest_seen_BMT)

    @property
    def seen_nodes_BMN(self) -> Tensor:
        """`seen_BMT` without the root."""
        return self._tensor(self._newest_seen_BMT[:, :, 1:])

    @property
    def sizes(self) -> tuple[int, ...]:
        """N for each row."""
        return (self.num_slots - 1,) * len(self._depths_BC)

    @property
    def tokens_BN(self) -> Tensor:
        """int64 tokens of all nodes."""
        nothing = torch.empty((len(self._depths_BC), 0), dtype=torch.long, device=self.device)
        return torch.cat([nothing, *(layer.tokens_BM for layer in self._layers)], 1)

    @property
    def ancestors_BTT(self) -> Tensor:
        """See `TreeBatch.ancestors_BTT`."""
        self._work_out()
        return self._tensor(self._seen_BCC[:, : self.num_slots, : self.num_slots])

    @property
    def host_depths_BT(self) -> np.ndarray:
        """See `TreeBatch.host_depths_BT`."""
        self._work_out()
        return self._depths_BC[:, : self.num_slots]

    def single_row(self, index: int) -> TreeBatch:
        """The nodes of one row so far, in a batch of its own."""
        row = slice(index, index + 1)
        parents_1N = np.concatenate([np.empty((1, 0), np.int64), *(x.parents_BM[row] for x in self._layers)], 1)
        depth = self.num_slots - 1 if self.is_chain else int(self.host_depths_BT[index].max())
        return TreeBatch(
            tokens_BN=self.tokens_BN[row],
            parents_BN=self._tensor(parents_1N),
            sizes=self.sizes[row],
            depth=depth,
            is_chain=self.is_chain,
        )

    @property
    def _newest_seen_BMT(self) -> np.ndarray:
        self._work_out()
        return self._seen_BCC[:, self.newest.start : self.num_slots, : self.num_slots]

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers) if self._is_host else upload(numbers, self.device)

    def _work_out(self) -> None:
        """Bring what is derived up to date; what is known of a slot never changes."""
        if self.num_slots > self._depths_BC.shape[1]:
            extra = 2 * self.num_slots - self._depths_BC.shape[1]
            self._seen_BCC = np.pad(self._seen_BCC, ((0, 0), (0, extra), (0, extra)))
            self._depths_BC = np.pad(self._depths_BC, ((0, 0), (0, extra)))
        capacity = self._depths_BC.shape[1]
        for layer in self._layers[self._num_known :]:
            start, stop = self._next, self._next + layer.parents_BM.shape[1]
            rows = zip(self._seen_BCC, self._depths_BC, layer.parents_BM + 1, strict=True)
            for seen_CC, depths_C, parents_M in rows:
                seen_CC[start:stop] = seen_CC[parents_M]
                seen_CC.reshape(-1)[start * (capacity + 1) : stop * (capacity + 1) : capacity + 1] = True
                depths_C[start:stop] = depths_C[parents_M] + 1
            self._next = stop
        self._num_known = len(self._layers)
