"""What trainers of draft heads have in common: their steps, and that they can be interrupted.

Shape legend: B rows, T positions, K likeliest tokens, N positions with a loss, V draft vocabulary.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.hf import home_device
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.recipes import Recipe

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Labels(NamedTuple):
    """Of N positions: the K likeliest tokens as places in the draft vocabulary (-1: not in it), and their probabilities
    (0 there)."""

    targets_NK: Tensor
    p_NK: Tensor


class Trainer(ABC):
    """Trains on batches of a corpus. One step after another; can be saved between any two.

    Args:
        weights: that are trained, by the names that they are saved under.
        vocab_ids: int64 [V]: the tokens that can be drafted.

    Attributes:
        num_steps: in all.
        step: steps done.
    """

    def __init__(
        self, model: PreTrainedModel, corpus: Corpus, recipe: Recipe, weights: Mapping[str, Tensor], vocab_ids: Tensor
    ):
        self._corpus, self._schedule = corpus, recipe
        self._device = home_device(model)
        self._use_bfloat16 = bfloat16_is_faster(self._device)
        self._places_V = torch.full((corpus.vocab_size,), -1, device=self._device)
        self._places_V[vocab_ids] = torch.arange(len(vocab_ids), device=self._device)
        self._weights = {name: weight.requires_grad_(True) for name, weight in weights.items()}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.num_steps = corpus.steps_per_epoch(recipe.batch_rows) * recipe.epochs
        self.step = 0

    @abstractmethod
    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the loss of a batch, each with what is to be shown of it, a number."""

    def advance(self) -> tuple[float, ...]:
        """One step. Returns what is to be shown of it."""
        self._optimizer.param_groups[0]["lr"] = self._learning_rate()
        batch = self._corpus.batch(self._corpus.rows(self.step, self._schedule.batch_rows, self._schedule.seed))
        shown = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._use_bfloat16):
            for loss, number in self._losses(batch):
                loss.backward(inputs=list(self._weights.values()))  # and not what is the model's
                shown.append(number)
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return tuple(torch.stack(shown).tolist())

    def _labels(self, best_ids_NK: Tensor, best_p_NK: Tensor) -> Labels:
        targets_NK = self._places_V[best_ids_NK]
        return Labels(targets_NK, best_p_NK * (targets_NK >= 0))

    def _learning_rate(self) -> float:
        rise = min(1.0, (self.step + 1) / max(1, min(50, self.num_steps // 20)))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / self.num_steps))
        return self._schedule.learning_rate * rise * (0.02 + 0.98 * fall)

    def save(self, path: Path) -> None:
        """Weights, the optimiser's moments, the step, and whether products are in bfloat16; a file that was there is
        replaced at once or not at all."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            tensors |= {f"{moment}.{name}": self._optimizer.state[weight][moment] for moment in _MOMENTS}
        unfinished = path.with_name(f"{path.name}.part")
        tensors |= {"step": torch.tensor(self.step), "bfloat16": torch.tensor(self._use_bfloat16)}
        save_file(tensors, unfinished)
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
        self._use_bfloat16 = bool(tensors.get("bfloat16", self._use_bfloat16))  # a file of an earlier version has none


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
