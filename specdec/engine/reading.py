"""Reads the prompts of admitted requests, one after the other, each in as many chunks as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.prefixes import PrefixCache
from specdec.engine.running_requests import RunningRequest
from specdec.tree_model.cache import RowStates
from specdec.tree_model.model import TreeModel
from specdec.tree_model.pages import PagePool
from specdec.tree_model.prefix_files import PrefixFiles, TextFiles, joined


class PromptReader:
    """Has a cache of its own, for the prompt that is being read.

    Args:
        prefixes: what is known of the beginnings of prompts.
        pool: whose pages prompts have; None if those of their own rows.
        files: what is known of them from earlier processes, and kept for later ones; None: nothing is.
    """

    def __init__(
        self, model: PreTrainedModel, prefixes: PrefixCache, pool: PagePool | None, files: PrefixFiles | None = None
    ):
        self._model = TreeModel(model)
        self._prefixes = prefixes
        self._pool = pool
        self._files = files
        self._of_prompt: TextFiles | None = None
        self.request: RunningRequest | None = None
        """Whose prompt is being read."""
        self._tokens: list[int] = []
        """Of the prompt but the last, which is the root of the first round."""
        self._num_read = 0
        self._known: RowStates | None = None
        """Of its beginning, from earlier prompts."""
        self._blocks: list[RowStates] = []
        """After that, from files, as far as they have been loaded."""
        self._loading: Iterator[RowStates] | None = None
        """Those to come; None: all that is known of the prompt is in the cache."""
        self._hidden: list[dict[int, Tensor]] = []

    def keep_states(self, depths: Iterable[int]) -> None:
        """Keep what `hidden` gives (see `TreeModel.keep_states`)."""
        self._model.keep_states(depths)

    @property
    def hidden(self) -> dict[int, Tensor]:
        """Hidden states [S, C] of the tokens that have been read here, which are the last ones of the prompt."""
        depths = self._hidden[0] if self._hidden else ()
        return {depth: torch.cat([part[depth][0] for part in self._hidden]) for depth in depths}

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are still to be read, or loaded."""
        return len(self._tokens) - self._num_read

    @property
    def states(self) -> RowStates | None:
        """Of all tokens read; None if there are none."""
        return self._model.cache.row_views(0) if self._tokens else None

    def begin(self, running: RunningRequest) -> None:
        """Begin with a prompt; nothing happens if it is the one that is being read."""
        if running is self.request:
            return
        self.request, self._tokens = running, running.prompt[:-1]
        self._model.begin(capacity=len(self._tokens), pool=self._pool)
        self._hidden, self._blocks, self._loading = [], [], iter(())
        self._num_read, self._known = self._prefixes.match(self._tokens)
        if self._files is not None:
            self._of_prompt = self._files.of_text(self._tokens)
            self._loading = self._of_prompt.blocks_after(self._num_read, self._pool)

    def load_block(self) -> bool:
        """Load one more of the blocks that files have of the prompt; False: there is none, and `read` may be called."""
        if self._loading is None:
            return False
        block = next(self._loading, None)
        if block is not None:
            self._blocks.append(block)
            self._num_read += block.length - self._num_read % block.length
            return True
        states = joined(self._known, self._blocks)
        self._known, self._blocks, self._loading = None, [], None
        self._num_read = 0 if states is None else states.length
        assert self.request is not None
        self.request.begin(self._num_read)
        self._model.join(states)
        return False

    def read(self, most: int) -> int:
        """Read some tokens more; returns their number."""
        part_1T = self._next(most)
        if part_1T.numel():
            self._model.read(part_1T)
            self._hidden.append(self._model.states)
            if part_1T.is_cuda:  # what is under way would count as the round's
                torch.cuda.synchronize(part_1T.device)
        self._has_read(part_1T.numel())
        return part_1T.numel()

    def _has_read(self, count: int) -> None:
        """Count tokens, and keep what is whole of them on disk: a little at a time, for others wait."""
        self._num_read += count
        if self._of_prompt is not None:
            self._of_prompt.keep(self._model.cache.row_views(0))

    @contextmanager
    def reading_along(self, target: TreeModel, most: int) -> Iterator[None]:
        """Within, the target's next forward also reads some tokens of the prompt (see `TreeModel.reading_along`)."""
        part_1T = self._next(most)
        with target.reading_along(self._model, part_1T) as along:
            try:
                yield
            finally:  # what comes after the forward may fail
                if along.is_read:
                    self._hidden.append(self._model.states)
                    self._has_read(part_1T.numel())

    def forget(self, running: RunningRequest) -> None:
        """The request is gone, or has all that it needs."""
        if running is self.request:
            self.request, self._tokens, self._num_read, self._hidden = None, [], 0, []
            self._of_prompt, self._known, self._blocks, self._loading = None, None, [], None
            self._model.begin(pool=self._pool)

    def _next(self, most: int) -> Tensor:
        part = self._tokens[self._num_read : self._num_read + most]
        return torch.tensor([part], dtype=torch.long, device=self._model.device)
