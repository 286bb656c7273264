"""What the networks of all draft heads have, and how one is read from its files.

Shape legend: B rows, T positions, C channels of the head, X channels of all states of a position, V tokens that it
can draft.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from specdec.drafters.head.formats import JUMP, HeadConfig, read_tensors
from specdec.errors import DraftError

Head = TypeVar("Head", bound="HeadNetwork")


class HeadOutput(NamedTuple):
    """Of every position: what stands for the target's states in the next step, and what the LM head reads."""

    states_BTC: Tensor
    normed_BTC: Tensor
    """What `HeadRun.logits` reads: normed, unless that norms it."""


class HeadNetwork(PreTrainedModel):
    """A network that reads the target's states. Embeddings and LM head that it lacks are the target's.

    Args:
        names: of the tensors in its files, which say what it has of its own.

    Attributes:
        head_config: sizes and variants.
        vocab_ids: int64 [V]: the target's token that each output stands for; None where they are the same.
    """

    config_class = PreTrainedConfig
    _supports_sdpa = True

    vocab_ids: Tensor | None

    def __init__(self, head_config: HeadConfig, names: Collection[str]):
        config = head_config.layers
        super().__init__(config)
        self.head_config = head_config
        size = config.hidden_size
        self.fc = nn.Linear(head_config.num_inputs, size, bias=False)
        self.norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
        self.embed_tokens = nn.Embedding(head_config.vocab_size, size) if "embed_tokens.weight" in names else None
        has_lm_head = "lm_head.weight" in names
        self.lm_head = nn.Linear(size, head_config.draft_vocab_size, bias=False) if has_lm_head else None
        ids = torch.arange(head_config.draft_vocab_size) if "d2t" in names else None
        self.register_buffer("vocab_ids", ids, persistent=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self._build_layers()
        self.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadNetwork:
        """Angles stay float32: rounded to bfloat16 they would be those of other positions."""
        frequencies = self.rotary_emb.inv_freq
        super()._apply(fn, recurse)
        self.rotary_emb.inv_freq = frequencies.to(self.norm.weight.device)
        return self

    @abstractmethod
    def _build_layers(self) -> None:
        """Make what is the network's own."""

    def fuse(self, states_BTX: Tensor) -> Tensor:
        """The target's states side by side, as one vector a position, [B, T, C]; those of one layer are one."""
        return states_BTX

    def for_run(self, target: PreTrainedModel) -> HeadRun:
        """What computes the head's outputs in one run."""
        return HeadRun(self, target)

    @abstractmethod
    def forward(self, embeds_BTC: Tensor, states_BTC: Tensor | None, *args: Any, **kwargs: Any) -> HeadOutput:
        """
        Args:
            embeds_BTC: of tokens.
            states_BTC: fused, or what the head has given in the step before; None where it drafts without.
            args, kwargs: mask (4-D; by kind of layer where there are several), positions and cache, as of models.
        """


class HeadRun:
    """A head's forwards and what it says, in one run of a target, whose embeddings and LM head are read where the head
    has none."""

    def __init__(self, head: HeadNetwork, target: PreTrainedModel):
        self.head = head
        self._target = target
        self._table: Any = head.embed_tokens or target.get_input_embeddings()
        self._last_token = (self._table.num_embeddings if self.embeddings is None else len(self.embeddings)) - 1

    @property
    def embeddings(self) -> Tensor | None:
        """By token [tokens, C], as they are stored (some models scale what they read); None where they are blocks of a
        GGUF file, which nothing scales."""
        return self._table.weight if isinstance(self._table, nn.Embedding) else None

    def __call__(self, *, input_ids: Tensor, states_BTC: Tensor | None, **inputs: Any) -> HeadOutput:
        """
        Args:
            input_ids: int64 [B, T].
            states_BTC, inputs: as of `HeadNetwork.forward`.
        """
        output: HeadOutput = self.head(embeds_BTC=self.embed(input_ids), states_BTC=states_BTC, **inputs)
        return output

    def logits(self, normed_BTC: Tensor) -> Tensor:
        """Over the rows of the LM head."""
        lm_head = self.head.lm_head or self._target.get_output_embeddings()
        logits_BTV: Tensor = lm_head(normed_BTC)
        return logits_BTV

    def embed(self, tokens_BT: Tensor) -> Tensor:
        tokens_BT, weight = tokens_BT.clamp(max=self._last_token), self.embeddings
        if weight is not None:
            return embedding(tokens_BT.to(weight.device), weight)
        embedded: Tensor = self._table(tokens_BT)
        return embedded


def load_network(kind: type[Head], config: HeadConfig, folder: str | os.PathLike[str]) -> Head:
    """A network with the weights in a folder, in their dtype.

    Raises:
        DraftError: they are not there, damaged, or not those of such a network.
    """
    tensors = read_tensors(folder)
    try:
        return built(kind, config, tensors)
    except (RuntimeError, ValueError) as error:
        raise DraftError(f"the head in {os.fspath(folder)} does not fit its config.json: {error}") from error


def built(kind: type[Head], config: HeadConfig, tensors: Mapping[str, Tensor]) -> Head:
    """A network with these weights, in their dtype.

    Raises:
        RuntimeError, ValueError: a tensor is missing, is one too many, or has another shape.
    """
    ids = tensors.get("d2t")
    if ids is None and config.draft_vocab_size != config.vocab_size:
        raise ValueError(f"d2t is missing, which says what the {config.draft_vocab_size} tokens are that it can draft")
    if "lm_head.weight" not in tensors and ids is not None and config.kind != JUMP:  # whose rows are the target's
        raise ValueError("lm_head.weight is missing")
    head = kind(config, tensors.keys()).to(tensors["fc.weight"].dtype)
    head.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "d2t"})
    if ids is not None:
        assert head.vocab_ids is not None
        if ids.shape != head.vocab_ids.shape:
            raise ValueError(f"d2t has {len(ids)} entries for {config.draft_vocab_size} tokens")
        head.vocab_ids += ids
    return head
