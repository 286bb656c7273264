"""The network of a DSpark head: a DFlash block whose tokens are told what was drafted before them.

Two small heads are added. The Markov head changes a slot's logits by what the token before it says, a product of low
rank; so a slot's distribution depends on that token, at no further forward. The confidence head says how likely a
slot's token is accepted where those before it were.

Shape legend: B rows, M slots, C channels, R rank, V tokens that it can draft.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdec.drafters.head.dflash import DFlash


class MarkovHead(nn.Module):
    """Changes of logits by the token before; `gated`: scaled by what the slot itself says."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, size: int, is_gated: bool):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        self.gate_proj = nn.Linear(size + rank, rank) if is_gated else None

    def read(self, tokens_BM: Tensor) -> Tensor:
        """What is known of the tokens before, [B, M, R]."""
        known_BMR: Tensor = self.markov_w1(tokens_BM.to(self.markov_w1.weight.device))
        return known_BMR

    def forward(self, known_BMR: Tensor, normed_BMC: Tensor) -> Tensor:
        """What is added to the logits, [B, M, V]."""
        if self.gate_proj is not None:
            known_BMR = known_BMR * self.gate_proj(torch.cat([normed_BMC, known_BMR], -1)).sigmoid()
        added_BMV: Tensor = self.markov_w2(known_BMR)
        return added_BMV


class ConfidenceHead(nn.Module):
    """Logit of the chance that a slot's token is accepted, if those before it are."""

    def __init__(self, size: int, rank: int):
        super().__init__()
        self.proj = nn.Linear(size + rank, 1)

    def forward(self, normed_BMC: Tensor, known_BMR: Tensor | None) -> Tensor:
        """[B, M]."""
        inputs = normed_BMC if known_BMR is None else torch.cat([normed_BMC, known_BMR], -1)
        logits_BM: Tensor = self.proj(inputs).squeeze(-1)
        return logits_BM


class DSpark(DFlash):
    """A DSpark head."""

    def _build_layers(self) -> None:
        super()._build_layers()
        config, size = self.head_config, self.config.hidden_size
        self.markov_head = None
        if config.markov_rank:
            self.markov_head = MarkovHead(
                config.vocab_size, config.draft_vocab_size, config.markov_rank, size, config.markov_is_gated
            )
        rank = config.markov_rank if config.confidence_reads_token else 0
        self.confidence_head = ConfidenceHead(size, rank) if config.has_confidence else None

    def follow(self, logits_BMV: Tensor, normed_BMC: Tensor, tokens_BM: Tensor) -> Tensor:
        """The logits of slots, each after a token: int64 [B, M], of the target's vocabulary."""
        if self.markov_head is None:
            return logits_BMV
        return logits_BMV + self.markov_head(self.markov_head.read(tokens_BM), normed_BMC)

    def confidence(self, normed_BMC: Tensor, tokens_BM: Tensor) -> Tensor | None:
        """Logits of the chance that what slots draft after these tokens is accepted, [B, M]; None: it does not say."""
        if self.confidence_head is None:
            return None
        known_BMR = None
        if self.head_config.confidence_reads_token:
            assert self.markov_head is not None
            known_BMR = self.markov_head.read(tokens_BM)
        return self.confidence_head(normed_BMC, known_BMR)
