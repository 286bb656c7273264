"""Routers by name, and who writes the steps that they keep: rows of the bench that are LOSSY."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import routers
from routers import Router
from specdec.specs import QUANTIZED_SELF, SMALL_MODEL, DrafterSpec, Spec, check_known, drafter_of, parse_parameters

LOSSY = "LOSSY"
"""Stands in the name of every method that is, and so in every table."""
STEP_WRITERS = (SMALL_MODEL, QUANTIZED_SELF)


def _arbitrage(router: str, threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    scorer = routers.load(router)
    return routers.Arbitrage(scorer, threshold=threshold, escalation_rate=escalation_rate)


def _likelihood(threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    reward = routers.TargetLikelihood()
    return routers.RewardThreshold(reward, threshold=threshold, escalation_rate=escalation_rate)


def _regret(threshold: float | None = None, escalation_rate: float | None = None) -> Router:
    scorer = routers.Shortfall(routers.TargetRegret())
    return routers.Arbitrage(scorer, threshold=threshold, escalation_rate=escalation_rate)


def _with_settings(constructor: Callable[..., Router]) -> Callable[..., Router]:
    """A constructor that also takes what any router may be told."""

    def build(*, lookahead: int = 1, shares_cache: bool = False, **parameters: Any) -> Router:
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead}: it is a positive number of steps")
        router = constructor(**parameters)
        router.lookahead, router.shares_cache = lookahead, shares_cache
        return router

    signatures = (inspect.signature(one, eval_str=True).parameters.values() for one in (constructor, build))
    named = [one for one in chain.from_iterable(signatures) if one.kind is not inspect.Parameter.VAR_KEYWORD]
    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in named]
    build.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return build


_ROUTERS: dict[str, Callable[..., Router]] = {
    "self-confidence": _with_settings(routers.SelfConfidence),
    "first-token-entropy": _with_settings(routers.FirstTokenEntropy),
    "random": _with_settings(routers.RandomRouter),
    "likelihood": _with_settings(_likelihood),
    "regret": _with_settings(_regret),
    "self-score": _with_settings(routers.SelfScore),
    "arbitrage": _with_settings(_arbitrage),
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
