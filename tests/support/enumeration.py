"""Toy models over a small vocabulary, and a way to go through everything that a grower can draw from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Protocol, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import trees.layered
import trees.token_source
from trees import ROOT, Draft, Grower, GrowthPolicy, Round, TokenTree

VOCAB_SIZE = 3
MAX_DEPTH = 3
LENGTH = MAX_DEPTH + 1
"""Tokens that a round can commit."""

EXACT = 1e-12

Prefix: TypeAlias = tuple[int, ...]


class ToyModel:
    """Scores after every prefix, float64 [V]: random, then warped by the warpers of transformers."""

    def __init__(self, seed: int, warpers: Sequence = (), vocab_size: int = VOCAB_SIZE):
        self.vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)
        self._warpers = LogitsProcessorList(warpers)
        self._scores: dict[Prefix, Tensor] = {}
        for length in range(LENGTH + 1):
            for prefix in itertools.product(range(vocab_size), repeat=length):
                self._scores[prefix] = self._draw_scores()

    def _draw_scores(self) -> Tensor:
        scores_1V = 1.5 * torch.randn(1, self.vocab_size, generator=self._generator, dtype=torch.float64)
        return self._warpers(None, scores_1V)[0]

    def scores(self, prefix: Prefix) -> Tensor:
        return self._scores[prefix]

    def probs(self, prefix: Prefix) -> Tensor:
        return self._scores[prefix].softmax(-1)

    @cached_property
    def texts(self) -> Tensor:
        """Probability of every text of `LENGTH` tokens, in lexical order."""
        return self._continuations(())

    def completed(self, prefix: Prefix, last_V: Tensor) -> Tensor:
        """The same if the text begins with a prefix, and the token after it has another distribution."""
        number = sum(token * self.vocab_size**power for power, token in enumerate(reversed(prefix)))
        own = torch.cat([mass * self._continuations((*prefix, x)) for x, mass in enumerate(last_V)])
        texts = torch.zeros(self.vocab_size**LENGTH, dtype=torch.float64)
        texts[number * len(own) : (number + 1) * len(own)] = own
        return texts

    @cache  # noqa: B019 (a model lives as long as its test)
    def _continuations(self, prefix: Prefix) -> Tensor:
        if len(prefix) == LENGTH:
            return torch.ones(1, dtype=torch.float64)
        return torch.cat([p * self._continuations((*prefix, x)) for x, p in enumerate(self.probs(prefix))])


@dataclass
class Script:
    """Stands in for the draws, and goes through all their outcomes: `while script.advance(): ...`."""

    choices: list[int] = field(default_factory=list)
    num_options: list[int] = field(default_factory=list)
    position: int = 0
    prob: float = 1.0
    started: bool = False

    def advance(self) -> bool:
        """Prepare the next outcome; False after the last one."""
        self.position, self.prob = 0, 1.0
        if not self.started:
            self.started = True
            return True
        while self.choices and self.choices[-1] + 1 == self.num_options[-1]:
            self.choices.pop()
            self.num_options.pop()
        if self.choices:
            self.choices[-1] += 1
        return bool(self.choices)

    def draw_index(self, weights_NW: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.tensor([[self._choose(weights_W) for _ in range(count)] for weights_W in weights_NW])

    def _choose(self, weights_W: Tensor) -> int:
        options = weights_W.nonzero()[:, 0].tolist()
        if not options:
            return 0
        if self.position == len(self.choices):
            self.choices.append(0)
            self.num_options.append(len(options))
        chosen = options[self.choices[self.position]]
        self.position += 1
        self.prob *= float(weights_W[chosen] / weights_W.sum())
        return chosen


class Scores(Protocol):
    def scores(self, prefix: Prefix) -> Tensor: ...


def drive(grower: Grower, models: Sequence[Scores]) -> Draft:
    """A drafter at work: one model for each row."""
    placed: list[list[Prefix]] = [[] for _ in models]
    newest: list[list[Prefix]] = [[()] for _ in models]
    while True:
        rows = zip(models, newest, strict=True)
        layer = grower.grow(torch.stack([torch.stack([model.scores(prefix) for prefix in row]) for model, row in rows]))
        if not grower.needs_scores:
            return grower.finish()
        for row, (tokens, parents) in enumerate(zip(layer.tokens_BM.tolist(), layer.parents_BM.tolist(), strict=True)):
            above = [() if parent == ROOT else placed[row][parent] for parent in parents]
            newest[row] = [(*prefix, token) for prefix, token in zip(above, tokens, strict=True)]
            placed[row] += newest[row]


def grow(
    policy: GrowthPolicy,
    models: Sequence[Scores],
    max_depths: Sequence[int],
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> Draft:
    return drive(policy.start(Round(max_depths=max_depths, sample=sample, generator=generator)), models)


def every_draft(
    policy: GrowthPolicy, models: Sequence[ToyModel], monkeypatch: pytest.MonkeyPatch, batch_size: int = 1
) -> list[tuple[float, Draft]]:
    """All drafts that the policy can draw, with their probabilities."""
    script, drafts = Script(), []
    monkeypatch.setattr(trees.layered, "batch_size", lambda batch, num_slots: batch_size)
    monkeypatch.setattr(trees.token_source, "draw_index", script.draw_index)
    while script.advance():
        draft = grow(policy, models, [MAX_DEPTH] * len(models))
        drafts.append((script.prob, draft))
    assert sum(prob for prob, _ in drafts) == pytest.approx(1, abs=EXACT)
    return drafts


def q_of(draft: Draft, row: int, slot: int) -> Tensor:
    """The distribution that a slot's children were drawn from."""
    depth = [0, *draft.trees.row(row).depths][slot]
    return draft.q_at(depth, torch.tensor([row]), torch.tensor([slot]))[0]


def prefixes(tree: TokenTree) -> list[Prefix]:
    """Text before each slot."""
    return [(), *(tuple(tree.tokens[ancestor] for ancestor in tree.path(node)) for node in range(len(tree)))]


class RandomScores:
    """Scores after every prefix, made when asked for."""

    def __init__(self, seed: int, vocab_size: int = 11, spread: float = 2.0):
        self._seed, self._vocab_size, self._spread = seed, vocab_size, spread
        self._memo: dict[Prefix, Tensor] = {}

    def scores(self, prefix: Prefix) -> Tensor:
        if prefix not in self._memo:
            seed = (hash(prefix) * 1_000_003 + self._seed) % 2**31
            generator = torch.Generator().manual_seed(seed)
            self._memo[prefix] = self._spread * torch.randn(self._vocab_size, generator=generator)
        return self._memo[prefix]

    def probs(self, prefix: Prefix) -> Tensor:
        return self.scores(prefix).softmax(-1)
