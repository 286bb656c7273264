"""Shadow tokens: what every exit would have drafted at the positions that were committed (DEL, section 3.2).

The states are there already; only the model's norm and head are run on them.

Shape legend: B rows, E exits, T kept slots, P prompt positions, C channels, N = E T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.decoding.drafter import Outcome, Run
from specdec.tree_model.early_exit import EarlyExitModel
from trees.uploads import upload

_SEED_POSITIONS = 32
"""DEL: the last prompt positions say which exits are worth trying."""
_SEED_ROWS = 64
"""States that pass the head for that, where the time is limited."""
_STRIDE = 4
"""Besides the best candidate and its neighbours, every n-th of the others is checked."""


class Seen(NamedTuple):
    """How an exit did at some positions.

    Args:
        confidences: its largest probability at each.
        agreements: the chance that its token would be accepted: 0 or 1 where decoding is greedy.
    """

    exit_layer: int
    confidences: Sequence[float]
    agreements: Sequence[float]


class ShadowTokens:
    """Compares exits with the target.

    Args:
        layers: the candidates, in increasing order.
        share: of the time that this may take. Below 1, the best exit, its neighbours and every `_STRIDE`-th candidate,
            others each time, are looked at, in as many rounds as the share allows.

    Attributes:
        seconds: spent so far.
    """

    def __init__(self, run: Run, target: EarlyExitModel, layers: Sequence[int], share: float):
        self.seconds = 0.0
        self._run = run
        self._target = target
        self._layers = list(layers)
        self._share = share
        self._started = perf_counter()
        self._last_seconds = 0.0
        self._sweep = 0
        num_states = len(layers) * _SEED_POSITIONS // 4 * len(run.sequences)
        step = 1 if share == 1 else min(max(1, -(-num_states // _SEED_ROWS)), len(layers))
        self._watched = self._layers[step // 2 :: step]
        self._target.keep_states([*self._watched, self._target.num_layers])

    def seed(self) -> Iterator[Seen]:
        """How exits do on the end of the prompt, which the target has just read."""
        positions = min(_SEED_POSITIONS if self._share == 1 else _SEED_POSITIONS // 4, self._num_prompt_states)
        if positions <= 0:
            return iter(())
        states = {depth: states_BPC[:, -positions:] for depth, states_BPC in self._target.states.items()}
        return self._compare(states, None, [positions] * len(self._run.sequences))

    def prepare(self, centre: int) -> None:
        """A round begins.

        Args:
            centre: the exit that matters most.
        """
        self._watched = self._due(centre)
        # always the same set, and so the same views: those of a round are few and small
        self._target.keep_states([*self._layers, self._target.num_layers] if self._watched else ())

    def compare(self, slots: Sequence[Sequence[int]], outcome: Outcome) -> Iterator[Seen]:
        """How the exits that are watched did in a round.

        Args:
            slots: of every row those that were committed.
        """
        if not self._watched:
            return iter(())
        counts = list(map(len, slots))
        told = [[[*row, *[0] * (max(counts) - len(row))] for row in rows] for rows in (slots, outcome.tokens)]
        slots_BT, tokens_BT = upload(told, self._target.device)
        rows_B1 = torch.arange(len(slots), device=slots_BT.device).unsqueeze(1)
        watched = {*self._watched, self._target.num_layers}
        states = {depth: self._target.states[depth][rows_B1, slots_BT] for depth in watched}
        return self._compare(states, tokens_BT, counts)

    @property
    def _num_prompt_states(self) -> int:
        """Positions that all rows have besides padding, and of which the prefill has left states."""
        states = self._target.states.get(self._target.num_layers)
        kept = 0 if states is None else states.shape[1]
        return min(kept, *(len(tokens) - 1 for tokens in self._run.sequences.tokens))

    def _compare(self, states: dict[int, Tensor], tokens_BT: Tensor | None, counts: Sequence[int]) -> Iterator[Seen]:
        """
        Args:
            states: of the watched exits and of the last layer [B, T, C].
            tokens_BT: what the target chose; None: what is its likeliest.
            counts: positions of each row that are there.
        """
        started, sampler = perf_counter(), self._run.sampler
        hidden_BETC = torch.stack([states[layer] for layer in self._watched], 1)
        logits_BNV = self._target.exit_logits(hidden_BETC.flatten(1, 2))
        q_BETV = sampler.warp(logits_BNV).softmax(-1).unflatten(1, hidden_BETC.shape[1:3])
        confidence_BET, choice_BET = q_BETV.max(-1)
        if sampler.do_sample:
            p_BTV = sampler.warp(self._target.exit_logits(states[self._target.num_layers])).softmax(-1)
            agreement_BET = torch.minimum(q_BETV, p_BTV.unsqueeze(1)).sum(-1)
        else:
            if tokens_BT is None:
                tokens_BT = self._target.exit_logits(states[self._target.num_layers]).argmax(-1)
            agreement_BET = (choice_BET == tokens_BT.unsqueeze(1)).float()
        kept = _kept(torch.stack([confidence_BET, agreement_BET]), counts)
        self._last_seconds = perf_counter() - started
        self.seconds += self._last_seconds
        return map(Seen, self._watched, *kept)

    def _due(self, centre: int) -> list[int]:
        """The candidates to look at in this round."""
        if self._share == 1:
            return self._layers
        if self.seconds + self._last_seconds > self._share * (perf_counter() - self._started):
            return []
        self._sweep = (self._sweep + 1) % _STRIDE
        index = self._layers.index(centre)
        near = {index - 1, index, index + 1} & set(range(len(self._layers)))
        indices = near | set(range(self._sweep, len(self._layers), _STRIDE))
        return [self._layers[index] for index in sorted(indices)]


def _kept(values_KBET: Tensor, counts: Sequence[int]) -> list[list[list[float]]]:
    """Of each kind, and for each exit, the values of all rows, without what lies past the rows' ends."""
    return [
        [list(chain.from_iterable(row[:n] for row, n in zip(rows, counts, strict=True))) for rows in per_exit]
        for per_exit in values_KBET.transpose(1, 2).tolist()
    ]
