"""How the exits of a run are compared with the target: what `ExitControl` learns from.

Shape legend: B rows, E exits, T kept slots, P prompt positions, C channels, V vocabulary, K scored slots of a draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.control.exits import ExitControl
from specdec.drafters.base import Outcome, Run
from specdec.drafters.exit_costs import clock_of
from specdec.drafters.exit_heads import TrainedHead
from trees import Draft

_SEED_POSITIONS = 32
"""DEL: the last prompt positions say which exits are worth trying."""
_SEED_ROWS = 64
"""States that pass the head for that, where the time is limited."""
_STRIDE = 4
"""Every how manyth of the other candidates is looked at, besides the best one and its neighbours."""


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

    def prepare(self, layer: int | None) -> None:
        """A round begins, in which this exit drafts, or none."""

    @abstractmethod
    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        """Learn from a round.

        Args:
            slots: of every row those that were committed.
            layer: the exit that drafted, None if none did.
        """

    def _learn_nothing(self, counts: Sequence[int] | np.ndarray) -> None:
        """Rows have committed these numbers of tokens, and what was known of the exits ages."""
        nothing = np.zeros((len(counts), 0, 1))
        self._control.observe(nothing, nothing, counts, exits=[])

    def _learn_from_draft(self, outcome: Outcome, draft: Draft, layer: int, confidence_BK: Tensor) -> None:
        """Learn of the exit that drafted what became of its draft, whose slots it scored with these confidences."""
        paths = outcome.own_paths
        slots = [
            [0, *(node + 1 for node in path)][: len(tokens)] for path, tokens in zip(paths, outcome.tokens, strict=True)
        ]
        num_rows, num_scored = len(slots), confidence_BK.shape[1]
        scores_BK = confidence_BK.float().cpu().numpy()
        width = max(map(len, slots))
        agreement_BT, confidence_BT, counts = np.zeros((num_rows, width)), np.zeros((num_rows, width)), []
        for row, (row_slots, path) in enumerate(zip(slots, paths, strict=True)):
            places = [_place(draft, row, slot) for slot in row_slots]
            scored = [place for place in places if 0 <= place < num_scored] if draft.trees.sizes[row] else []
            agreement_BT[row, : min(len(path), width)] = 1
            confidence_BT[row, : len(scored)] = scores_BK[row, scored]
            counts.append(len(scored))
        self._control.observe(agreement_BT[:, None], confidence_BT[:, None], counts, exits=[layer])


class OwnDrafts(ExitEvidence):
    """The exit that drafted is judged by what became of its draft; the others age. For trained exits."""

    needs_drafts = True

    def __init__(self, run: Run, control: ExitControl, heads: dict[int, TrainedHead]):
        super().__init__(run, control)
        self._heads = heads

    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        if layer is None:
            self._learn_nothing([1] * len(slots))
        else:
            self._learn_from_draft(outcome, draft, layer, self._heads[layer].confidence_BK)


def _place(draft: Draft, row: int, slot: int) -> int:
    """Of a slot among those that were scored, the root first; -1 for a leaf that never was."""
    if slot == 0 or draft.places is None:
        return slot if slot < max(draft.trees.sizes[row], 1) else -1
    place = draft.places[row][slot - 1]
    return place if place < 0 else place + 1


class Shadows(ExitEvidence):
    """What every candidate exit would have drafted at the committed positions (DEL, section 3.2: shadow tokens).

    The states are there already; only norm and head are run on them. In rounds in which the time does not allow that,
    the exit that drafted is judged by its draft.

    Args:
        confidence: of the slots that the exit has scored in this round, [B, K].
        layers: the candidates, in increasing order.
        share: of the time that this may take. Below 1, the best exit, its neighbours and every `_STRIDE`-th candidate,
            others each time, are looked at, in as many rounds as the share allows.
    """

    def __init__(
        self,
        run: Run,
        control: ExitControl,
        layers: Sequence[int],
        share: float,
        confidence: Callable[[], Tensor],
    ):
        super().__init__(run, control)
        self._confidence = confidence
        self._target = run.target
        self._layers = list(layers)
        self._share = share
        self._clock = clock_of(run.target.device)
        self._started = self._clock()
        self._last_seconds = 0.0
        self._sweep = 0
        num_rows = len(run.sequences)
        fewer = min(-(-len(layers) * _SEED_POSITIONS // 4 * num_rows // _SEED_ROWS), len(layers))
        step = 1 if share == 1 else fewer
        self._watched = self._layers[step // 2 :: step]
        self._target.keep_states([*self._watched, self._target.num_layers])

    def seed(self) -> None:
        positions = min(_SEED_POSITIONS if self._share == 1 else _SEED_POSITIONS // 4, self._num_prompt_states)
        if positions > 0:
            states = {depth: states_BPC[:, -positions:] for depth, states_BPC in self._target.states.items()}
            self._compare(states, None, np.full(len(self._run.sequences), positions))

    def prepare(self, layer: int | None) -> None:
        self._watched = self._due(layer)
        # always the same set, and so the same views: those of a round are few and small
        self._target.keep_states([*self._layers, self._target.num_layers] if self._watched else ())

    def learn(self, slots: Sequence[Sequence[int]], outcome: Outcome, draft: Draft, layer: int | None) -> None:
        counts = np.array([len(row) for row in slots])
        if not self._watched:
            if layer is None:
                self._learn_nothing(counts)
            else:
                self._learn_from_draft(outcome, draft, layer, self._confidence())
            return
        width = counts.max()
        slots_BT, tokens_BT = (
            torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._target.device)
            for rows in (slots, outcome.tokens)
        )
        rows_B1 = torch.arange(len(slots), device=slots_BT.device).unsqueeze(1)
        watched = {*self._watched, self._target.num_layers}
        states = {depth: self._target.states[depth][rows_B1, slots_BT] for depth in watched}
        self._compare(states, tokens_BT, counts)

    @property
    def _num_prompt_states(self) -> int:
        """Positions that all rows have besides padding, and of which the prefill has left states."""
        states = self._target.states.get(self._target.num_layers)
        kept = 0 if states is None else states.shape[1]
        return min(kept, *(len(tokens) - 1 for tokens in self._run.sequences.tokens))

    def _compare(self, states: dict[int, Tensor], tokens_BT: Tensor | None, counts: np.ndarray) -> None:
        """Observe how the watched exits agree with the target.

        Args:
            states: of these exits and of the last layer [B, T, C].
            tokens_BT: what the target chose; None: what is its likeliest.
        """
        started, layers = self._clock(), self._watched
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
        self._last_seconds = self._clock() - started
        self.seconds += self._last_seconds

    def _due(self, layer: int | None) -> list[int]:
        """The candidates to look at in this round."""
        if self._share == 1:
            return self._layers
        if self.seconds + self._last_seconds > self._share * (self._clock() - self._started):
            return []
        acceptance_E = self._control.statistics.acceptance_BE.mean(0)
        centre = self._layers.index(layer) if layer is not None else int(acceptance_E.argmax())
        self._sweep = (self._sweep + 1) % _STRIDE
        near = {centre - 1, centre, centre + 1} & set(range(len(self._layers)))
        places = near | set(range(self._sweep, len(self._layers), _STRIDE))
        return [self._layers[place] for place in sorted(places)]
