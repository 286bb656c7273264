"""The contract of a drafter, where plug-ins look for it; `specdec/decoding/drafter.py` holds it."""

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run

__all__ = ["DraftSession", "Drafter", "Outcome", "Run"]
