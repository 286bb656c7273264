"""Routers by name, and who writes the steps that they keep: rows of the bench that are LOSSY."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import routers
from routers import Router
from specdec.specs import SMALL_MODEL, DrafterSpec, Spec, check_known, drafter_of, parse_parameters

LOSSY = "LOSSY"
"""Stands in the name of every method that is, and so in every table."""
STEP_WRITERS = (SMALL_MODEL, "quantized-self")


def _arbitrage(router: str, threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    scorer = routers.load(router)
    return routers.Arbitrage(scorer, threshold=threshold, escalation_rate=escalation_rate)


def _likelihood(threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    reward = routers.TargetLikelihood()
    return routers.RewardThreshold(reward, threshold=threshold, escalation_rate=escalation_rate)


def _regret(threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    scorer = routers.Shortfall(routers.TargetRegret())
    return routers.Arbitrage(scorer, threshold=threshold, escalation_rate=escalation_rate)


_ROUTERS: dict[str, Callable[..., Router]] = {
    "self-confidence": routers.SelfConfidence,
    "first-token-entropy": routers.FirstTokenEntropy,
    "random": routers.RandomRouter,
    "likelihood": _likelihood,
    "regret": _regret,
    "self-score": routers.SelfScore,
    "arbitrage": _arbitrage,
}
ROUTERS = tuple(_ROUTERS)


class RouterSpec(Spec):
    """A router asked for by name."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> RouterSpec:
        """`NAME:parameter=value:...`; raises `ValueError` that lists what is allowed."""
        kind, *assignments = text.split(":")
        check_known("router", kind, ROUTERS)
        spec = cls(text=text, kind=kind, parameters=parse_parameters(kind, _ROUTERS[kind], assignments))
        if kind != "arbitrage":
            spec.build()  # what cannot be is said before a model is loaded
        return spec

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.text} {LOSSY}"

    def build(self) -> Router:
        """What `specdec.generate` takes as `router`.

        Raises:
            ValueError: neither a threshold nor a rate, or a folder without a router.
        """
        return _ROUTERS[self.kind](**self.parameters)


def choose_step_writer(name: str | None, draft: str | None, model: str = "") -> DrafterSpec:
    """Who writes steps: the draft model if there is one, else the target's own copy of 4 bits.

    Raises:
        ValueError: an unknown name, or a draft that is missing or no model.
    """
    default = "quantized-self:weights=int4" if draft is None else drafter_of(draft, model)
    spec = DrafterSpec.parse(name or default)
    check_known("step writer", spec.kind, STEP_WRITERS)
    if spec.needs_draft and draft is None:
        raise ValueError(f"{spec.text} writes steps with a smaller model: give it with --draft")
    return spec


def scores_of(kind: str) -> Callable[[Any], float]:
    """What a router that needs no training scores a drafted step by.

    Raises:
        ValueError: the router has nothing to calibrate.
    """
    known = {"self-confidence": routers.OwnDoubt.of, "first-token-entropy": routers.FirstTokenEntropy.entropy}
    check_known("router to calibrate", kind, tuple(known))
    return known[kind]
