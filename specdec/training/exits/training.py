"""Distils exits from what a model wrote.

An exit drafts on its own outputs, so it is trained on them: pass 1 is fed the target's last states, pass k the outputs
of pass k - 1, one position later. In pass k a position attends to what it will see while drafting its k-th token: keys
from true states up to k - 1 positions back, and after them its own, each from its own pass (EAGLE-3's training-time
test, Li et al. 2025, section 3.2). The loss is the cross-entropy to the target's likeliest tokens, as far as they are
in the draft vocabulary.

Shape legend: B rows, T positions, C channels, K likeliest tokens, N positions with a loss, V draft vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from specdec.exits.module import Exit, own_weights
from specdec.hf import CACHE, home_device
from specdec.training.exits.collect import Shard
from specdec.tree_model import masks
from specdec.tree_model.layer_views import LayerViews

_NUM_FIT_ROWS = 64
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How exits are trained. With data and model it determines the result, up to the machine's rounding.

    Args:
        layers: the exit of each module: number of decoder layers before it.
        epochs: times that every row is trained on.
        batch_rows: rows in a step.
        learning_rate: of AdamW, at the top of a short rise and a cosine's fall.
        num_passes: drafted tokens in a row that an exit is trained for.
        pass_decay: the loss of pass k weighs pass_decay^(k-1).
        vocabulary: V.
        seed: of the order of rows.
    """

    layers: tuple[int, ...] = (2,)
    epochs: int = 2
    batch_rows: int = 4
    learning_rate: float = 1e-3
    num_passes: int = 2
    pass_decay: float = 0.8
    vocabulary: int = 8192
    seed: int = 0


class Batch(NamedTuple):
    """Rows of a corpus. best_ids_BTK: int64. hidden: exit layer -> [B, T, C]. final_BTC: the target's last
    states. All but integers are float32."""

    hidden: dict[int, Tensor]
    final_BTC: Tensor
    best_ids_BTK: Tensor
    best_p_BTK: Tensor
    learned_BT: Tensor
    """bool: the next token is one to be predicted."""


class _Labels(NamedTuple):
    """Of the N positions that have a loss: where they are in [B T], the K likeliest tokens as places in the draft
    vocabulary (-1: not in it), and their probabilities (0 there)."""

    places_N: Tensor
    targets_NK: Tensor
    p_NK: Tensor


class Corpus:
    """What the model wrote. Rows are read when they are needed, so that shards may be larger than memory.

    Args:
        reader: where shards have kept no states, this makes them again; a copy of the model, in its own dtype perhaps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shards: Sequence[Shard],
        layers: Sequence[int],
        reader: PreTrainedModel | None = None,
    ):
        self._shards = shards
        self._layers = layers
        self._views = LayerViews(model)
        self._reader = LayerViews(reader or model)
        self._device = home_device(model)
        self._rows = [(shard, row) for shard in shards for row in range(shard.tokens_BT.shape[0])]
        self.vocab_size: int = model.config.get_text_config(decoder=True).vocab_size

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def length(self) -> int:
        """T, the same for all rows."""
        return self._shards[0].tokens_BT.shape[1]

    @torch.no_grad()
    def batch(self, rows: Tensor) -> Batch:
        chosen = [self._rows[row] for row in rows.tolist()]

        def gather(part: Callable[[Shard], Tensor]) -> Tensor:
            return torch.stack([part(shard)[row] for shard, row in chosen]).to(self._device)

        depths = {*filter(None, self._layers), self._views.num_layers}
        if self._shards[0].states:
            states = {depth: gather(lambda shard, depth=depth: shard.states[depth]) for depth in depths}  # type: ignore[misc]
        else:
            states = self._read(rows, depths)
        return Batch(
            hidden={layer: states[layer].float() if layer else self._embed(rows) for layer in self._layers},
            final_BTC=states[self._views.num_layers].float(),
            best_ids_BTK=gather(lambda shard: shard.best_ids_BTK).long(),
            best_p_BTK=gather(lambda shard: shard.best_logits_BTK).float().softmax(-1),
            learned_BT=F.pad(gather(lambda shard: shard.learned_BT)[:, 1:], (0, 1)),
        )

    def rows(self, step: int, batch_rows: int, seed: int) -> Tensor:
        """The rows of a step: an epoch has every row once, in an order that depends on it and on the seed alone."""
        epoch, batch = divmod(step, self.steps_per_epoch(batch_rows))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator)[batch * batch_rows :][:batch_rows]

    def steps_per_epoch(self, batch_rows: int) -> int:
        return math.ceil(self.num_rows / batch_rows)

    def tokens(self, rows: Tensor) -> Tensor:
        """int64 [B, T]."""
        return torch.stack([shard.tokens_BT[row] for shard, row in map(self._rows.__getitem__, rows.tolist())]).long()

    def _read(self, rows: Tensor, depths: set[int]) -> dict[int, Tensor]:
        view = self._reader.whole(depths)
        view.model.base_model(input_ids=self.tokens(rows).to(self._device), use_cache=False)
        return view.states

    def _embed(self, rows: Tensor) -> Tensor:
        view = self._views.below(0)
        view.model(input_ids=self.tokens(rows).to(self._device), use_cache=False)
        return view.states[0].float()

    def frequent_ids(self, count: int) -> Tensor:
        """The tokens that the model finds likeliest most often, increasing: int64 [V]."""
        weights = torch.zeros(self.vocab_size, device=self._device)
        for shard in self._shards:
            p_BTK = shard.best_logits_BTK.to(self._device).float().softmax(-1)
            weights.scatter_add_(0, shard.best_ids_BTK.to(self._device).long().flatten(), p_BTK.flatten())
        return weights.topk(min(count, len(weights))).indices.sort().values


class Unroller:
    """Runs an exit as drafting does, at every position at once."""

    def __init__(self, model: PreTrainedModel, exit_: Exit):
        self._exit = exit_
        self._view = LayerViews(model).block(exit_.block)
        self._additive = model.config.get_text_config(decoder=True)._attn_implementation == "eager"

    def outputs(self, hidden_BTC: Tensor, final_BTC: Tensor, num_passes: int) -> Iterator[Tensor]:
        """Yields for each pass what goes into the head, [B, T, C]."""
        cache = DynamicCache()
        num_positions = hidden_BTC.shape[1]
        position_ids = torch.arange(num_positions, device=hidden_BTC.device).unsqueeze(0)
        state_BTC = final_BTC
        for index in range(num_passes):
            before_BTC = F.pad(state_BTC[:, :-1], (0, 0, 1, 0))
            fused_BTC = self._exit.fuse(torch.cat([hidden_BTC, before_BTC], -1))
            self._view.set_input_states(fused_BTC)
            mask_11TS = pass_mask(num_positions, index, hidden_BTC.device)[None, None]
            normed_BTC = self._view.model(
                inputs_embeds=fused_BTC,
                attention_mask=masks.additive(mask_11TS, fused_BTC.dtype) if self._additive else mask_11TS,
                position_ids=position_ids,
                **{CACHE: cache},
                use_cache=True,
            ).last_hidden_state
            state_BTC = self._view.states[0]
            yield normed_BTC


@functools.cache
def pass_mask(num_positions: int, index: int, device: torch.device | None = None) -> Tensor:
    """What position t sees in pass `index` (from 0), bool [T, (index + 1) T]: of the first pass positions up to
    t - index, of each later pass j position t - index + j, and always itself (positions before the first draft)."""
    query_T1, key_1T = torch.arange(num_positions).unsqueeze(1), torch.arange(num_positions)
    seen = [key_1T <= query_T1 - index, *(key_1T == query_T1 - index + j for j in range(1, index + 1))]
    seen[-1] = seen[-1] | (key_1T == query_T1)
    return torch.cat(seen, 1).to(device)


def initial_exit(model: PreTrainedModel, layer: int, vocab_ids: Tensor, corpus: Corpus) -> Exit:
    """An exit to start from: the block is the model's last layer, fusing is the best linear guess of the last state."""
    exit_ = Exit(model, layer, vocab_ids, window=corpus.length)
    last = LayerViews(model).layers[-1]
    exit_.block.load_state_dict(last.state_dict())
    batch = corpus.batch(torch.arange(min(_NUM_FIT_ROWS, corpus.num_rows)))
    before_BTC = F.pad(batch.final_BTC[:, :-1], (0, 0, 1, 0))
    inputs_ND = torch.cat([batch.hidden[layer], before_BTC], -1).flatten(0, 1)
    gram_DD = inputs_ND.T @ inputs_ND
    gram_DD += torch.eye(len(gram_DD), device=gram_DD.device) * gram_DD.diagonal().mean() * 1e-4
    moment_DC = inputs_ND.T @ batch.final_BTC.flatten(0, 1)
    with torch.no_grad():
        exit_.fuse.weight.copy_(torch.linalg.solve(gram_DD, moment_DC).T)
    return exit_


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether a product of the size that training needs takes less time in bfloat16; false on CPUs without support."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    best = dict.fromkeys((torch.bfloat16, torch.float32), math.inf)
    for dtype in (*best, *best, *best):
        a, b = torch.ones(1024, 512, dtype=dtype, device=device), torch.ones(512, 1024, dtype=dtype, device=device)
        start = time.perf_counter()
        (a @ b).sum().item()
        best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < best[torch.float32]


class Trainer:
    """Trains exits on the same batches. One step after another; can be saved between any two.

    Attributes:
        exits: what is trained.
        num_steps: in all.
        step: steps done.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, recipe: Recipe):
        self._corpus = corpus
        self._recipe = recipe
        self._device = home_device(model)
        self._use_bfloat16 = bfloat16_is_faster(self._device)
        vocab_ids = corpus.frequent_ids(recipe.vocabulary).to(self._device)
        self.exits = [initial_exit(model, layer, vocab_ids, corpus) for layer in recipe.layers]
        self._unrollers = [Unroller(model, exit_) for exit_ in self.exits]
        self._places_V = torch.full((corpus.vocab_size,), -1, device=self._device)
        self._places_V[vocab_ids] = torch.arange(len(vocab_ids), device=self._device)
        self._weights = {
            f"{index}.{name}": exit_.get_parameter(name).requires_grad_(True)
            for index, exit_ in enumerate(self.exits)
            for name in own_weights(exit_)
        }
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.num_steps = corpus.steps_per_epoch(recipe.batch_rows) * recipe.epochs
        self.step = 0

    def advance(self) -> tuple[float, ...]:
        """One step. Returns each exit's share of answers' tokens that it guessed in its first pass."""
        self._optimizer.param_groups[0]["lr"] = self._learning_rate()
        batch = self._corpus.batch(self._corpus.rows(self.step, self._recipe.batch_rows, self._recipe.seed))
        agreements = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._use_bfloat16):
            labels = self._labels(batch)
            for exit_, unroller in zip(self.exits, self._unrollers, strict=True):
                loss, agreement = self._loss(exit_, unroller, batch, labels)
                loss.backward(inputs=list(self._weights.values()))  # and not the model's norm
                agreements.append(agreement)
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return tuple(torch.stack(agreements).tolist())

    def _labels(self, batch: Batch) -> _Labels:
        places_N = batch.learned_BT.flatten().nonzero().squeeze(1)
        targets_NK = self._places_V[batch.best_ids_BTK.flatten(0, 1)[places_N]]
        return _Labels(places_N, targets_NK, batch.best_p_BTK.flatten(0, 1)[places_N] * (targets_NK >= 0))

    def _loss(self, exit_: Exit, unroller: Unroller, batch: Batch, labels: _Labels) -> tuple[Tensor, Tensor]:
        places_N, targets_NK, p_NK = labels
        num_learned = max(len(places_N), 1)
        losses, agreement = [], torch.zeros((), device=self._device)
        passes = unroller.outputs(batch.hidden[exit_.layer], batch.final_BTC, self._recipe.num_passes)
        for index, normed_BTC in enumerate(passes):
            logits_NV = exit_.head(normed_BTC.flatten(0, 1).index_select(0, places_N)).float()
            log_q_NK = logits_NV.gather(1, targets_NK.clamp_min(0)) - logits_NV.logsumexp(1, keepdim=True)
            losses.append(-(p_NK * log_q_NK).sum() / num_learned * self._recipe.pass_decay**index)
            if index == 0:
                agreement = (logits_NV.argmax(1) == targets_NK[:, 0]).sum() / num_learned
        return torch.stack(losses).sum(), agreement

    def _learning_rate(self) -> float:
        rise = min(1.0, (self.step + 1) / max(1, min(50, self.num_steps // 20)))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / self.num_steps))
        return self._recipe.learning_rate * rise * (0.02 + 0.98 * fall)

    def save(self, path: Path) -> None:
        """Weights, the optimiser's moments and the step; a file that was there is replaced at once or not at all."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            tensors |= {f"{moment}.{name}": self._optimizer.state[weight][moment] for moment in _MOMENTS}
        unfinished = path.with_name(f"{path.name}.part")
        save_file(tensors | {"step": torch.tensor(self.step)}, unfinished)
        unfinished.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote."""
        tensors = load_file(path)
        states = {}
        for index, (name, weight) in enumerate(self._weights.items()):
            weight.copy_(tensors[f"weight.{name}"])
            states[index] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.step = int(tensors["step"])
