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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.exits.module import Exit, own_weights
from specdec.hf import CACHE
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.initial import NUM_FIT_ROWS, linear_fit
from specdec.training.heads.recipes import Recipe
from specdec.training.heads.trainer import Trainer
from specdec.tree_model import masks
from specdec.tree_model.layer_views import LayerViews


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecipe(Recipe):
    """How exits are trained.

    Args:
        layers: the exit of each module: number of decoder layers before it.
        num_passes: drafted tokens in a row that an exit is trained for.
        pass_decay: the loss of pass k weighs pass_decay^(k-1).
    """

    layers: tuple[int, ...] = (2,)
    num_passes: int = 2
    pass_decay: float = 0.8


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
    batch = corpus.batch(torch.arange(min(NUM_FIT_ROWS, corpus.num_rows)))
    before_BTC = F.pad(batch.final_BTC[:, :-1], (0, 0, 1, 0))
    with torch.no_grad():
        exit_.fuse.weight.copy_(linear_fit(torch.cat([batch.hidden[layer], before_BTC], -1), batch.final_BTC))
    return exit_


class ExitTrainer(Trainer):
    """Trains exits on the same batches; shows each exit's share of answers' tokens that it guessed in its first pass.

    Attributes:
        exits: what is trained.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, recipe: ExitRecipe):
        self._recipe = recipe
        vocab_ids = corpus.frequent_ids(recipe.vocabulary)
        self.exits = [initial_exit(model, layer, vocab_ids, corpus) for layer in recipe.layers]
        self._unrollers = [Unroller(model, exit_) for exit_ in self.exits]
        weights = {
            f"{index}.{name}": exit_.get_parameter(name)
            for index, exit_ in enumerate(self.exits)
            for name in own_weights(exit_)
        }
        super().__init__(model, corpus, recipe, weights, vocab_ids)

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        places_N = batch.learned_BT.flatten().nonzero().squeeze(1)
        targets_NK, p_NK = self._labels(
            batch.best_ids_BTK.flatten(0, 1)[places_N], batch.best_p_BTK.flatten(0, 1)[places_N]
        )
        num_learned = max(len(places_N), 1)
        for exit_, unroller in zip(self.exits, self._unrollers, strict=True):
            losses, agreement = [], torch.zeros((), device=self._device)
            passes = unroller.outputs(batch.hidden[exit_.layer], batch.final_BTC, self._recipe.num_passes)
            for index, normed_BTC in enumerate(passes):
                logits_NV = exit_.head(normed_BTC.flatten(0, 1).index_select(0, places_N)).float()
                log_q_NK = logits_NV.gather(1, targets_NK.clamp_min(0)) - logits_NV.logsumexp(1, keepdim=True)
                losses.append(-(p_NK * log_q_NK).sum() / num_learned * self._recipe.pass_decay**index)
                if index == 0:
                    agreement = (logits_NV.argmax(1) == targets_NK[:, 0]).sum() / num_learned
            yield torch.stack(losses).sum(), agreement
