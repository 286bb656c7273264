"""Rows sampled by the thousand, beside the exact distribution of what follows a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter
from specdec.testing import tiny_model
from tests.support.goodness import assert_drawn_from
from trees import ROOT, TokenTree

VOCAB_SIZE = 6
NUM_NEW = 3
NUM_SAMPLES = 3_000


def tiny(seed: int) -> PreTrainedModel:
    return tiny_model(
        "llama", seed=seed, vocab_size=VOCAB_SIZE, num_hidden_layers=1, hidden_size=16, initializer_range=0.6
    )


def draw_fork(sequences: Sequences, q_V: Tensor) -> list[TokenTree]:
    """For each row two siblings, drawn without replacement, and a child of each, all from the same q."""
    siblings = torch.multinomial(q_V.expand(len(sequences), -1), 2)
    children = torch.multinomial(q_V, 2 * len(sequences), replacement=True).view(-1, 2)
    tokens_BN = torch.cat([siblings, children], 1).tolist()
    return [TokenTree(tokens=tokens, parents=[ROOT, ROOT, 0, 1]) for tokens in tokens_BN]


def exact_distribution(
    model: PreTrainedModel, prompt: Tensor, mask: Tensor | None = None, num_new: int = NUM_NEW, **options: Any
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation by `num_new` tokens, from the scores that transformers samples from."""
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_new):
        prefixes = torch.tensor(list(joint)).long()
        input_ids = torch.cat([prompt.expand(len(joint), -1), prefixes], 1)
        masks = None if mask is None else torch.cat([mask.expand(len(joint), -1), torch.ones_like(prefixes)], 1)
        out = model.generate(
            input_ids,
            attention_mask=masks,
            max_new_tokens=1,
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        followers = out.scores[0].double().softmax(-1).tolist()
        joint = {
            (*prefix, token): chance * follower
            for row, (prefix, chance) in enumerate(joint.items())
            for token, follower in enumerate(followers[row])
            if follower
        }
    return joint


def continuations(out: Tensor, prompt_length: int) -> list[tuple[int, ...]]:
    return list(map(tuple, out[:, prompt_length:].tolist()))


def assert_ragged_rows_are_exact(target: PreTrainedModel, drafter: Drafter, **choices: Any) -> None:
    """Under a processor that looks at each node's own prefix."""
    options = {"top_k": 0, "repetition_penalty": 1.3}
    prompts = torch.tensor([[1, 4, 2, 1], [0, 0, 5, 3]])
    masks = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    torch.manual_seed(1)
    out = specdec.generate(
        target,
        prompts.repeat(NUM_SAMPLES, 1),
        attention_mask=masks.repeat(NUM_SAMPLES, 1),
        do_sample=True,
        max_new_tokens=NUM_NEW,
        drafter=drafter,
        **choices,
        **options,
    )
    for row in (0, 1):
        expected = exact_distribution(target, prompts[row : row + 1], masks[row : row + 1], **options)
        label = f"row {row}, {type(drafter).__name__}, {choices}"
        assert_drawn_from(continuations(out[row::2], prompts.shape[1]), expected, label)
