"""What the tests of equality share: the outputs of plain decoding, and drafts that are partly right."""

import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import SpeculativeOutput
from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter
from specdec.drafters.auto.knowledge import Knowledge
from specdec.kernels.model.profile import all_profiles
from specdec.testing import BYTE_VOCAB_SIZE
from trees import ROOT, TokenTree


def rows_of(prompts: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Some rows of left-padded prompts, without the columns that are padding in all of them."""
    first = int(prompts["attention_mask"][rows].any(0).long().argmax())
    return {name: tensor[rows, first:] for name, tensor in prompts.items()}


def plain_alone(model: PreTrainedModel, prompts: Mapping[str, Tensor], num_new: int) -> Tensor:
    """What `model.generate()` says to each row when the row is alone and unpadded: int64 [B, P + num_new]."""
    rows = [
        model.generate(**rows_of(prompts, [row]), max_new_tokens=num_new, do_sample=False)[0, -num_new:]
        for row in range(len(prompts["input_ids"]))
    ]
    return torch.cat([prompts["input_ids"], torch.stack(rows)], 1)


def speculate(
    model: PreTrainedModel, prompts: Mapping[str, Tensor], drafter: Drafter | str, **options: Any
) -> SpeculativeOutput:
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, **options}
    return specdec.generate(model, **prompts, drafter=drafter, **settings)


def with_noise(model: PreTrainedModel, std: float = 0.02) -> PreTrainedModel:
    """A copy that often agrees with the model: a draft of which a part is accepted."""
    copy = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in copy.parameters():
            weights += std * torch.randn(weights.shape, generator=generator).to(weights.dtype)
    return copy


class PartlyWrongScript:
    """A script for `ScriptedDrafter`: random trees that hold the next tokens of a known output among wrong ones.

    Args:
        reference: int64 [B, L] the outputs, prompts included.
        longest: most true tokens in a tree.
        vocab_size: wrong tokens are drawn below it.
    """

    def __init__(self, reference: Tensor, longest: int = 6, vocab_size: int = BYTE_VOCAB_SIZE):
        self.num_true = 0
        """True tokens proposed so far: exactly these must be accepted."""
        self._reference = reference.tolist()
        self._longest = longest
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    def __call__(self, sequences: Sequences) -> list[TokenTree]:
        return [
            self._tree(self._reference[row][length : length + self._longest + 1])
            for row, length in zip(sequences.rows, sequences.lengths, strict=True)
        ]

    def _tree(self, truth: Sequence[int]) -> TokenTree:
        wrong = sorted(set(range(self._vocab_size)) - set(truth))
        num_true = self._random.randrange(len(truth))
        self.num_true += num_true
        tokens, parents, tip = [], [], ROOT
        for token in truth[:num_true]:
            for _ in range(self._random.randrange(3)):
                parents.append(self._random.randrange(ROOT, len(tokens)))
                tokens.append(self._random.choice(wrong))
            parents.append(tip)
            tip = len(tokens)
            tokens.append(token)
        return TokenTree(tokens=[*tokens, wrong[0]], parents=[*parents, tip])


def forget_drafters() -> None:
    """Forget what runs have shown `Auto` of drafters, on all models."""
    for profile in all_profiles():
        profile.part(Knowledge).clear()
