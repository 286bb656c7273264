"""How well a block head drafts text that it was not trained on, and what that is worth.

Shape legend: B rows, A blocks, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.control.costs import synchroniser
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.fitting import fitted
from specdec.drafters.head.runner import HeadRunner
from specdec.training.heads.blocks import block_logits, run_blocks
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.report import measure_verification, median_seconds
from specdec.tree_model.model import TreeModel

_ANCHORS = 32  # blocks of a row in a forward
_CONTEXT = 128  # of a timing


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """A head on held-out greedy text.

    Attributes:
        coverage: share of tokens in the draft vocabulary.
        steps: share of k-th drafted tokens that are right where all before them are.
        length: of the chain that gives most tokens a second.
        accepted: tokens of a whole block that are accepted, on average.
        tokens_per_round: committed, with a chain of that length.
        speedup: predicted over plain decoding, from costs measured here.
    """

    coverage: float
    steps: tuple[float, ...]
    length: int
    accepted: float
    tokens_per_round: float
    speedup: float


def measure_head(model: PreTrainedModel, fast: PreTrainedModel, head: DSpark, corpus: Corpus) -> HeadReport:
    """Drafts a block after every token of the corpus's answers, and compares with the target's choices.

    Args:
        fast: the model as it will be used, for timing.
    """
    embedding_VC = model.get_input_embeddings().weight
    assert head.vocab_ids is not None
    runs, limits, known = [], [], []
    for rows in torch.arange(corpus.num_rows).split(4):
        batch = corpus.batch(rows)
        target_BT = batch.best_ids_BTK[..., 0]
        known.append(torch.isin(target_BT, head.vocab_ids)[batch.learned_BT])
        last = target_BT.shape[1] - head.head_config.block_size
        for anchors_A in torch.arange(1, last + 1, device=target_BT.device).split(_ANCHORS):
            anchors_BA = anchors_A.expand(len(rows), -1)
            right_BAS, learned_BAS = _right(head, embedding_VC, batch, anchors_BA)
            runs.append((right_BAS & learned_BAS).long().cumprod(2).flatten(0, 1))
            limits.append(learned_BAS.long().cumprod(2).flatten(0, 1))
    right_NS, learned_NS = torch.cat(runs), torch.cat(limits)
    before_NS = torch.cat([torch.ones_like(right_NS[:, :1]), right_NS[:, :-1]], 1) * learned_NS
    steps = (right_NS.sum(0) / before_NS.sum(0).clamp_min(1)).tolist()
    expected = [1.0]
    reach = 1.0
    for share in steps:
        reach *= share
        expected.append(expected[-1] + reach)
    verify, draft = measure_verification(fast, len(steps) + 1), _draft_seconds(fast, head)
    speeds = [1.0, *(expected[n] * verify[0] / (verify[n] + draft) for n in range(1, len(steps) + 1))]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    return HeadReport(
        coverage=torch.cat(known).float().mean().item(),
        steps=tuple(steps),
        length=best,
        accepted=expected[-1] - 1,
        tokens_per_round=expected[best],
        speedup=speeds[best],
    )


@torch.no_grad()
def _right(head: DSpark, embedding_VC: Tensor, batch: Batch, anchors_BA: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, A, S]: whether a slot says the target's choice, and whether it is part of an answer."""
    normed_BASC = run_blocks(head, embedding_VC, batch, anchors_BA)
    positions_BAS = anchors_BA.unsqueeze(2) + torch.arange(normed_BASC.shape[2], device=anchors_BA.device)
    rows_B11 = torch.arange(len(anchors_BA), device=anchors_BA.device)[:, None, None]
    at = rows_B11.expand_as(positions_BAS), positions_BAS
    logits_NV = block_logits(head, normed_BASC.flatten(0, 2), batch.tokens_BT[at].flatten())
    assert head.vocab_ids is not None
    said_BAS = head.vocab_ids[logits_NV.argmax(1)].view_as(positions_BAS)
    return said_BAS == batch.best_ids_BTK[..., 0][at], batch.learned_BT[at]


@torch.inference_mode()
def _draft_seconds(fast: PreTrainedModel, head: DSpark) -> float:
    """Of a whole block: its forward, the LM head, and what the tokens before change."""
    target = TreeModel(fast)
    runner = HeadRunner(fitted(head, fast), target)
    runner.begin_rows([0])
    width = runner.head.fc.in_features
    runner.read_states(torch.zeros(1, _CONTEXT, width, dtype=fast.dtype, device=runner.device), [_CONTEXT])
    root_11 = torch.zeros(1, 1, dtype=torch.long, device=runner.device)

    def draft() -> None:
        slots_BTC = runner.run_block(root_11)
        logits_BTV = runner.draft_logits(slots_BTC)
        own = runner.head
        assert isinstance(own, DSpark)
        for slot in range(slots_BTC.shape[1]):
            own.follow(logits_BTV[:, slot : slot + 1], slots_BTC[:, slot : slot + 1], root_11)

    return median_seconds(synchroniser(runner.device), draft)
