"""How heads are trained: with data and model a recipe determines the result, up to the machine's rounding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all of them have.

    Args:
        epochs: times that every row is trained on.
        batch_rows: rows in a step.
        learning_rate: of AdamW, at the top of a short rise and a cosine's fall.
        vocabulary: V.
        seed: of the order of rows, and of what is drawn in training.
    """

    epochs: int = 2
    batch_rows: int = 4
    learning_rate: float = 1e-3
    vocabulary: int = 8192
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRecipe(Recipe):
    """How a head is trained that reads the target's states.

    Args:
        num_layers: of its own.
        reach: tokens in a row that it is trained to draft.
    """

    num_layers: int = 1
    reach: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecipe(HeadRecipe):
    """How a DSpark head is trained, which drafts a block of `reach` tokens at once.

    Args:
        anchors: A, blocks of a row in a step.
        markov_rank: 0 for no Markov head.
        decay: a slot weighs exp(-slot / decay).
        cross_entropy, total_variation: weights of the two parts of the loss.
    """

    num_layers: int = 2
    anchors: int = 24
    markov_rank: int = 64
    decay: float = 4.0
    cross_entropy: float = 0.1
    total_variation: float = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleRecipe(HeadRecipe):
    """How an EAGLE-3 head is trained, each token from what it has said before.

    Args:
        decay: a step weighs decay ** step.
    """

    decay: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpRecipe(EagleRecipe):
    """How a jump head is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpRecipe(EagleRecipe):
    """How an MTP layer is trained, as in FastMTP (arXiv 2509.18362). It drafts all tokens, and is one layer."""

    reach: int = 3
    decay: float = 0.6
