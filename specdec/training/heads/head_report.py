"""How well a head drafts text that it was not trained on, and what that is worth.

Shape legend: B rows, A blocks, P pairs that begin a chain, S slots of a block or steps of a chain, N of all blocks or
chains.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.control.costs import synchroniser
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.fitting import fitted
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp import Mtp
from specdec.drafters.head.runner import HeadRunner
from specdec.training.heads.blocks import block_logits, run_blocks
from specdec.training.heads.chains import ChainHead, by_chain
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
        accepted: tokens of a whole block or chain that are accepted, on average.
        tokens_per_round: committed, with a chain of that length.
        speedup: predicted over plain decoding, from costs measured here.
    """

    coverage: float
    steps: tuple[float, ...]
    length: int
    accepted: float
    tokens_per_round: float
    speedup: float


def measure_head(
    model: PreTrainedModel, fast: PreTrainedModel, head: DSpark | Eagle3 | Mtp | Jump, corpus: Corpus, num_tokens: int
) -> HeadReport:
    """Drafts after every token of the corpus's answers, and compares with the target's choices.

    Args:
        fast: the model as it will be used, for timing.
        num_tokens: that are drafted, S.
    """
    coverage, steps = share_right(model, head, corpus, num_tokens, corpus.num_rows)
    expected = expected_tokens(steps)
    verify, draft = measure_verification(fast, num_tokens + 1), _draft_seconds(fast, head, num_tokens)
    speeds = [1.0, *(expected[n] * verify[0] / (verify[n] + draft[n - 1]) for n in range(1, num_tokens + 1))]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    return HeadReport(
        coverage=coverage,
        steps=steps,
        length=best,
        accepted=expected[-1] - 1,
        tokens_per_round=expected[best],
        speedup=speeds[best],
    )


def share_right(
    model: PreTrainedModel, head: DSpark | Eagle3 | Mtp | Jump, corpus: Corpus, num_tokens: int, num_rows: int
) -> tuple[float, tuple[float, ...]]:
    """On the first rows of a corpus: `HeadReport.coverage` and `HeadReport.steps`."""
    runs, limits, known = [], [], []
    for rows in torch.arange(min(num_rows, corpus.num_rows)).split(4):
        batch = corpus.batch(rows)
        choices = batch.best_ids_BTK[..., 0][batch.learned_BT]
        known.append(torch.ones_like(choices) if head.vocab_ids is None else torch.isin(choices, head.vocab_ids))
        drafts = _blocks(model, head, batch) if isinstance(head, DSpark) else _chains(model, head, batch, num_tokens)
        for right_NS, learned_NS in drafts:
            runs.append((right_NS & learned_NS).long().cumprod(1))
            limits.append(learned_NS.long().cumprod(1))
    right_NS, learned_NS = torch.cat(runs), torch.cat(limits)
    before_NS = torch.cat([torch.ones_like(right_NS[:, :1]), right_NS[:, :-1]], 1) * learned_NS
    steps = (right_NS.sum(0) / before_NS.sum(0).clamp_min(1)).tolist()
    return torch.cat(known).float().mean().item(), tuple(steps)


def expected_tokens(steps: Sequence[float]) -> list[float]:
    """Committed in a round with a chain of 0, 1, 2, ... tokens."""
    return list(itertools.accumulate(itertools.accumulate(steps, operator.mul), initial=1.0))


@torch.no_grad()
def _chains(
    model: PreTrainedModel, head: Eagle3 | Mtp | Jump, batch: Batch, num_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """bool [N, S]: whether each step of a chain says the target's choice, and whether it is part of an answer."""
    chain, choices_BP, learned_BP = ChainHead(head, model), batch.best_ids_BTK[:, 1:, 0], batch.learned_BT[:, 1:]
    right = [
        (chain.said(normed_BPC.flatten(0, 1)) == choices_BP.flatten()).view_as(choices_BP)
        for normed_BPC in chain.steps(batch, num_tokens)
    ]
    whole = choices_BP.shape[1] - num_tokens + 1  # others would end before the last token
    right_BPS, learned_BPS = by_chain(right)[:, :whole], by_chain([learned_BP] * num_tokens)[:, :whole]
    yield right_BPS.flatten(0, 1), learned_BPS.flatten(0, 1)


def _blocks(model: PreTrainedModel, head: DSpark, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of the slots of blocks."""
    embedding_VC, (num_rows, length) = model.get_input_embeddings().weight, batch.tokens_BT.shape
    last = length - head.head_config.block_size
    for anchors_A in torch.arange(1, last + 1, device=batch.tokens_BT.device).split(_ANCHORS):
        right_BAS, learned_BAS = _right(head, embedding_VC, batch, anchors_A.expand(num_rows, -1))
        yield right_BAS.flatten(0, 1), learned_BAS.flatten(0, 1)


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
def _draft_seconds(fast: PreTrainedModel, head: DSpark | Eagle3 | Mtp | Jump, num_tokens: int) -> list[float]:
    """Of drafting 1, 2, ... tokens: of a block they cost the same."""
    runner = HeadRunner(fitted(head, fast), TreeModel(fast))
    runner.begin_rows([0])
    seconds = functools.partial(median_seconds, synchroniser(runner.device))
    if isinstance(runner.head, DSpark):
        _read_context(runner, runner.read_states)
        return [seconds(functools.partial(_draft_block, runner, runner.head))] * num_tokens
    _read_context(runner, lambda states_BTX, sizes: runner.read_pairs(_zeros(runner, sizes[0]), states_BTX, sizes))
    return [n * seconds(functools.partial(_draft_token, runner)) for n in range(1, num_tokens + 1)]


def _read_context(runner: HeadRunner, read: Callable[[Tensor, list[int]], object]) -> None:
    config = runner.head.head_config
    width = config.num_states * config.target_hidden_size
    read(torch.zeros(1, _CONTEXT, width, dtype=runner.head.dtype, device=runner.device), [_CONTEXT])


def _zeros(runner: HeadRunner, count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long, device=runner.device)


def _draft_block(runner: HeadRunner, head: DSpark) -> None:
    """Its forward, the LM head, and what the tokens before change."""
    root_11 = _zeros(runner, 1)
    slots_BTC = runner.run_block(root_11)
    logits_BTV = runner.logits(slots_BTC)
    for slot in range(slots_BTC.shape[1]):
        head.follow(logits_BTV[:, slot : slot + 1], slots_BTC[:, slot : slot + 1], root_11)


def _draft_token(runner: HeadRunner) -> None:
    """A forward and the LM head."""
    size = runner.head.config.hidden_size
    states_11C = torch.zeros(1, 1, size, dtype=runner.head.dtype, device=runner.device)
    output = runner.run_head(_zeros(runner, 1), states_11C, _zeros(runner, 1), None)
    runner.logits(output.normed_BTC)
    runner.forget_tail()
