"""Trains a whole model so that its early layers draft: the LayerSkip recipe (Elhoushi et al. 2024, section 4).

Every exit predicts the next token through the model's own norm and head (early-exit loss), and deep layers are skipped
at random (layer dropout). No module is added: what comes out is an ordinary checkpoint.

Shape legend: B rows, T positions, C channels, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.hf import home_device
from specdec.training.heads.trainer import bfloat16_is_faster
from specdec.tree_model.layer_views import LayerViews


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkipRecipe:
    """How a model is trained. With its batches it determines the result, up to the machine's rounding.

    Args:
        num_steps: of the optimiser, one for each batch.
        learning_rate: of AdamW, at the top of a short rise and a cosine's fall.
        weight_decay: of matrices.
        exit_scale: weight of the exits' losses against the last layer's (the paper's e_scale).
        exit_period: an exit has a loss in every `exit_period`-th step, neighbours in turn (the paper's rotational
            curriculum): losses at all exits in all steps are slow, and harm the last layer.
        max_dropout: how likely the last layer is to be skipped, in each row for itself.
        seed: of the dropout.
    """

    num_steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    exit_scale: float = 1.0
    exit_period: int = 4
    max_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "exit_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.max_dropout < 1:
            raise ValueError(f"max_dropout must be in [0, 1), not {self.max_dropout}")

    def dropout(self, depth: int, num_layers: int) -> float:
        """How likely layer number `depth` (from 1) is to be skipped: exponential in depth, 0 for the first one."""
        return self.max_dropout * (2 ** ((depth - 1) / max(num_layers - 1, 1)) - 1)

    def exit_weights(self, step: int, num_layers: int) -> dict[int, float]:
        """Exit layer -> weight of its loss in this step; they add up to 1. The last layer is always there.

        The paper counts layers from 0 and so gives the first one no loss; here exit l weighs 1 + 2 + ... + l.
        """
        exits = [depth for depth in range(1, num_layers) if (depth + step) % self.exit_period == 0]
        weights = {depth: self.exit_scale * depth * (depth + 1) / 2 for depth in exits}
        weights[num_layers] = num_layers - 1 + self.exit_scale * num_layers * (num_layers - 1) / 2
        total = sum(weights.values())
        return {depth: weight / total for depth, weight in weights.items()}


class Losses(NamedTuple):
    """Cross-entropies of a step, in nats a token."""

    last: float
    exits: dict[int, float]


class LayerSkipTrainer:
    """Trains all weights of a model, in place. One step after another; can be saved between any two.

    The caller brings the batches, and after `load` goes on with the one after `step`.

    Args:
        model: with float32 weights, not prepared by `specdec.kernels`; any family that can exit early.

    Attributes:
        step: steps done.

    Raises:
        UnsupportedModelError: the model's layers do not run one by one.
    """

    def __init__(self, model: PreTrainedModel, recipe: LayerSkipRecipe):
        self._model = model
        self._recipe = recipe
        self._views = LayerViews(model)
        self._device = home_device(model)
        self._use_bfloat16 = bfloat16_is_faster(self._device)
        self._weights = {name: weight.requires_grad_() for name, weight in model.named_parameters()}
        matrices = [weight for weight in self._weights.values() if weight.dim() > 1]
        others = [weight for weight in self._weights.values() if weight.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        self.step = 0

    def advance(self, tokens_BT: Tensor) -> Losses:
        """One step on a batch (int64, on any device); every token but the first of a row is predicted."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        weights = self._recipe.exit_weights(self.step, self._views.num_layers)
        losses = {}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._use_bfloat16):
            tokens_BT = tokens_BT.to(self._device)
            states = self._forward(tokens_BT, kept=weights)
            for depth, state_BTC in states.items():
                losses[depth] = self._loss(state_BTC, tokens_BT)
        torch.stack([weights[depth] * loss for depth, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        exits = {depth: loss.item() for depth, loss in losses.items()}
        return Losses(last=exits.pop(self._views.num_layers), exits=exits)

    def save(self, path: Path) -> None:
        """Weights, the optimiser's moments and the step; a file that was there is replaced at once or not at all."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            moments = self._optimizer.state[weight]
            tensors |= {f"{moment}.{name}": moments[moment] for moment in ("step", "exp_avg", "exp_avg_sq")}
        unfinished = path.with_name(f"{path.name}.part")
        save_file(tensors | {"step": torch.tensor(self.step)}, unfinished)
        unfinished.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote."""
        tensors = load_file(path)
        for name, weight in self._weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            self._optimizer.state[weight] = {
                moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(tensors["step"])

    def _forward(self, tokens_BT: Tensor, kept: dict[int, float]) -> dict[int, Tensor]:
        """States [B, T, C] after the layers in `kept`, of a forward in which rows skip layers."""
        generator = torch.Generator().manual_seed(self._recipe.seed * 1_000_003 + self.step)
        states: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for depth, layer in enumerate(self._views.layers, 1):
                chance = self._recipe.dropout(depth, self._views.num_layers)
                skips_B = torch.rand(len(tokens_BT), generator=generator) < chance
                hook = _Skip(depth, skips_B.to(self._device), states if depth in kept else None)
                hooks.callback(layer.register_forward_hook(hook).remove)
            # the base model: the heads follow exit by exit, one set of logits at a time
            self._model.base_model(input_ids=tokens_BT, use_cache=False)
        return states

    def _loss(self, state_BTC: Tensor, tokens_BT: Tensor) -> Tensor:
        head = self._views.head()
        head.set_input_states(state_BTC[:, :-1])
        logits_BTV = head.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())

    def _learning_rate(self) -> float:
        num_steps = self._recipe.num_steps
        rise = min(1.0, (self.step + 1) / max(1, min(100, num_steps // 20)))
        fall = 0.5 * (1 + math.cos(math.pi * min(self.step / num_steps, 1.0)))
        return self._recipe.learning_rate * rise * (0.02 + 0.98 * fall)


class _Skip:
    """A forward hook: rows skip the layer, and its output is kept if there are `states` to keep it in."""

    def __init__(self, depth: int, skips_B: Tensor, states: dict[int, Tensor] | None):
        self._depth = depth
        self._skips_B11 = skips_B[:, None, None]
        self._states = states

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output_BTC: Tensor) -> Tensor:
        hidden_BTC = torch.where(self._skips_B11, args[0], output_BTC)
        if self._states is not None:
            self._states[self._depth] = hidden_BTC
        return hidden_BTC
