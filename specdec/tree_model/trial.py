"""A short text, decoded by trees and as transformers decodes it: what a model of an unknown family has to agree on.

The batch is ragged, and its prompts reach past the model's windows, chunks and top-k as far as these are short. Rows
are prefilled together, with padding; the longest is also read alone, as an engine reads. What plain decoding says to
the same tokens, one by one, with the positions, masks and cache that transformers gives it, is the measure.

Shape legend: B rows, P prompt, T tokens of the text from the prompt's last on, N logits, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from specdec.hf import cache_name
from specdec.tree_model.model import TreeModel
from trees import ROOT, TokenTree, TreeBatch

_FARTHEST = 256
"""What a longer window, chunk or top-k hides is not tried: a trial is cheap."""
_LIMITS = ("window", "chunk", "topk", "budget")
"""In the names of settings past which a token does not see all that came before it."""
_LENGTHS = (12, 7)
"""Tokens of the prompts where there is no such setting."""
_PARENTS = (ROOT, ROOT, 1)
_PATHS = ((0,), (1, 2))
"""Of nodes, in a tree with these parents."""
_NUM_NEW = 6
"""Positions of two rounds, a node of the second that goes past the path of its row included."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Row by row the root, the tree, and the path that turns out right."""

    roots: Sequence[int]
    trees: Sequence[TokenTree]
    paths: Sequence[Sequence[int]]

    @property
    def slots(self) -> list[list[int]]:
        """Of root and path in each row's tail."""
        return [[0, *(node + 1 for node in path)] for path in self.paths]

    def tokens(self, row: int) -> list[int]:
        """The root and what is on the path."""
        return [self.roots[row], *(self.trees[row].tokens[node] for node in self.paths[row])]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """Two prompts and what follows them."""

    prompts: Sequence[Sequence[int]]
    rounds: Sequence[_Round]

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [B, P] prompts and mask."""
        width = max(map(len, self.prompts))
        gaps = [[0] * (width - len(prompt)) for prompt in self.prompts]
        ids = [[*gap, *prompt] for gap, prompt in zip(gaps, self.prompts, strict=True)]
        mask = [[*gap, *[1] * len(prompt)] for gap, prompt in zip(gaps, self.prompts, strict=True)]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @property
    def beginning(self) -> _Text:
        """A row that has no more than its first round: the root is its prompt."""
        first = self.rounds[0]
        (token, *_), root = first.trees[0].tokens, first.roots[0]
        return _Text(prompts=[[root]], rounds=[_Round(roots=[token], trees=[TokenTree.chain([])], paths=[[]])])

    def steps(self, device: torch.device) -> Iterator[Tensor]:
        """What follows the prompts, int64 [B, 1] each."""
        rows = [[token for each in self.rounds for token in each.tokens(row)] for row in range(len(self.prompts))]
        return iter(torch.tensor(rows, device=device).split(1, dim=1))


def trial_logits(model: PreTrainedModel, longest: int) -> tuple[Tensor, Tensor]:
    """What follows each token of the text, by trees and by plain decoding: logits, both float32 [N, V].

    Args:
        longest: tokens that a text of this model may have.
    """
    target = TreeModel(model)
    text = _text(target, longest)
    plain_BTV = _by_steps(model, text, target.device)
    by_tree = _by_tree(target, text)
    by_tree.append(_read_alone(target, text))
    wanted = [*plain_BTV, plain_BTV[0, 1 : 1 + len(by_tree[-1])]]
    if target.keeps_states:
        by_tree.append(_joined(target, text))
        wanted.append(_by_steps(model, text.beginning, target.device)[0])
    return torch.cat(by_tree).to(plain_BTV.device, torch.float32), torch.cat(wanted).float()


def _text(target: TreeModel, longest: int) -> _Text:
    tokens = _ordinary_tokens(target.model.config, target.vocab_size)
    return _Text(
        prompts=[list(islice(tokens, length)) for length in _prompt_lengths(target, longest - _NUM_NEW)],
        rounds=[
            _Round(
                roots=list(islice(tokens, 2)),
                trees=[TokenTree(tokens=list(islice(tokens, 3)), parents=_PARENTS) for _ in paths],
                paths=paths,
            )
            for paths in (_PATHS[::-1], _PATHS)
        ],
    )


def _prompt_lengths(target: TreeModel, longest: int) -> tuple[int, int]:
    """One prompt is past what there is to reach, the other comes past it in the first round."""
    reach = max((limit for limit in _limits(target) if limit <= _FARTHEST), default=0)
    long = max(1, min(longest, max(_LENGTHS[0], reach + 3)))
    return long, max(1, min(long - 5, max(_LENGTHS[1], reach - 2)))


def _limits(target: TreeModel) -> Iterator[int]:
    yield from (kind.reach for kind in target.kinds if kind is not None and kind.reach is not None)
    for name, value in target.model.config.get_text_config(decoder=True).to_dict().items():
        if any(part in name for part in _LIMITS) and isinstance(value, int):
            yield value


def _ordinary_tokens(config: PreTrainedConfig, vocab_size: int) -> Iterator[int]:
    """Endless and scattered; none that stands for an image, or for anything else that has a setting."""
    special = set(_token_ids(config.to_dict()))
    tokens = (7919 * index % vocab_size for index in count(1))
    return (token for token in tokens if token not in special or len(special) >= vocab_size)


def _token_ids(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            yield from value if isinstance(value, list) else [value]


def _by_steps(model: PreTrainedModel, text: _Text, device: torch.device) -> Tensor:
    """Plain decoding, [B, T, V]: what `model.generate()` does once it has its arguments together."""
    ids_BP, mask_BP = text.padded(device)
    inputs: dict[str, Any] = {"attention_mask": mask_BP, "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = model._prepare_position_ids_for_generation(ids_BP, inputs)
    inputs[cache_name(model)] = DynamicCache(config=model.config)
    outputs = model._prefill(ids_BP, GenerationConfig(), inputs)
    logits = [outputs.logits[:, -1]]
    for tokens_B1 in text.steps(device):
        ids_BP = torch.cat([ids_BP, tokens_B1], 1)
        inputs = model._update_model_kwargs_for_generation(outputs, inputs)
        outputs = model(
            **model.prepare_inputs_for_generation(ids_BP, next_sequence_length=1, **inputs), return_dict=True
        )
        logits.append(outputs.logits[:, -1])
    return torch.stack([logits_BV.to(device) for logits_BV in logits], 1)


def _by_tree(target: TreeModel, text: _Text) -> list[Tensor]:
    """[T, V] of every row."""
    ids_BP, mask_BP = text.padded(target.device)
    rows = [[logits_1V] for logits_1V in target.prefill(ids_BP, attention_mask=mask_BP)]
    for each in text.rounds:
        roots_B1 = torch.tensor(each.roots, device=target.device).unsqueeze(1)
        logits_BTV = target.verify(TreeBatch.stack(each.trees, target.device), roots_B1)
        target.commit(each.slots)
        for row, slots in enumerate(each.slots):
            rows[row].append(logits_BTV[row, slots])
    return [torch.cat(parts) for parts in rows]


def _read_alone(target: TreeModel, text: _Text) -> Tensor:
    """The first row's first round, [N, V], after its prompt has been read in two parts."""
    first, prompt_1P = text.rounds[0], torch.tensor(text.prompts[:1], device=target.device)
    target.begin(1)
    for part_1T in prompt_1P.split(-(-prompt_1P.shape[1] // 2), dim=1):
        target.read(part_1T)
    trees = TreeBatch.stack(first.trees[:1], target.device)
    logits_BTV = target.verify(trees, torch.tensor([first.roots[:1]], device=target.device))
    return logits_BTV[0, first.slots[0]]


def _joined(target: TreeModel, text: _Text) -> Tensor:
    """A row that has read nothing, [2, V], beside one that has: its states are not zeros in every model."""
    first, beginning = text.rounds[0], text.beginning
    target.forget_tail()
    target.join()
    tokens = [*beginning.prompts[0], *beginning.rounds[0].roots]
    trees = TreeBatch.stack([first.trees[0], TokenTree.chain(tokens[1:])], target.device)
    roots_B1 = torch.tensor([[first.roots[0]], tokens[:1]], device=target.device)
    return target.verify(trees, roots_B1)[1, : len(tokens)]
