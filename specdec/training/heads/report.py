"""How well exits draft text that they were not trained on, and what that is worth.

Shape legend: R rounds' starts (positions of answers), D drafted tokens in a row, K ranks.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.control.costs import synchroniser
from specdec.exits.module import Exit
from specdec.hf import home_device
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.exits import Unroller
from specdec.tree_model.model import TreeModel

NUM_RANKS = 4
MAX_DRAFT = 5
THRESHOLDS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_CONTEXT, _REPEATS = 128, 7  # of a timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds on this machine. verify[n]: a target's forward of n + 1 tokens; layer: one of its layers, one token;
    head: fusing and the restricted head of an exit."""

    verify: tuple[float, ...]
    layer: float
    head: float

    def round(self, exit_layer: int, num_drafted: int) -> float:
        """Drafting and verification; the first layers' work on drafted tokens is used twice."""
        draft = num_drafted * ((exit_layer + 1) * self.layer + self.head)
        reused = min(num_drafted, 1) * exit_layer * self.layer
        return draft + self.verify[num_drafted] - reused


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """An exit on held-out greedy text.

    Attributes:
        layer: of the exit.
        coverage: share of tokens in the draft vocabulary.
        ranks: share of tokens among the exit's 1, 2, ... likeliest, right after a verification.
        steps: share of k-th drafted tokens that are right where all before them are.
        length, threshold: the draft that gives most tokens a second: at most `length` tokens, and none after one whose
            probability is below `threshold`.
        tokens_per_round: committed, with that draft.
        tokens_per_second: predicted from costs measured here.
        speedup: of that over plain decoding.
    """

    layer: int
    coverage: float
    ranks: tuple[float, ...]
    steps: tuple[float, ...]
    length: int
    threshold: float
    tokens_per_round: float
    tokens_per_second: float
    speedup: float


class Held(NamedTuple):
    """Drafts at every position. correct_BTDK: the target's choice is the exit's K-th likeliest as D-th drafted token,
    after right ones; confidence_BTD: the largest probability; known_BT: the target's choice is in the draft vocabulary;
    learned_BT: the next token is part of an answer."""

    correct_BTDK: Tensor
    confidence_BTD: Tensor
    known_BT: Tensor
    learned_BT: Tensor


def measure_acceptance(model: PreTrainedModel, exit_: Exit, corpus: Corpus, costs: Costs) -> Acceptance:
    """Drafts MAX_DRAFT tokens at every position of the corpus's answers, and compares with the target's choices."""
    parts = [_hold(model, exit_, corpus.batch(rows)) for rows in torch.arange(corpus.num_rows).split(8)]
    held = Held(*(torch.cat(part) for part in zip(*parts, strict=True)))
    settings = list(itertools.product(range(1, MAX_DRAFT + 1), THRESHOLDS))
    speeds = [_speed(held, exit_.layer, costs, *setting) for setting in settings]
    best = max(range(len(settings)), key=lambda index: speeds[index][1])
    tokens_per_round, tokens_per_second = speeds[best]
    return Acceptance(
        layer=exit_.layer,
        coverage=held.known_BT[held.learned_BT].float().mean().item(),
        ranks=tuple(held.correct_BTDK[:, :, 0][held.learned_BT].cumsum(-1).float().mean(0).tolist()),
        steps=_step_acceptance(held),
        length=settings[best][0],
        threshold=settings[best][1],
        tokens_per_round=tokens_per_round,
        tokens_per_second=tokens_per_second,
        speedup=tokens_per_second * costs.verify[0],
    )


@torch.no_grad()
def _hold(model: PreTrainedModel, exit_: Exit, batch: Batch) -> Held:
    target_BT = batch.best_ids_BTK[..., 0]
    correct, confidence = [], []
    for normed_BTC in Unroller(model, exit_).outputs(batch.hidden[exit_.layer], batch.final_BTC, MAX_DRAFT):
        p_BTK, places_BTK = exit_.head(normed_BTC).softmax(-1).topk(NUM_RANKS)
        correct.append(exit_.vocab_ids[places_BTK] == target_BT.unsqueeze(-1))
        confidence.append(p_BTK[..., 0])
    known_BT = torch.isin(target_BT, exit_.vocab_ids)
    return Held(torch.stack(correct, 2), torch.stack(confidence, 2), known_BT, batch.learned_BT)


def _step_acceptance(held: Held) -> tuple[float, ...]:
    """Pass d at position t + d drafts the d-th token (from 0) of the round that starts at t."""
    num_starts = held.learned_BT.shape[1] - MAX_DRAFT
    alive_BS = torch.ones_like(held.learned_BT[:, :num_starts])
    rates = []
    for depth in range(MAX_DRAFT):
        here = slice(depth, depth + num_starts)
        alive_BS = alive_BS & held.learned_BT[:, here]
        right_BS = alive_BS & held.correct_BTDK[:, here, depth, 0]
        rates.append((right_BS.sum() / alive_BS.sum().clamp_min(1)).item())
        alive_BS = right_BS
    return tuple(rates)


def _speed(held: Held, exit_layer: int, costs: Costs, length: int, threshold: float) -> tuple[float, float]:
    """Tokens per round and per second of rounds that follow each other through every answer."""
    right_BTD, sure_BTD = held.correct_BTDK[..., 0].tolist(), (held.confidence_BTD >= threshold).tolist()
    num_rounds = num_tokens = 0
    seconds = 0.0
    for answers, right, sure in zip(held.learned_BT.tolist(), right_BTD, sure_BTD, strict=True):
        position = 0
        while position < len(answers) - length:
            if not answers[position]:
                position += 1
                continue
            drafted = next((d + 1 for d in range(length) if not sure[position + d][d]), length)
            accepted = next((d for d in range(drafted) if not right[position + d][d]), drafted)
            position += accepted + 1
            num_tokens += accepted + 1
            num_rounds += 1
            seconds += costs.round(exit_layer, drafted)
    return num_tokens / max(num_rounds, 1), num_tokens / max(seconds, 1e-9)


def measure_costs(model: PreTrainedModel, exit_: Exit) -> Costs:
    """Times the model as it is: give it prepared, as it will be used, and an exit prepared alike."""
    verify = measure_verification(model, MAX_DRAFT + 1)
    synchronise = synchroniser(home_device(model))
    with torch.inference_mode():
        state_1C = torch.randn(1, exit_.head.in_features, dtype=model.dtype, device=home_device(model))
        whole_head = median_seconds(synchronise, lambda: model.get_output_embeddings()(state_1C))
        head = median_seconds(
            synchronise, lambda: (exit_.fuse(torch.cat([state_1C, state_1C], -1)), exit_.head(state_1C))
        )
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return Costs(verify=verify, layer=max(verify[0] - whole_head, 0.0) / num_layers, head=head)


@torch.inference_mode()
def measure_verification(model: PreTrainedModel, widest: int) -> tuple[float, ...]:
    """Seconds of forwards of 1, 2, ... `widest` tokens."""
    reader = TreeModel(model)
    reader.prefill(torch.zeros(1, _CONTEXT, dtype=torch.long, device=reader.device), capacity=_CONTEXT + widest)
    synchronise = synchroniser(reader.device)
    return tuple(
        median_seconds(synchronise, functools.partial(_verify, reader, width)) for width in range(1, widest + 1)
    )


def _verify(reader: TreeModel, width: int) -> None:
    tokens_BT = torch.zeros(1, width, dtype=torch.long, device=reader.device)
    offsets_BT = torch.arange(width, device=reader.device).unsqueeze(0)
    seen_BTK = offsets_BT.unsqueeze(1) <= offsets_BT.unsqueeze(2)
    reader.forward(tokens_BT, offsets_BT, seen_BTK if width > 1 else None)
    reader.commit([[]])


def median_seconds(synchronise: Callable[[], None], call: Callable[[], object]) -> float:
    """The median of a few calls, after one to warm up."""
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
