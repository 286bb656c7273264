"""Everything that a drafter's session can draw in a round, with its probability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import trees.layered
import trees.token_source
from specdec.decoding.drafter import Run
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter, DraftSession, Outcome
from specdec.drafters.model import growing
from specdec.tree_model.model import TreeModel
from tests.support.enumeration import MAX_DEPTH, Script
from trees import Draft, GrowthPolicy, TreeBatch
from trees.token_source import TorchSource

PROMPT = torch.tensor([[1, 3, 0, 2, 2]])


@torch.no_grad()
def every_draft(
    model: Any,
    drafter: Drafter,
    tree: GrowthPolicy,
    warpers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    prompt_1P: Tensor = PROMPT,
    num_rounds_before: int = 0,
) -> list[tuple[float, Draft]]:
    """num_rounds_before: in which the likeliest tokens are drawn, and none is accepted."""
    script, drafts = Script(), []
    monkeypatch.setattr(trees.layered, "batch_size", lambda batch, num_slots: 1)
    monkeypatch.setattr(growing, "open_token_source", TorchSource)
    while script.advance():
        target, sequences = TreeModel(model), Sequences(prompt_1P, None, 16)
        run = Run(
            target=target,
            vocab_size=target.vocab_size,
            sequences=sequences,
            sampler=Sampler(LogitsProcessorList(warpers), do_sample=True),
            tree=tree,
            input_ids=prompt_1P,
            attention_mask=None,
        )
        session = drafter.start(run)
        target.prefill(prompt_1P)
        _commit(sequences, session)
        monkeypatch.setattr(trees.token_source, "draw_index", lambda weights, count, _: weights.topk(count).indices)
        for _ in range(num_rounds_before):
            session.propose([MAX_DEPTH])
            target.verify(TreeBatch.empty(1), sequences.roots_B1)
            target.commit([[0]])
            _commit(sequences, session)
        monkeypatch.setattr(trees.token_source, "draw_index", script.draw_index)
        draft = session.propose([MAX_DEPTH])  # before the probability is read
        drafts.append((script.prob, draft))
    return drafts


def _commit(sequences: Sequences, session: DraftSession) -> None:
    """A round without a draft."""
    sequences.put(0, [1])
    sequences.commit(0, [1])
    session.observe(Outcome(paths=[[]], tokens=[[1]]))
