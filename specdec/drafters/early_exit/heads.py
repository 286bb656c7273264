"""What turns the hidden states of an exit into a draft.

`SharedHead` is the model's own final norm and head. `TrainedHead` is an exit module (`specdec.exits`): a decoder block
that also sees what the target made of the position before, with keys and values of its own.

Shape legend: B rows, M nodes of a layer, K nodes so far and the root, W pending tokens, P prompt, C channels,
X = 2 C, V vocabulary, S vocabulary of an exit (V for a shared head).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from specdec.decoding.sequences import Sequences
from specdec.exits.module import Exit
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_kinds import LayerKind
from specdec.tree_model.model import TreeModel
from trees import GrowingTrees

PROMPT_POSITIONS = 64
"""The last ones of a prompt, which a trained exit reads: more did not change what was accepted."""


class ExitHead(ABC):
    """Scores the tokens that follow a state of one exit layer."""

    layer: int

    @property
    def vocab_ids(self) -> Tensor | None:
        """int64 [S]: the target's token that each logit stands for; None where they are the same."""
        return None

    @property
    @abstractmethod
    def weights(self) -> nn.Module:
        """What it drafts with: what is known of an exit is kept for as long as that is."""

    @abstractmethod
    def score_root(self, hidden_B1C: Tensor) -> Tensor:
        """Logits [B, 1, S] after the roots, of which the exit's states are given. Begins a round."""

    @abstractmethod
    def score_nodes(self, hidden_BMC: Tensor, grown: GrowingTrees) -> Tensor:
        """Logits [B, M, S] after the newest layer of the growing trees."""

    @abstractmethod
    def timing_run(self, target: EarlyExitModel, num_rows: int) -> Callable[[Tensor], Tensor]:
        """A function that costs what this head adds to a draft step, of states [B, 1, C]; for timing.

        Args:
            target: a copy of the run's target with a run of its own.
        """

    def begin(self) -> None:
        """The target has read the prompt and committed the first token."""

    def observe(self, slots: Sequence[Sequence[int]]) -> None:
        """The last round, in which this head may have been idle, kept these slots of every row."""

    def select_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""


class SharedHead(ExitHead):
    """The model's final norm and head."""

    def __init__(self, layer: int, target: EarlyExitModel):
        self.layer = layer
        self._target = target

    @property
    def weights(self) -> nn.Module:
        return self._target.model

    def score_root(self, hidden_B1C: Tensor) -> Tensor:
        return self._target.exit_logits(hidden_B1C)

    def score_nodes(self, hidden_BMC: Tensor, grown: GrowingTrees) -> Tensor:
        return self._target.exit_logits(hidden_BMC)

    def timing_run(self, target: EarlyExitModel, num_rows: int) -> Callable[[Tensor], Tensor]:
        return target.exit_logits


class TrainedHead(ExitHead):
    """An exit module at work on a run.

    The module's input at a position is the exit's state there and the target's last state one position earlier. Of
    committed tokens both are known; of drafted ones the module's own output stands in for the target's state. So what
    the module has computed for drafted tokens is dropped after the round, and those that were accepted pass it again,
    together with the next root.

    The target must keep the states of the exit's layer and of its last one.
    """

    def __init__(self, module: Exit, target: EarlyExitModel, sequences: Sequences):
        self.layer = module.layer
        self._module = module
        self._target = target
        self._sequences = sequences
        self._pending: list[_Pending] = []
        self._block: _BlockModel
        self._outputs_BKC: Tensor

    @property
    def weights(self) -> nn.Module:
        return self._module

    @property
    def vocab_ids(self) -> Tensor | None:
        return self._module.vocab_ids

    def score_root(self, hidden_B1C: Tensor) -> Tensor:
        inputs = [pending.take(hidden_1C) for pending, hidden_1C in zip(self._pending, hidden_B1C, strict=True)]
        sizes = [len(rows_WX) for rows_WX in inputs]
        features_BWX = pad_sequence(inputs, batch_first=True)
        offsets_BW = torch.arange(max(sizes), device=hidden_B1C.device).expand(len(sizes), max(sizes))
        seen_BWW = None if max(sizes) == 1 else (offsets_BW[:, :, None] >= offsets_BW[:, None]).contiguous()
        output_BWC, normed_BWC = self._block.run(self._module.fuse(features_BWX), offsets_BW, seen_BWW)
        self._block.commit([range(size) for size in sizes])
        if min(sizes) == max(sizes):
            self._outputs_BKC, normed_B1C = output_BWC[:, -1:], normed_BWC[:, -1:]
        else:
            rows_B, last_B = torch.arange(len(sizes)), torch.tensor(sizes, device=output_BWC.device) - 1
            self._outputs_BKC, normed_B1C = (x[rows_B, last_B].unsqueeze(1) for x in (output_BWC, normed_BWC))
        return self._module.head(normed_B1C)

    def score_nodes(self, hidden_BMC: Tensor, grown: GrowingTrees) -> Tensor:
        if grown.is_chain:
            before_BMC, seen_BMK = self._outputs_BKC[:, -1:], None
        else:
            parents_BM1 = torch.from_numpy(grown.parents_BM).to(hidden_BMC.device).unsqueeze(2) + 1
            before_BMC = self._outputs_BKC.gather(1, parents_BM1.expand(-1, -1, self._outputs_BKC.shape[2]))
            seen_BMK = grown.seen_nodes_BMN
        fused_BMC = self._module.fuse(torch.cat([hidden_BMC, before_BMC], 2))
        output_BMC, normed_BMC = self._block.run(fused_BMC, grown.depths_BM - 1, seen_BMK)
        self._outputs_BKC = torch.cat([self._outputs_BKC, output_BMC], 1)
        return self._module.head(normed_BMC)

    def observe(self, slots: Sequence[Sequence[int]]) -> None:
        self._block.cache.rollback()
        last = self._target.states[self._target.num_layers]
        for row, (pending, kept) in enumerate(zip(self._pending, slots, strict=True)):
            pending.add(self._exit_states(row, kept), _at(last[row], kept))

    def select_rows(self, rows: Sequence[int]) -> None:
        self._block.select_rows(rows)
        self._pending = [self._pending[row] for row in rows]

    def begin(self) -> None:
        """Make the end of the prompt pending, as far as the last forward of the prefill saw it."""
        last_BPC = self._target.states[self._target.num_layers]
        limit = min(last_BPC.shape[1], self._module.window, PROMPT_POSITIONS)
        num_seen = [min(limit, len(tokens) - 1) for tokens in self._sequences.tokens]
        for row, count in enumerate(num_seen):
            pending = _Pending(last_BPC.new_zeros((1, last_BPC.shape[2])))
            kept = range(last_BPC.shape[1] - count, last_BPC.shape[1])
            pending.add(self._exit_states(row, kept), last_BPC[row, kept.start :])
            self._pending.append(pending)
        first_B = self._target.next_positions_B - torch.tensor(num_seen, device=last_BPC.device)
        self._block = _BlockModel(self._module, self._target, first_B)

    def timing_run(self, target: EarlyExitModel, num_rows: int) -> Callable[[Tensor], Tensor]:
        first_B = torch.zeros(num_rows, dtype=torch.long, device=target.device)
        block = _BlockModel(self._module, target, first_B)
        offsets_B1 = torch.zeros((num_rows, 1), dtype=torch.long, device=target.device)

        def score(hidden_B1C: Tensor) -> Tensor:
            fused_B1C = self._module.fuse(torch.cat([hidden_B1C, hidden_B1C], 2))
            _, normed_B1C = block.run(fused_B1C, offsets_B1, None)
            return self._module.head(normed_B1C).softmax(-1).topk(2).values

        return score

    def _exit_states(self, row: int, kept: Sequence[int]) -> Tensor:
        """States [W, C] of the committed tokens before the new root, which stood in these slots."""
        if self.layer:
            return _at(self._target.states[self.layer][row], kept)
        prefix = self._sequences.prefix(row)
        return self._target.embed(prefix[None, len(prefix) - 1 - len(kept) : -1])[0]


def _at(states_TC: Tensor, kept: Sequence[int]) -> Tensor:
    """States of increasing slots; without a copy where they are the first ones, as where nothing is drafted."""
    is_prefix = not kept or kept[-1] == len(kept) - 1
    return states_TC[: len(kept)] if is_prefix else states_TC[list(kept)]


class _Pending:
    """Committed tokens of a row that an exit module has not seen.

    Args:
        before_1C: the target's last state before the first of them.
    """

    def __init__(self, before_1C: Tensor):
        self._hidden: list[Tensor] = []
        self._before = [before_1C]

    def add(self, hidden_WC: Tensor, last_WC: Tensor) -> None:
        """More committed tokens: the exit's and the target's last states there.

        If `take` has just taken the first of them, as the root of the round, it is left out.
        """
        self._hidden.append(hidden_WC if self._before else hidden_WC[1:])
        self._before.append(last_WC)

    def take(self, root_1C: Tensor) -> Tensor:
        """The module's inputs [W + 1, 2 C] for the pending tokens and a root; then nothing is pending."""
        inputs = torch.cat([torch.cat([*self._hidden, root_1C]), torch.cat(self._before)], 1)
        self._hidden, self._before = [], []
        return inputs


class _BlockModel(TreeModel):
    """The block of an exit module as a model of one layer, with a cache of its own.

    Args:
        first_B: position of the first token that each row will see.
    """

    def __init__(self, module: Exit, target: TreeModel, first_B: Tensor):
        super().__init__(target.model)
        self._view = target.views.block(module.block)
        self.kinds = [LayerKind("sliding_attention", module.window)]
        self.cache = TreeCache(1, len(first_B))
        self._prompt_BP = None
        self._lag_AB = -first_B[None]

    def run(self, fused_BTC: Tensor, offsets_BT: Tensor, seen_BTK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append T slots to the tail (see `TreeModel.forward`); the block's output, before and after the norm."""
        self._view.set_input_states(fused_BTC)
        outputs = self._call(self._view, self.cache.tail, torch.zeros_like(offsets_BT), offsets_BT, seen_BTK)
        return self._view.states[0], outputs.last_hidden_state
