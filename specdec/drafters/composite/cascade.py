"""Speculation on the draft: the target's int8 copy, or the target with a part of its past, drafts, and a cheaper one
makes it quick.

What leaves the copy is distributed as the copy's own processed distribution (the cheap drafter and the copy are
themselves lossless speculation), so that is the q of the draft. (Staged speculative decoding, Spector and Re 2023;
cascades, Chen et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Run
from specdec.drafters.composite.nested import NestedSession, NestedSparseSession
from specdec.drafters.model.quantized_self import QuantizedSelf
from specdec.drafters.model.sparse_self import SparseSelf
from specdec.errors import DraftError, UnsupportedOptionError
from specdec.tree_model.model import TreeModel
from trees import Chain


class Cascade(Drafter):
    """Drafts chains of a float32 target's int8 copy, or of the target with a part of its past, which decodes
    speculatively itself.

    The copy works on the target's cache, `SparseSelf` on a small one of its own: in a long text it sees little of what
    there is to copy, and prompt lookup all. It goes on until there are `min_tokens`, in rounds of its own, in each of
    which the cheap drafter proposes and the copy verifies. A call may name `tree=trees.Chain(length)`, which sets both
    numbers.

    Args:
        cheap: a drafter that can take back what it has read: `PromptLookup()`, a `SmallModel`, an `Auto` of these.
        middle: a `QuantizedSelf`, which makes the copy, or a `SparseSelf`, whose own length of chains does not count.
        num_tokens: most tokens of a draft.
        min_tokens: the copy goes on in any case up to this many.

    Raises:
        ValueError: an argument is none of these, or `min_tokens` is greater than `num_tokens`.
        UnsupportedOptionError: at the call, for another tree than a chain.
        DraftError: at the call, what `SparseSelf` says of the target, or if the copy cannot read the target's keys and
            values, which must be float32.
    """

    def __init__(
        self,
        cheap: Drafter,
        middle: QuantizedSelf | SparseSelf | None = None,
        num_tokens: int = 12,
        min_tokens: int = 4,
    ):
        if not isinstance(cheap, Drafter):
            raise ValueError(
                f"Cascade(cheap={cheap!r}): cheap is a drafter, for example specdec.drafters.PromptLookup()"
            )
        if not cheap.supports_rollback:
            raise ValueError(
                f"Cascade(cheap={type(cheap).__name__}): cheap must be able to take back what it has read: "
                "PromptLookup, SmallModel, or Auto of these"
            )
        if not isinstance(middle, QuantizedSelf | SparseSelf | None):
            raise ValueError(
                f"Cascade(middle={middle!r}): middle is a QuantizedSelf or a SparseSelf; a draft model goes into Auto "
                "or SmallModel"
            )
        for name, value in (("num_tokens", num_tokens), ("min_tokens", min_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Cascade({name}={value!r}): {name} is a positive integer")
        if min_tokens > num_tokens:
            raise ValueError(
                f"Cascade(num_tokens={num_tokens}, min_tokens={min_tokens}): min_tokens is the smaller one"
            )
        self.cheap = cheap
        self.middle = QuantizedSelf() if middle is None else middle
        self.num_tokens = num_tokens
        self.min_tokens = min_tokens
        self.prior_acceptance = self.middle.prior_acceptance

    def models(self) -> Iterator[PreTrainedModel]:
        return chain(self.cheap.models(), self.middle.models())

    def start(self, run: Run) -> DraftSession:
        if run.tree is not None and type(run.tree) is not Chain:
            raise UnsupportedOptionError(
                f"Cascade drafts chains, not tree={run.tree!r}: pass trees.Chain(length), or leave the tree out"
            )
        most, least = self.num_tokens, self.min_tokens
        if run.tree is not None:
            most = least = run.tree.length
        if isinstance(self.middle, SparseSelf):
            copy, budget = self.middle.model_of(run), self.middle.budget
            return NestedSparseSession(run, copy, self.cheap, most=most, least=least, budget=budget)
        target = run.target.model
        if not self.middle.shares_cache(target):
            raise DraftError(
                f"Cascade: the int8 copy reads the target's keys and values, which are {target.dtype} and not float32: "
                "load the target in float32, or draft with QuantizedSelf() alone"
            )
        return NestedSession(run, TreeModel(self.middle.copy_of(target)), self.cheap, most=most, least=least)
