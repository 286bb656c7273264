"""How a call speculates: who drafts, in which shape, and how drafts are verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.cuda.fixed_shape import bit_exact_model
from specdec.decoding.drafter import Drafter
from specdec.drafters.auto.drafter import Auto
from specdec.drafters.head.drafter import DraftHead
from specdec.drafters.head.network import HeadNetwork
from specdec.drafters.lookup.prompt_lookup import PromptLookup
from specdec.drafters.model.small_model import SmallModel
from specdec.errors import UnsupportedOptionError
from specdec.hf import home_device
from specdec.tree_model.compatibility import check_model
from specdec.tree_model.model import TreeModel
from trees import GrowthPolicy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Speculation:
    """The options of a call that only specdec has; arguments as of `specdec.generate`.

    Raises:
        ValueError: a wrong argument.
    """

    drafter: Drafter
    tree: GrowthPolicy | None = None
    verify: str = "topdown"
    generator: torch.Generator | None = None
    exact: str | None = None

    def __post_init__(self) -> None:
        if self.exact not in (None, "bits"):
            raise ValueError(f"exact={self.exact!r}: it is None or 'bits'")
        if self.tree is not None and not isinstance(self.tree, GrowthPolicy):
            raise ValueError(f"tree={self.tree!r}: pass a growth policy such as trees.Chain(5), or None")
        if self.verify not in ("topdown", "traversal"):
            raise ValueError(f"verify={self.verify!r}: it is 'topdown' or 'traversal'")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise ValueError(
                f"generator={self.generator!r}: pass a torch.Generator, for example torch.Generator().manual_seed(0)"
            )

    @classmethod
    def of(
        cls,
        drafter: Drafter | PreTrainedModel | str | None,
        *,
        tree: GrowthPolicy | None = None,
        verify: str = "topdown",
        generator: torch.Generator | None = None,
        exact: str | None = None,
    ) -> Speculation:
        """With the drafter that an argument stands for.

        Args:
            tree: where the caller names one, the drafter is the one that grows it: there is nothing left to choose.
        """
        drafter = _as_drafter(drafter, tree)
        return cls(drafter=drafter, tree=tree, verify=verify, generator=generator, exact=exact)

    def check(self, model: Any) -> None:
        """Refuse a model that cannot be decoded like this.

        Raises:
            UnsupportedModelError: it cannot be decoded by tree.
            UnsupportedOptionError: `exact`, with a drafter that runs some of its layers.
            ValueError: it is no model, or not where the generator is.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"model is a transformers PreTrainedModel, got {type(model).__name__}{_where_inside(model)}"
            )
        if self.generator is not None and self.generator.device.type != home_device(model).type:
            raise ValueError(
                f"the generator is on {self.generator.device} and the model on {home_device(model)}: make it with "
                f"torch.Generator({home_device(model).type!r})"
            )
        if self.exact and self.drafter.needs_exits:
            raise UnsupportedOptionError(
                f"exact='bits' does not go with {self.drafter!r}, which runs layers of the target in forwards of other "
                "shapes: take another drafter"
            )
        check_model(model)

    def make_target(self, model: PreTrainedModel, num_rows: int) -> TreeModel:
        """The tree model that verifies.

        Raises:
            UnsupportedModelError: `exact` is not possible with the model.
            UnsupportedOptionError: or not with the tree.
        """
        return bit_exact_model(model, num_rows, self.tree) if self.exact else self.drafter.make_target(model)


def _as_drafter(drafter: Drafter | PreTrainedModel | str | None, tree: GrowthPolicy | None) -> Drafter:
    if drafter is None or drafter == "auto":
        return Auto() if tree is None else PromptLookup()
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        small = DraftHead(drafter) if isinstance(drafter, HeadNetwork) else SmallModel(drafter)
        return Auto(small) if tree is None else small
    raise ValueError(
        f"drafter={drafter!r}: pass a specdec.drafters instance, a smaller model of the same tokenizer, the folder of "
        "a draft head, a name such as 'prompt-lookup', None or 'auto'"
    )


def _where_inside(model: Any) -> str:
    """What to do where a model has been wrapped."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return ": prompts that were learned are no part of the model inside, use its own generate()"
    if hasattr(model, "get_base_model"):
        return ": pass model.get_base_model(), in which the adapters are active"
    if hasattr(model, "_orig_mod"):
        return ": compile it in place, with model.compile()"
    return ""
