"""How the exits of a run are compared with the target: what `ExitControl` learns from.

Shape legend: B rows, E exits, T kept slots, P prompt positions, C channels, V vocabulary, K scored slots of a draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from specdec.control import ExitControl
from specdec.drafters.base import Outcome, Run
from specdec.drafters.exit_heads import TrainedHead
from trees import Draft

_SEED_POSITIONS = 32
"""DEL: the last prompt positions say which exits are worth trying."""
_SEED_ROWS = 64
"""States that pass the head for that, where the time is limited."""


class ExitEvidence(ABC):
    """Tells a control after each round how well exits agreed with the target."""

    seconds = 0.0
    """Spent so far."""
    needs_drafts = False
    """Whether nothing is learnt of exits that do not draft."""

    def __init__(self, run: Run, control: ExitControl):
        self._run = run
        self._control = control

    def seed(self) -> None:
        """Learn from the prompt, which the target has just read."""

    def prepare(self, layer: int | None, *, is_idle: bool) -> None:
        """A round begins, in which this exit drafts, or none. `learn` will not hear of it if it is idle."""

    @abstractmethod
    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        """Learn from a round.

        Args:
            slots: of every row those that were committed.
            layer: the exit that drafted, None if none did.
        """


class OwnDrafts(ExitEvidence):
    """The exit that drafted is judged by what became of its draft; the others age. For trained exits."""

    needs_drafts = True

    def __init__(self, run: Run, control: ExitControl, heads: dict[int, TrainedHead]):
        super().__init__(run, control)
        self._heads = heads

    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        num_rows = len(slots)
        if layer is None:
            self._control.observe(np.zeros((num_rows, 0, 1)), np.zeros((num_rows, 0, 1)), [1] * num_rows, exits=[])
            return
        confidence_BK = self._heads[layer].confidence_BK.cpu().numpy()
        width = max(map(len, slots))
        agreement_BT, confidence_BT, counts = np.zeros((num_rows, width)), np.zeros((num_rows, width)), []
        for row, (row_slots, path) in enumerate(zip(slots, outcome.paths, strict=True)):
            places = [self._place(draft, row, slot) for slot in row_slots]
            scored = (
                [place for place in places if 0 <= place < confidence_BK.shape[1]] if draft.trees.sizes[row] else []
            )
            agreement_BT[row, : min(len(path), width)] = 1
            confidence_BT[row, : len(scored)] = confidence_BK[row, scored]
            counts.append(len(scored))
        self._control.observe(agreement_BT[:, None], confidence_BT[:, None], counts, exits=[layer])

    def _place(self, draft: Draft, row: int, slot: int) -> int:
        """Of a slot among those that were scored, the root first; -1 for a leaf that never was."""
        if slot == 0 or draft.places is None:
            return slot if slot < max(draft.trees.sizes[row], 1) else -1
        place = draft.places[row][slot - 1]
        return place if place < 0 else place + 1


class Shadows(ExitEvidence):
    """What every candidate exit would have drafted at the committed positions (DEL, section 3.2: shadow tokens).

    The states are there already; only norm and head are run on them.

    Args:
        layers: the candidates, in increasing order.
        share: of the time that this may take. Below 1, the neighbours of the best exit and one more candidate, each
            in its turn, are looked at, in as many rounds as the share allows.
    """

    def __init__(self, run: Run, control: ExitControl, layers: Sequence[int], share: float):
        super().__init__(run, control)
        self._target = run.target
        self._layers = list(layers)
        self._share = share
        self._started = perf_counter()
        self._last_seconds = 0.0
        self._sweep = 0
        num_rows = len(run.sequences)
        step = 1 if share == 1 else -(-len(layers) * _SEED_POSITIONS // 4 * num_rows // _SEED_ROWS)
        self._look_at(self._layers[step // 2 :: step])

    def seed(self) -> None:
        positions = min(_SEED_POSITIONS if self._share == 1 else _SEED_POSITIONS // 4, self._num_prompt_states)
        if positions > 0:
            states = {depth: states_BPC[:, -positions:] for depth, states_BPC in self._target.states.items()}
            self._compare(states, None, np.full(len(self._run.sequences), positions))

    def prepare(self, layer: int | None, *, is_idle: bool) -> None:
        self._look_at([] if is_idle else self._due(layer))

    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        counts = np.array([len(row) for row in slots])
        width = counts.max()
        slots_BT, tokens_BT = (
            torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._target.device)
            for rows in (slots, outcome.tokens)
        )
        rows_B1 = torch.arange(len(slots), device=slots_BT.device).unsqueeze(1)
        states = {depth: states_BTC[rows_B1, slots_BT] for depth, states_BTC in self._target.states.items()}
        self._compare(states, tokens_BT, counts)

    @property
    def _num_prompt_states(self) -> int:
        """Positions that all rows have besides padding, and of which the prefill has left states."""
        states = self._target.states.get(self._target.num_layers)
        kept = 0 if states is None else states.shape[1]
        return min(kept, *(len(tokens) - 1 for tokens in self._run.sequences.tokens))

    def _look_at(self, layers: list[int]) -> None:
        """Have the next forward keep what comparing these exits with the target takes."""
        self._watched = layers
        self._target.keep_states([*layers, self._target.num_layers] if layers else ())

    def _compare(self, states: dict[int, Tensor], tokens_BT: Tensor | None, counts: np.ndarray) -> None:
        """Observe how the watched exits agree with the target.

        Args:
            states: of these exits and of the last layer [B, T, C].
            tokens_BT: what the target chose; None: what is its likeliest.
        """
        started, layers = perf_counter(), self._watched
        if not layers:
            nothing = np.zeros((len(counts), 0, int(counts.max())))
            self._control.observe(nothing, nothing, counts, exits=[])
            return
        sampler = self._run.sampler
        hidden_BETC = torch.stack([states[layer] for layer in layers], 1)
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
        self._control.observe(agreement_BET.cpu().numpy(), confidence_BET.cpu().numpy(), counts, exits=layers)
        self._last_seconds = perf_counter() - started
        self.seconds += self._last_seconds

    def _due(self, layer: int | None) -> list[int]:
        """The candidates to look at in this round."""
        if self._share == 1:
            return self._layers
        if self.seconds + self._last_seconds > self._share * (perf_counter() - self._started):
            return []
        acceptance_E = self._control.statistics.acceptance_BE.mean(0)
        centre = self._layers.index(layer) if layer is not None else int(acceptance_E.argmax())
        self._sweep = (self._sweep + 1) % len(self._layers)
        places = {centre - 1, centre, centre + 1, self._sweep} & set(range(len(self._layers)))
        return [self._layers[place] for place in sorted(places)]
