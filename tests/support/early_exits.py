"""Models whose own layers draft, and exits that are in no file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters import EarlyExit, Run
from specdec.drafters.early_exit.heads import TrainedHead
from specdec.exits.module import Exit
from specdec.testing import random_prompts, tiny_model
from specdec.tree_model.early_exit import EarlyExitModel
from tests.support.references import plain_alone

NUM_LAYERS, NUM_NEW = 4, 24
PROMPTS = random_prompts([5, 12, 9, 18])
PER_LAYER: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}


@lru_cache(maxsize=2)
def early_model(family: str) -> PreTrainedModel:
    """A model whose first layer decides most: the others are too weak to change every token."""
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS, **PER_LAYER.get(family, {}))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2 and any(f".{layer}." in name for layer in range(1, NUM_LAYERS)):
                weights *= 0.35
    return model


@lru_cache(maxsize=2)
def reference(family: str) -> Tensor:
    return plain_alone(early_model(family), PROMPTS, NUM_NEW)


def random_exit(model: PreTrainedModel, layer: int, window: int = 8) -> Exit:
    """An exit that has learnt nothing."""
    module = Exit(model, layer, torch.arange(0, model.config.vocab_size, 2), window)
    random = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for weights in (*module.fuse.parameters(), *module.block.parameters()):
            if weights.dim() == 2:
                weights.copy_(0.2 * torch.randn(weights.shape, generator=random))
    return module


class WithModules(EarlyExit):
    """Exits that are in no file."""

    def __init__(self, modules: Sequence[Exit], *args: Any, head: type[TrainedHead] = TrainedHead, **kwargs: Any):
        super().__init__(*args, exits="not read", **kwargs)
        self._own = modules
        self._head_type = head

    def _trained_heads(self, run: Run, target: EarlyExitModel) -> dict[int, Any]:
        return {module.layer: self._head_type(module, target, run.sequences) for module in self._own}
