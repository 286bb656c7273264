"""Trains DSpark heads: blocks of tokens from one forward (`specdec/drafters/head/dspark.py`).

A block begins at an anchor, a token of an answer. It sees the target's states before the anchor, and itself; its slots
are to say the tokens that the model went on with. Many blocks of a row go through the layers together. The loss of a
slot is that of DSpark: a little cross-entropy, the total variation between the slot's distribution and the target's,
which is what is refused of it, and, for the confidence head, the cross-entropy to what is accepted.

Shape legend: B rows, T positions, A anchors of a row, S slots of a block, C channels, N slots with a loss, K likeliest
tokens, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.drafters.head.dspark import DSpark
from specdec.hf import CACHE
from specdec.training.heads.corpus import Batch, Corpus
from specdec.training.heads.initial import initial_block
from specdec.training.heads.recipes import BlockRecipe
from specdec.training.heads.trainer import Trainer


class _Slots(NamedTuple):
    """Of N slots with a loss: what the LM head reads, the token before, the row and position of its state, the number
    of the slot in its block, and the place of its block."""

    normed_NC: Tensor
    tokens_N: Tensor
    rows_N: Tensor
    positions_N: Tensor
    depths_N: Tensor
    blocks_N: Tensor


class BlockTrainer(Trainer):
    """Trains a DSpark head; shows how many tokens of a block are the target's choices, on average, up to the first
    that is not.

    Attributes:
        head: what is trained.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, recipe: BlockRecipe):
        self._recipe = recipe
        vocab_ids = corpus.frequent_ids(recipe.vocabulary)
        self.head = initial_block(model, vocab_ids, recipe, corpus.layers)
        self._embedding = model.get_input_embeddings().weight
        weights = {name: weight for name, weight in self.head.named_parameters() if not name.startswith("lm_head")}
        super().__init__(model, corpus, recipe, weights, vocab_ids)

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, head = self._recipe, self.head
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        anchors_BA = draw_anchors(batch.learned_BT, recipe.anchors, generator)
        slots = self._slots(batch, anchors_BA)
        at = slots.rows_N, slots.positions_N
        targets_NK, p_NK = self._labels(batch.best_ids_BTK[at], batch.best_p_BTK[at])
        logits_NV = block_logits(head, slots.normed_NC, slots.tokens_N).float()
        log_q_NK = logits_NV.gather(1, targets_NK.clamp_min(0)) - logits_NV.logsumexp(1, keepdim=True)
        accepted_N = torch.minimum(log_q_NK.exp(), p_NK).sum(1)
        losses_N = recipe.total_variation * (1 - accepted_N) - recipe.cross_entropy * (p_NK * log_q_NK).sum(1)
        confidence_N = head.confidence(slots.normed_NC, slots.tokens_N)
        assert confidence_N is not None
        losses_N = losses_N + F.binary_cross_entropy_with_logits(
            confidence_N.float(), accepted_N.detach().clamp(0, 1), reduction="none"
        )
        weights_N = torch.exp(-slots.depths_N / recipe.decay)
        right_N = (logits_NV.argmax(1) == targets_NK[:, 0]).detach()
        lengths = run_lengths(right_N, slots.blocks_N, slots.depths_N)
        yield (weights_N * losses_N).sum() / weights_N.sum().clamp_min(1e-6), lengths.mean()

    def _slots(self, batch: Batch, anchors_BA: Tensor) -> _Slots:
        normed_BASC = run_blocks(self.head, self._embedding, batch, anchors_BA)
        positions_BAS = anchors_BA.unsqueeze(2) + torch.arange(normed_BASC.shape[2], device=anchors_BA.device)
        num_positions = batch.learned_BT.shape[1]
        inside_BAS = positions_BAS < num_positions
        positions_BAS = positions_BAS.clamp(max=num_positions - 1)
        rows_BAS = torch.arange(len(anchors_BA), device=anchors_BA.device)[:, None, None].expand_as(positions_BAS)
        has_loss_BAS = (batch.learned_BT[rows_BAS, positions_BAS] & inside_BAS).long().cumprod(2).bool()
        blocks_BAS = torch.arange(anchors_BA.numel(), device=anchors_BA.device).view_as(anchors_BA).unsqueeze(2)
        depths_BAS = torch.arange(normed_BASC.shape[2], device=anchors_BA.device).expand_as(positions_BAS)
        positions_N, rows_N = positions_BAS[has_loss_BAS], rows_BAS[has_loss_BAS]
        return _Slots(
            normed_BASC[has_loss_BAS],
            batch.tokens_BT[rows_N, positions_N],
            rows_N,
            positions_N,
            depths_BAS[has_loss_BAS],
            blocks_BAS.expand_as(positions_BAS)[has_loss_BAS],
        )


def draw_anchors(learned_BT: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions [B, count] before a learned token, at random, increasing.

    A row that has fewer gets others as well, which have no loss.
    """
    chances_BT = learned_BT.float().cpu() + 1e-9
    chances_BT[:, 0] = 0  # a block sees at least one state
    anchors_BA = torch.multinomial(chances_BT, min(count, learned_BT.shape[1] - 1), generator=generator)
    return anchors_BA.sort(1).values.to(learned_BT.device)


def run_blocks(head: DSpark, embedding_VC: Tensor, batch: Batch, anchors_BA: Tensor) -> Tensor:
    """What the LM head reads of every slot, [B, A, S, C], of blocks that begin at anchors."""
    config, (num_rows, num_anchors) = head.head_config, anchors_BA.shape
    states_BTX = torch.cat([batch.hidden[layer] for layer in config.layers_read(0)], -1)
    num_positions, device = states_BTX.shape[1], anchors_BA.device
    cache = DynamicCache()
    positions_1T = torch.arange(num_positions, device=device).unsqueeze(0)
    head.read(head.fuse(states_BTX), positions_1T, cache)
    tokens_BAS = anchors_BA.new_full((num_rows, num_anchors, config.block_size), config.mask_token_id)
    tokens_BAS[:, :, 0] = batch.tokens_BT.gather(1, anchors_BA)
    positions_BAS = anchors_BA.unsqueeze(2) + torch.arange(config.block_size, device=device)
    seen_BQT = positions_1T.unsqueeze(0) < anchors_BA.repeat_interleave(config.block_size, 1).unsqueeze(2)
    blocks_Q = torch.arange(num_anchors, device=device).repeat_interleave(config.block_size)
    own_QQ = blocks_Q.unsqueeze(1) == blocks_Q
    mask_B1QK = torch.cat([seen_BQT, own_QQ.expand(num_rows, -1, -1)], 2).unsqueeze(1)
    embeds_BQC = F.embedding(tokens_BAS.flatten(1), embedding_VC)
    output = head(embeds_BQC, None, mask_B1QK, positions_BAS.flatten(1), **{CACHE: cache})
    normed_BASC: Tensor = output.normed_BTC.unflatten(1, (num_anchors, config.block_size))
    return normed_BASC


def block_logits(head: DSpark, normed_NC: Tensor, tokens_N: Tensor) -> Tensor:
    """Logits [N, V] of slots after these tokens."""
    assert head.lm_head is not None
    logits_NV = head.lm_head(normed_NC)
    return head.follow(logits_NV.unsqueeze(0), normed_NC.unsqueeze(0), tokens_N.unsqueeze(0)).squeeze(0)


def run_lengths(right_N: Tensor, blocks_N: Tensor, depths_N: Tensor) -> Tensor:
    """Of every block that has a slot with a loss: right slots before the first wrong one, float32."""
    if not len(right_N):
        return torch.zeros(1, device=right_N.device)
    table = right_N.new_zeros(int(blocks_N.max()) + 1, int(depths_N.max()) + 1)
    table[blocks_N, depths_N] = right_N
    return table.long().cumprod(1).sum(1)[blocks_N.unique()].float()
