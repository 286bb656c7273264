"""What drafts where nobody has chosen."""

from specdec.drafters.base import Drafter, DraftSession, Run
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.first_of import FirstOf
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.exits.shipped import shipped_exits

_LONG_MATCH = 4
"""Tokens that must repeat before copying is preferred to an exit that has been trained."""


class Auto(Drafter):
    """Copies what repeats itself; between the repetitions the target's own exits draft, if trained ones are shipped.

    The exits decide in every round whether drafting pays, and leave it where it does not.
    """

    def start(self, run: Run) -> DraftSession:
        if shipped_exits(run.target.model) is None:
            return PromptLookup().start(run)
        if run.tree is not None:
            return EarlyExit().start(run)
        return FirstOf(PromptLookup(min_match=_LONG_MATCH), EarlyExit()).start(run)
