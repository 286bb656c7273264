"""What a verification has found: the accepted path of every row, and the token after it.

Shape legend: B rows, D depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.errors import NumericalError
from trees import TreeBatch

_NUM_HEADS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Acceptance:
    """The outcome of a verification.

    Args:
        path_BD: int64 accepted node indices from the root down; entries past the row's count are not meaningful.
        counts_B: int64 number of accepted nodes.
        next_B: int64 the token after the path: the bonus if the path ends in a leaf, else the correction. -1 where
            it was noticed that the target's scores are no numbers.
    """

    path_BD: Tensor
    counts_B: Tensor
    next_B: Tensor

    @property
    def has_next(self) -> bool:
        """Whether there is a token after every path."""
        return bool((self.next_B >= 0).all())

    @property
    def last_B(self) -> Tensor:
        """int64 slot at which the path ends."""
        slots_BT = torch.nn.functional.pad(self.path_BD + 1, (1, 0))
        return slots_BT.gather(1, self.counts_B[:, None])[:, 0]

    def if_finite(self, scores_BTV: Tensor) -> Acceptance:
        """The same where scores make a distribution. Where they make none no child is accepted, so that only the last
        slot can be such a one: then `next_B` is -1."""
        rows_B = torch.arange(len(scores_BTV), device=scores_BTV.device)
        is_finite_B = scores_BTV[rows_B, self.last_B].amax(-1).isfinite()
        return replace(self, next_B=torch.where(is_finite_B, self.next_B, -1))


class HostAcceptance(Acceptance):
    """One that was found on the host; its tensors are made when they are asked for.

    Attributes:
        paths: accepted nodes of each row.
        following: the tokens after them.
    """

    paths: list[list[int]]
    following: list[int]

    def __init__(self, paths: list[list[int]], following: list[int], device: torch.device):
        vars(self).update(paths=paths, following=following, _device=device)

    @property
    def has_next(self) -> bool:
        return min(self.following) >= 0

    @cached_property
    def path_BD(self) -> Tensor:
        depth = max(map(len, self.paths))
        padded = [[*path, *[0] * (depth - len(path))] for path in self.paths]
        return self._tensor(padded).view(len(padded), depth)

    @cached_property
    def counts_B(self) -> Tensor:
        return self._tensor([len(path) for path in self.paths])

    @cached_property
    def next_B(self) -> Tensor:
        return self._tensor(self.following)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=vars(self)["_device"])


class TabledAcceptance(Acceptance):
    """One that lies in a table, which is read in one copy.

    Attributes:
        table_BX: see `table_of`.
    """

    table_BX: Tensor

    def __init__(self, table_BX: Tensor):
        depth = (table_BX.shape[1] - _NUM_HEADS) // 2
        super().__init__(
            counts_B=table_BX[:, 0], next_B=table_BX[:, 1], path_BD=table_BX[:, _NUM_HEADS : _NUM_HEADS + depth]
        )
        vars(self).update(table_BX=table_BX)


def table_of(trees: TreeBatch, acceptance: Acceptance) -> Tensor:
    """int64 [B, 2 + 2D]: for each row the count, the next token, the path, and the path's tokens."""
    path_BD = acceptance.path_BD
    token_BD = trees.tokens_BN.gather(1, path_BD) if trees.width else path_BD
    return torch.cat([acceptance.counts_B[:, None], acceptance.next_B[:, None], path_BD, token_BD], 1)


class Accepted(NamedTuple):
    """For each row the accepted nodes, and its candidate tokens: theirs, then the next one."""

    paths: list[list[int]]
    candidates: list[list[int]]

    def in_chains(self) -> Accepted:
        """What is left if nothing is kept but the chain of the first nodes. The first token beside it stays, as the
        next one: what follows that is given up whatever it is, so tokens keep their distribution."""
        lengths = [next((place for place, node in enumerate(path) if node != place), len(path)) for path in self.paths]
        return Accepted(
            [path[:length] for path, length in zip(self.paths, lengths, strict=True)],
            [tokens[: length + 1] for tokens, length in zip(self.candidates, lengths, strict=True)],
        )


def to_host(trees: TreeBatch, acceptance: Acceptance) -> Accepted:
    """The outcome of a verification on the host, in one copy at most.

    Raises:
        NumericalError: there is no token after a path.
    """
    found = _to_host(trees, acceptance)
    if min(candidates[-1] for candidates in found.candidates) < 0:
        raise NumericalError(
            "the target's scores are not numbers (NaN, or infinite everywhere): check the weights and the dtype "
            "(float16 overflows on CPU), or pass remove_invalid_values=True"
        )
    return found


def _to_host(trees: TreeBatch, acceptance: Acceptance) -> Accepted:
    if isinstance(acceptance, HostAcceptance) and not trees.width:
        return Accepted(acceptance.paths, [[token] for token in acceptance.following])
    if isinstance(acceptance, HostAcceptance) and trees.rows is not None:
        found = zip(trees.rows, acceptance.paths, acceptance.following, strict=True)
        candidates = [[*(tree.tokens[node] for node in path), token] for tree, path, token in found]
        return Accepted(acceptance.paths, candidates)
    table_BX = acceptance.table_BX if isinstance(acceptance, TabledAcceptance) else table_of(trees, acceptance)
    depth = (table_BX.shape[1] - _NUM_HEADS) // 2
    paths, candidates = [], []
    for count, next_token, *rest in table_BX.tolist():
        paths.append(rest[:count])
        candidates.append([*rest[depth : depth + count], next_token])
    return Accepted(paths, candidates)
