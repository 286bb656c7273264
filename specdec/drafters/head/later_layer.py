"""One of several MTP layers, but the first: it reads what the layer before has made of the token before.

Whether it is asked depends on how deep trees grow. What it would read waits until then, so that a layer whose token
nobody drafts is not run.

Shape legend: B rows, W tokens that wait, N nodes so far, M nodes of the newest layer, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from specdec.drafters.head.graphed import runner_of
from specdec.drafters.head.network import HeadNetwork
from specdec.tree_model.model import TreeModel
from trees import GrowingTrees


class LaterLayer:
    """A layer at work on a run.

    Attributes:
        made_BNC: its outputs at the first nodes of this round's trees.
    """

    made_BNC: Tensor

    def __init__(self, layer: HeadNetwork, target: TreeModel):
        self.runner = runner_of(layer, target)
        weight_C = layer.norm.weight
        self._nothing_0C = weight_C.new_empty(0, len(weight_C))
        self._no_tokens = torch.empty(0, dtype=torch.long, device=weight_C.device)
        self._before: list[Tensor] = []
        """For each row what the layer before has made of its newest token, [1, C]; [0, C] where that is nothing."""
        self._tokens: list[Tensor] = []
        """That wait, int64 [W] for each row, and what stands before each of them, [W, C]."""
        self._states: list[Tensor] = []

    def join(self) -> None:
        """A row more, at the end."""
        self._before.append(self._nothing_0C)
        self._tokens.append(self._no_tokens)
        self._states.append(self._nothing_0C)

    def select_rows(self, rows: Sequence[int]) -> None:
        for part in (self._before, self._tokens, self._states):
            part[:] = [part[row] for row in rows]

    def feed(self, tokens: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """The layer before has read committed tokens [W] of each row, and made [W, C] of them."""
        for row, (tokens_W, made_WC) in enumerate(zip(tokens, made, strict=True)):
            if len(made_WC):
                states_WC = torch.cat([self._before[row], made_WC[:-1]])
                self._tokens[row] = torch.cat([self._tokens[row], tokens_W[len(tokens_W) - len(states_WC) :]])
                self._states[row] = torch.cat([self._states[row], states_WC])
                self._before[row] = made_WC[-1:]

    def begin_round(self) -> None:
        """New trees grow from each row's newest token."""
        self.made_BNC = self._nothing_0C.expand(len(self._before), 0, -1)

    def read(self, most: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Commit what waits, in forwards of so many tokens of a row; returns what the next layer is to be fed."""
        tokens, states = list(self._tokens), list(self._states)
        made: list[list[Tensor]] = [[self._nothing_0C] for _ in tokens]
        for start in range(0, max(map(len, tokens)), most):
            part = [own[start : start + most] for own in tokens]
            sizes = list(map(len, part))
            states_BWC = pad_sequence([own[start : start + most] for own in states], batch_first=True)
            output = self.runner.append_pairs(pad_sequence(part, batch_first=True), states_BWC, sizes)
            for own, states_WC, size in zip(made, output.states_BTC, sizes, strict=True):
                own.append(states_WC[:size])
        self._tokens = [self._no_tokens] * len(tokens)
        self._states = [self._nothing_0C] * len(tokens)
        return tokens, [torch.cat(own) for own in made]

    def score(self, grown: GrowingTrees, parents_BN: np.ndarray, below: LaterLayer | None) -> Tensor:
        """What the LM head reads [B, M, C] of the newest nodes; nodes that it has not read are read with them.

        What it says of nodes deeper than this layer is in the stack means nothing.

        Args:
            parents_BN: int64, grown indices.
            below: the layer before; None for the first, of which nothing is known past the roots.
        """
        start, num_new = self.made_BNC.shape[1], grown.parents_BM.shape[1]
        nothing_1C = torch.zeros_like(self._nothing_0C.new_empty(1, self._nothing_0C.shape[1]))
        roots_B1C = torch.stack([own if len(own) else nothing_1C for own in self._before])
        outputs_BKC = roots_B1C if below is None else torch.cat([roots_B1C, below.made_BNC], 1)
        outputs_BKC = pad(outputs_BKC, (0, 0, 0, grown.num_slots - outputs_BKC.shape[1]))
        parents_BW1 = torch.from_numpy(parents_BN[:, start:] + 1).to(outputs_BKC.device).unsqueeze(2)
        before_BWC = outputs_BKC.gather(1, parents_BW1.expand(-1, -1, outputs_BKC.shape[2]))
        offsets_BW = torch.from_numpy(grown.host_depths_BT[:, 1 + start :] - 1).to(outputs_BKC.device)
        seen_BWK = grown.ancestors_BTT[:, 1 + start :, 1:].contiguous()
        output = self.runner.run_head(grown.tokens_BN[:, start:], before_BWC, offsets_BW, seen_BWK)
        self.made_BNC = torch.cat([self.made_BNC, output.states_BTC], 1)
        return output.normed_BTC[:, -num_new:]
