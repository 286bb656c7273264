"""Where drafts come from. `base` holds the contract; write your own against it (see `docs/structures.md`)."""

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.drafters.auto.drafter import Auto
from specdec.drafters.composite.cascade import Cascade
from specdec.drafters.composite.mixed import Mixed
from specdec.drafters.early_exit.drafter import EarlyExit
from specdec.drafters.head.drafter import DraftHead
from specdec.drafters.lookup.prompt_lookup import PromptLookup
from specdec.drafters.model.foreign_model import ForeignModel
from specdec.drafters.model.quantized_self import QuantizedSelf
from specdec.drafters.model.small_model import SmallModel
from specdec.drafters.model.sparse_self import SparseSelf
from specdec.drafters.plain import Plain

__all__ = [
    "Auto",
    "Cascade",
    "DraftHead",
    "DraftSession",
    "Drafter",
    "EarlyExit",
    "ForeignModel",
    "Mixed",
    "Outcome",
    "Plain",
    "PromptLookup",
    "QuantizedSelf",
    "Run",
    "SmallModel",
    "SparseSelf",
]
