"""How often the target takes a draft's first token, its second one, ...: what Sequoia and calibrations are made of."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from specdec.bench.harness import Settings, generation_kwargs
from specdec.drafters import Drafter, DraftSession, Outcome, Run
from specdec.drafters.speculation import Speculation
from specdec.stages import stage
from specdec.suites import Prompt
from specdec.text.prompting import encode_prompts
from trees import (
    Calibration,
    Draft,
    Fixed,
    TreeBatch,
    count_ranks,
    count_shares,
    measure_acceptance,
    measure_calibration,
)
from trees.calibration import EDGES

_NUM_RANKS = 16
_NUM_CALIBRATED = 6
"""Ranks of a calibration: few later ones are tested."""


@stage("measuring what a draft's ranks are worth")
def measure_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter | str,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> tuple[float, ...]:
    """The `acceptance` of `trees.Sequoia`.

    Raises:
        ValueError: the outputs are too short to have a draft.
    """
    return probe(model, tokenizer, drafter, prompts, settings).acceptance


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter | str,
    prompts: Sequence[Prompt],
    settings: Settings,
) -> "Probe":
    """Decode the prompts with a fan of siblings and count which is accepted.

    Raises:
        ValueError: the outputs are too short to have a draft.
    """
    torch.manual_seed(settings.seed)
    fan = Fixed((_NUM_RANKS,))
    found = Probe(Speculation.of(drafter, tree=fan).drafter)
    for prompt in prompts:
        inputs = encode_prompts(tokenizer, [prompt.text]).to(model.device)
        specdec.generate(model, **inputs, **generation_kwargs(model, settings), drafter=found, tree=fan)
    if not found.acceptance:
        raise ValueError("no draft was verified to measure Sequoia's acceptance on: allow more new tokens")
    return found


class Probe(Drafter):
    """Another drafter, and what became of its children by rank."""

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self.needs_exits = drafter.needs_exits
        self._accepted = [0] * _NUM_RANKS
        self._tested = [0] * _NUM_RANKS
        self._shares = np.zeros((2, _NUM_CALIBRATED, len(EDGES) + 1), np.int64)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The `acceptance` of `trees.Sequoia`."""
        return measure_acceptance(self._accepted, self._tested)

    @property
    def calibration(self) -> Calibration:
        """The `calibration` of `trees.DySpec`; not meaningful where no tokens are drawn."""
        return measure_calibration(*self._shares)

    def start(self, run: Run) -> DraftSession:
        return _ProbeSession(self, self._drafter.start(run))

    def count(self, trees: TreeBatch, paths: Sequence[Sequence[int]]) -> None:
        for row, path in enumerate(paths):
            accepted, tested = count_ranks(trees.row(row), path, _NUM_RANKS)
            for rank in range(_NUM_RANKS):
                self._accepted[rank] += accepted[rank]
                self._tested[rank] += tested[rank]
            if trees.row(row).probs is not None:
                self._shares += count_shares(trees.row(row), path, _NUM_CALIBRATED)


class _ProbeSession(DraftSession):
    def __init__(self, probe: Probe, session: DraftSession):
        self._probe = probe
        self._session = session
        self._trees: TreeBatch | None = None

    def propose(self, max_depths: Sequence[int]) -> Draft:
        draft = self._session.propose(max_depths)
        self._trees = draft.trees
        return draft

    def observe(self, outcome: Outcome) -> None:
        if self._trees is not None:
            self._probe.count(self._trees, outcome.paths)
        self._session.observe(outcome)

    def select_rows(self, rows: Sequence[int]) -> None:
        self._session.select_rows(rows)

    def close(self) -> None:
        self._session.close()
