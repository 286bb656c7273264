"""One token tree for people, a batch of them for tensors.

Shape legend: B rows, N nodes, T = N + 1 slots (slot 0 is the root, slot i + 1 is node i), D depth.

The *root* is the last committed token. It is verified together with the nodes but is not one of them:
a tree without nodes is ordinary decoding. A *chain* is the tree in which node i hangs on node i - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trees.uploads import upload

if TYPE_CHECKING:
    from rich.tree import Tree as RichTree

ROOT = -1
"""The parent of the nodes that hang on the root."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTree:
    """The draft of one row.

    Args:
        tokens: N token ids.
        parents: N node indices, `ROOT` for children of the root. A parent stands before its children.
        probs: N draft probabilities (of each token among its parent's children-to-be), or None.
        values: N pre-sample values (DySpec, section 4: the chance that a slot is tested), or None.

    Raises:
        ValueError: lengths differ, or a parent does not stand before its child.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    probs: Sequence[float] | None = None
    values: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("parents", "probs", "values"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.tokens):
                raise ValueError(f"a tree of {len(self.tokens)} tokens needs as many {name}, got {len(column)}")
        for node, parent in enumerate(() if self.is_chain else self.parents):
            if not ROOT <= parent < node:
                raise ValueError(
                    f"node {node} names parent {parent}: parents stand before their children, "
                    f"and {ROOT} stands for the root"
                )

    @classmethod
    def chain(cls, tokens: Sequence[int], probs: Sequence[float] | None = None) -> TokenTree:
        """The tree in which every token follows the one before it."""
        return cls(tokens=tokens, parents=range(ROOT, len(tokens) - 1), probs=probs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs on the one before it."""
        chained, parents = range(ROOT, len(self.tokens) - 1), self.parents
        return parents == chained if isinstance(parents, range) else list(parents) == list(chained)

    @cached_property
    def depths(self) -> list[int]:
        """N depths; children of the root have depth 1."""
        if self.is_chain:
            return list(range(1, len(self) + 1))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @cached_property
    def children(self) -> list[list[int]]:
        """Children of every slot in node order: `children[0]` are the root's, `children[i + 1]` node i's."""
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            children[parent + 1].append(node)
        return children

    def path(self, node: int) -> list[int]:
        """Nodes from a child of the root down to `node`."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def dfs_order(self) -> list[int]:
        """Nodes in depth-first order, siblings in node order: subtrees become contiguous."""
        order, stack = [], self.children[0][::-1]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self.children[node + 1]))
        return order

    def render(self, decode: Callable[[int], str] = str) -> str:
        """Draw the tree, one node a line; `decode` turns a token id into text."""
        lines = ["root"]
        open_branches: list[bool] = []
        for node in self.dfs_order():
            siblings = self.children[self.parents[node] + 1]
            last = node == siblings[-1]
            del open_branches[self.depths[node] - 1 :]
            indent = "".join("│  " if is_open else "   " for is_open in open_branches)
            branch = "└─ " if last else "├─ "
            lines.append(f"{indent}{branch}{self._label(node, decode)}")
            open_branches.append(not last)
        return "\n".join(lines)

    def to_rich(self, decode: Callable[[int], str] = str, accepted: Sequence[int] = ()) -> RichTree:
        """The tree for `rich` to print; `accepted` nodes stand out."""
        from rich.text import Text
        from rich.tree import Tree

        root = Tree("root")
        branches = [root]
        for node in range(len(self)):
            label = Text(self._label(node, decode), style="bold green" if node in accepted else "")
            branches.append(branches[self.parents[node] + 1].add(label))
        return root

    def __str__(self) -> str:
        return self.render()

    def __rich__(self) -> RichTree:
        return self.to_rich()

    def _label(self, node: int, decode: Callable[[int], str]) -> str:
        prob = "" if self.probs is None else f"  q={self.probs[node]:.3f}"
        value = "" if self.values is None else f"  v={self.values[node]:.3f}"
        return f"{decode(int(self.tokens[node]))}{prob}{value}"


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeBatch:
    """The drafts of B rows, padded to the largest tree.

    Args:
        tokens_BN: int64 token ids on the model's device; padding may hold any valid id.
        parents_BN: int64 on the same device, `ROOT` for children of the root. A parent stands before its
            children; padding hangs on the root.
        sizes: number of nodes of each row (the host knows the structure, never needs to ask the device).
        depth: depth of the deepest node.
        is_chain: whether every row is a chain (then masks, walks and cache commits take the short way).
        rows: the same trees on the host, where that is where they were made.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    sizes: tuple[int, ...]
    depth: int
    is_chain: bool
    rows: tuple[TokenTree, ...] | None = None

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str = "cpu") -> TreeBatch:
        """No drafts at all: verifying it is one step of ordinary decoding."""
        return _empty(num_rows, torch.device(device))

    @classmethod
    def chains(cls, tokens_BN: Tensor, sizes: Sequence[int] | None = None) -> TreeBatch:
        """One chain a row; `sizes` cuts rows that are shorter than N."""
        num_rows, width = tokens_BN.shape
        sizes = (width,) * num_rows if sizes is None else tuple(sizes)
        parents_N = torch.arange(ROOT, width - 1, device=tokens_BN.device)
        return cls(
            tokens_BN=tokens_BN,
            parents_BN=parents_N.expand(num_rows, width),
            sizes=sizes,
            depth=max(sizes, default=0),
            is_chain=True,
        )

    @classmethod
    def stack(cls, rows: Sequence[TokenTree], device: torch.device | str = "cpu") -> TreeBatch:
        """Pad and stack one tree a row."""
        width = max((len(row) for row in rows), default=0)
        tokens = [[*row.tokens, *[0] * (width - len(row))] for row in rows]
        parents = [[*row.parents, *[ROOT] * (width - len(row))] for row in rows]
        numbers_2BN = np.array([tokens, parents], np.int64).reshape(2, len(rows), width)
        tokens_BN, parents_BN = upload(numbers_2BN, device).unbind()
        return cls(
            tokens_BN=tokens_BN,
            parents_BN=parents_BN,
            sizes=tuple(len(row) for row in rows),
            depth=max((max(row.depths, default=0) for row in rows), default=0),
            is_chain=all(row.is_chain for row in rows),
            rows=tuple(rows),
        )

    def row(self, index: int) -> TokenTree:
        """The tree of one row (may copy to the host: for people and tests, not for the loop)."""
        if self.rows is not None:
            return self.rows[index]
        size = self.sizes[index]
        return TokenTree(tokens=self.tokens_BN[index, :size].tolist(), parents=self.parents_BN[index, :size].tolist())

    def single_row(self, index: int) -> TreeBatch:
        """A batch of this row alone, as wide as this one."""
        one = slice(index, index + 1)
        batch = TreeBatch(
            tokens_BN=self.tokens_BN[one],
            parents_BN=self.parents_BN[one],
            sizes=self.sizes[one],
            depth=self.depth,
            is_chain=self.is_chain,
            rows=None if self.rows is None else self.rows[one],
        )
        if not self.is_chain:
            derived = {"host_ancestors_BTT": self.host_ancestors_BTT, "host_depths_BT": self.host_depths_BT}
            vars(batch).update({name: value[one] for name, value in derived.items()})
        return batch

    def with_tokens(self, ids_V: Tensor) -> TreeBatch:
        """The same trees, whose tokens are places in `ids_V` (int64), with the tokens that stand there."""
        tokens_BN, rows = ids_V[self.tokens_BN], self.rows
        if rows is not None:
            pairs = zip(rows, tokens_BN.tolist(), strict=True)
            rows = tuple(replace(row, tokens=tokens[: len(row)]) for row, tokens in pairs)
        return replace(self, tokens_BN=tokens_BN, rows=rows)

    @cached_property
    def row_depths(self) -> tuple[int, ...]:
        """Depth of each row's deepest node (copied from the device only if the trees were made there)."""
        if self.is_chain:
            return self.sizes
        return tuple(max(self.row(index).depths, default=0) for index in range(self.num_rows))

    @property
    def num_rows(self) -> int:
        return len(self.sizes)

    @property
    def width(self) -> int:
        """N, the number of nodes of the largest row."""
        return self.tokens_BN.shape[1]

    @property
    def num_slots(self) -> int:
        """T = N + 1: the nodes and the root."""
        return self.width + 1

    @property
    def device(self) -> torch.device:
        return self.tokens_BN.device

    @cached_property
    def ancestors_BTT(self) -> Tensor:
        """bool: slot i may see slot j, that is, j is i itself or lies on its path to the root (slot 0)."""
        if self.is_chain:
            slots_T = torch.arange(self.num_slots, device=self.device)
            causal_TT = slots_T[:, None] >= slots_T  # on a CPU `tril` wakes torch's threads, however small it is
            return causal_TT.expand(self.num_rows, -1, -1)
        return upload(self.host_ancestors_BTT, self.device)

    @cached_property
    def depths_BT(self) -> Tensor:
        """int64 depth of every slot; 0 for the root."""
        if self.is_chain:
            return torch.arange(self.num_slots, device=self.device).expand(self.num_rows, self.num_slots)
        return upload(self.host_depths_BT, self.device)

    @cached_property
    def host_ancestors_BTT(self) -> np.ndarray:
        """`ancestors_BTT` on the host."""
        if self.is_chain:
            return np.broadcast_to(np.tri(self.num_slots, dtype=np.bool_), (self.num_rows, *[self.num_slots] * 2))
        num_bytes, bits = -(-self.num_slots // 8), bytearray()
        for parents in self._host_parents():
            paths = [1]  # bit j of number i: slot i may see slot j
            for slot, parent in enumerate(parents, 1):
                paths.append(paths[parent + 1] | 1 << slot)
            bits += b"".join([path.to_bytes(num_bytes, "little") for path in paths])
        packed_BTX = np.frombuffer(bits, np.uint8).reshape(self.num_rows, self.num_slots, num_bytes)
        return np.unpackbits(packed_BTX, 2, self.num_slots, "little").view(np.bool_)

    @cached_property
    def host_parents_BN(self) -> np.ndarray:
        """`parents_BN` on the host; copied from the device only if the trees were made there and are no chains."""
        if self.is_chain:
            return np.broadcast_to(np.arange(ROOT, self.width - 1), (self.num_rows, self.width))
        return np.array(self._host_parents())

    def _host_parents(self) -> list[list[int]]:
        if self.rows is not None:
            return [[*row.parents, *[ROOT] * (self.width - len(row))] for row in self.rows]
        return self.parents_BN.tolist()

    @cached_property
    def host_depths_BT(self) -> np.ndarray:
        """`depths_BT` on the host (see `host_parents_BN`)."""
        if self.is_chain:
            return np.broadcast_to(np.arange(self.num_slots), (self.num_rows, self.num_slots))
        if self.rows is not None:
            return np.array([[0, *row.depths, *[1] * (self.width - len(row))] for row in self.rows])
        return self.host_ancestors_BTT.sum(-1, dtype=np.int64) - 1

    @cached_property
    def real_BN(self) -> Tensor:
        """bool: node, not padding."""
        if self.width == min(self.sizes, default=0):
            return torch.ones_like(self.tokens_BN, dtype=torch.bool)
        return torch.arange(self.width, device=self.device) < self.sizes_B.unsqueeze(1)

    @cached_property
    def sizes_B(self) -> Tensor:
        """int64 `sizes`, on the device."""
        return upload(self.sizes, self.device)

    @property
    def real_BT(self) -> Tensor:
        """bool: root or node, not padding."""
        return torch.nn.functional.pad(self.real_BN, (1, 0), value=True)


@lru_cache(64)
def _empty(num_rows: int, device: torch.device) -> TreeBatch:
    """The same each time: most rounds of a batch draft nothing."""
    nothing = torch.empty((num_rows, 0), dtype=torch.long, device=device)
    return TreeBatch(tokens_BN=nothing, parents_BN=nothing, sizes=(0,) * num_rows, depth=0, is_chain=True)
