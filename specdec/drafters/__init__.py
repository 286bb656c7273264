"""Where drafts come from. `base` holds the contract; write your own against it (see `docs/structures.md`)."""

from specdec.drafters.auto import Auto
from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from specdec.drafters.cascade import Cascade
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.foreign_model import ForeignModel
from specdec.drafters.mixed import Mixed
from specdec.drafters.plain import Plain
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.quantized_self import QuantizedSelf
from specdec.drafters.small_model import SmallModel

__all__ = [
    "Auto",
    "Cascade",
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
]
