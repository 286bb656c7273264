"""Memory of keys and values: what rows and shared prefixes take, who fits in, and what goes to make room.

Rows take what they have written, and what they may write until the engine looks again; how long they may get at most is
not asked. So it can turn out that they do not fit: then a request waits once more (`Engine._suspend`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.prefixes import PrefixCache
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.model import TreeModel
from specdec.tree_model.pages import PAGE, PagePool

GROWTH = 32
"""Slots that a row may fill in a round."""
GROWTH_OF_NEW = 128
"""That a row has to have before it when a request is admitted: reading a prompt again takes many rounds."""

_NODES = 8
"""Drafted tokens of a row whose states are held, where layers have states."""
_SHARE = 0.5
"""Of what is free at the start, for keys and values: buffers that grow are copied, and drafters keep some too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a request takes.

    Args:
        length: slots, or tokens of its prompt.
        most: that it can come to.
        num_unread: of these slots, those that are not written yet.
    """

    length: int
    most: int
    num_unread: int = 0

    def grown(self, growth: int) -> int:
        return min(self.length + growth, self.most)


class KeyValueMemory:
    """Counts slots.

    Args:
        max_tokens: slots that there are.
        pool: whose pages rows and prefixes have; None: rows are padded to the longest.
    """

    def __init__(self, max_tokens: int, prefixes: PrefixCache, pool: PagePool | None):
        self.max_tokens = max_tokens
        self._prefixes = prefixes
        self._pool = pool

    def num_used(self, requests: Iterable[Held], growth: int = 0) -> int:
        """Slots that rows, prompts and shared prefixes take when every row has grown by so many."""
        requests = list(requests)
        grown = [held.grown(growth) for held in requests]
        if self._pool is None:
            return len(grown) * max(grown, default=0) + self._prefixes.num_tokens
        num_new = sum(grown) - sum(held.length - held.num_unread for held in requests)
        return PAGE * self._pool.num_pages + num_new

    def make_room(self, requests: Iterable[Held], growth: int) -> bool:
        """Whether there is room for rows to grow by so many slots; prefixes that were not used for long make some."""
        requests = list(requests)
        while self.num_used(requests, growth) > self.max_tokens:
            if not self._prefixes.num_tokens:
                return False
            self._prefixes.drop_oldest()
        return True


def page_pool(model: PreTrainedModel) -> PagePool | None:
    """For rows of this model, as it is prepared now; None where they have to be padded."""
    tree_model = TreeModel(model)
    return PagePool(*tree_model.views.packed.sizes) if tree_model.can_pack else None


@torch.no_grad()
def free_slots(model: PreTrainedModel, max_rows: int) -> int:
    """Slots that fit into a share of the free memory, as far as rows of the model's length could use them."""
    trial = TreeModel(model)
    trial.begin(1)
    trial.read(torch.zeros((1, 1), dtype=torch.long, device=trial.device))
    states = trial.cache.row_views(0)
    slot_bytes = max(1, sum(_num_bytes(part) for layer in states.slots for part in layer))
    state_bytes = sum(_num_bytes(state) for layer in states.recurrent for state in layer.values())
    if trial.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(trial.device)[0]
    else:
        free_bytes = psutil.virtual_memory().available
    free_bytes -= max_rows * (1 + _NODES) * state_bytes
    return max(1, min(int(_SHARE * free_bytes / slot_bytes), 2 * max_rows * position_limit(model)))


def _num_bytes(part: Tensor) -> int:
    return part.numel() * part.element_size()
