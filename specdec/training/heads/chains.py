"""Trains heads that draft a token after the other: EAGLE-3 and jump heads, and MTP layers.

In drafting they read their own output where the target has no state yet; so they do in training ("training-time test",
Li et al. 2025, section 3.1). A chain begins at every position: its k-th step reads the true next token beside what the
step before has said, and attends to true states up to where the chain begins and to the chain after. All chains of a
row go through the layers together, a step at a time. The loss of a step is the cross-entropy to the target's
likeliest tokens, whose gradient is that of the divergence from the target's distribution.

Shape legend: B rows, T positions, P pairs of a state and the token after it, C channels, N pairs with a loss, K
likeliest tokens, V draft vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp import Mtp
from specdec.exits.module import final_norm
from specdec.hf import CACHE
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.exits import pass_mask
from specdec.training.heads.initial import initial_eagle, initial_mtp
from specdec.training.heads.jumps import initial_jump
from specdec.training.heads.recipes import EagleRecipe, JumpRecipe, MtpRecipe
from specdec.training.heads.trainer import Trainer


class ChainHead:
    """A head in training, with what it shares with its target."""

    def __init__(self, head: Eagle3 | Mtp | Jump, model: PreTrainedModel):
        self.head = head
        self._embedding_VC = model.get_input_embeddings().weight
        self._lm_head: Callable[[Tensor], Tensor] = head.lm_head or model.get_output_embeddings()
        self._final_norm = final_norm(model) if isinstance(head, Mtp) else None
        num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
        self._layers: Sequence[int] = head.head_config.layers_read(num_layers)

    def steps(self, batch: Batch, count: int) -> Iterator[Tensor]:
        """What the LM head reads of each pair, [B, P, C], step after step.

        Pair t is the token at t + 1 and the state at t; what is said of it is about the token at t + 2. At step k a
        chain has begun k pairs before, and what is said of the first k pairs means nothing.
        """
        states_BTX = torch.cat([batch.hidden[layer] for layer in self._layers], -1)[:, :-1]
        if self._final_norm is not None:
            states_BTX = self._final_norm(states_BTX)
        states_BPC = self.head.fuse(states_BTX)
        embeds_BPC = F.embedding(batch.tokens_BT[:, 1:], self._embedding_VC)
        positions_1P = torch.arange(embeds_BPC.shape[1], device=embeds_BPC.device).unsqueeze(0)
        cache = DynamicCache()
        for step in range(count):
            mask_11PS = pass_mask(embeds_BPC.shape[1], step, embeds_BPC.device)[None, None]
            output = self.head(embeds_BPC, states_BPC, mask_11PS, positions_1P, **{CACHE: cache})
            states_BPC = F.pad(output.states_BTC[:, :-1], (0, 0, 1, 0))
            yield output.normed_BTC

    def logits(self, normed_NC: Tensor) -> Tensor:
        """[N, V] of what it can draft."""
        return self._lm_head(normed_NC).float()

    def said(self, normed_NC: Tensor) -> Tensor:
        """The likeliest token of each, of the target's vocabulary, int64 [N]."""
        best_N = self.logits(normed_NC).argmax(1)
        return best_N if self.head.vocab_ids is None else self.head.vocab_ids[best_N]


def by_chain(parts: Sequence[Tensor]) -> Tensor:
    """Of bool [B, P] for each step, those of a chain side by side: bool [B, P, S], False past the end of the row."""
    shifted = [F.pad(part_BP[:, step:], (0, step)) for step, part_BP in enumerate(parts)]
    return torch.stack(shifted, 2)


class ChainTrainer(Trainer):
    """Trains an EAGLE-3 or jump head or an MTP layer; shows how many tokens of a chain are the target's choices, on
    average, up to the first that is not.

    Attributes:
        head: what is trained.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, recipe: EagleRecipe):
        self._recipe = recipe
        self.head: Eagle3 | Mtp | Jump
        if isinstance(recipe, MtpRecipe):
            vocab_ids = torch.arange(corpus.vocab_size, device=model.device)
            self.head = initial_mtp(model, recipe)
        else:
            vocab_ids = corpus.frequent_ids(recipe.vocabulary)
            if isinstance(recipe, JumpRecipe):
                self.head = initial_jump(model, vocab_ids, recipe, corpus)
            else:
                self.head = initial_eagle(model, vocab_ids, recipe, corpus)
        self._chain = ChainHead(self.head, model)
        weights = {name: weight for name, weight in self.head.named_parameters() if not name.startswith("lm_head")}
        super().__init__(model, corpus, recipe, weights, vocab_ids)

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, learned_BP = self._recipe, batch.learned_BT[:, 1:]
        targets_BPK, p_BPK = self._labels(batch.best_ids_BTK[:, 1:], batch.best_p_BTK[:, 1:])
        losses, right = [], []
        for step, normed_BPC in enumerate(self._chain.steps(batch, recipe.reach)):
            has_loss_BP = learned_BP.clone()
            has_loss_BP[:, :step] = False
            normed_NC = normed_BPC[has_loss_BP]
            slope_NC, right_N = self._slope(normed_NC, targets_BPK[has_loss_BP], p_BPK[has_loss_BP])
            losses.append(recipe.decay**step * (slope_NC * normed_NC).sum())
            right.append(torch.zeros_like(has_loss_BP).masked_scatter(has_loss_BP, right_N))
        runs_BPS = by_chain(right).long().cumprod(2)
        total = torch.stack(losses).sum() / sum(recipe.decay**step for step in range(recipe.reach))
        yield total, (runs_BPS.sum(2) * learned_BP).sum() / learned_BP.sum().clamp_min(1)

    def _slope(self, normed_NC: Tensor, targets_NK: Tensor, p_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss, so that no step keeps its logits; bool [N]: whether the target's choice is the
        likeliest."""
        normed_NC = normed_NC.detach().requires_grad_()
        logits_NV: Any = self._chain.logits(normed_NC)
        log_q_NK = logits_NV.gather(1, targets_NK.clamp_min(0)) - logits_NV.logsumexp(1, keepdim=True)
        loss = -(p_NK * log_q_NK).sum() / max(len(p_NK), 1)
        return torch.autograd.grad(loss, normed_NC)[0], logits_NV.argmax(1) == targets_NK[:, 0]
