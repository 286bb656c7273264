"""`Auto` without one of its mechanisms, for `bench.simulate_auto`: what each is replaced by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import inf
from typing import Any
from unittest.mock import patch

from specdec.control import costs, rounds
from specdec.control import estimates as acceptance
from specdec.drafters.auto import drafter as auto
from specdec.drafters.auto import knowledge as auto_knowledge
from specdec.drafters.auto import lookup_source as auto_lookup
from specdec.drafters.auto import sources as auto_sources
from trees import gain_limited

_NEVER = 10**9

Replacement = tuple[object, str, Any]


def _nothing(*_: object, **__: object) -> None:
    """In place of a method that would have changed something."""


def _unchanged(values: Iterable[float], _: object) -> list[float]:
    return list(values)


def _seconds_of_own_width(own: costs.ForwardCosts, num_tokens: int) -> float:
    return own.drift * own.measured(num_tokens) * own._learned.corrections.get(costs._octave(num_tokens), 1.0)


ABLATIONS: dict[str, list[Replacement]] = {
    # what proposals and drafts promise
    "selection-bias": [(auto_knowledge.SelectionBias, "share", 1.0)],
    "monotone-acceptance": [(acceptance, "monotone", _unchanged)],
    "acceptance-memory": [(acceptance.AcceptanceMemory, "update", _nothing)],
    "acceptance-of-run": [(acceptance, "_RUN_DECAY", 0.0)],
    "proof": [(auto_lookup, "_UNPROVEN", inf)],
    # what they cost
    "monotone-prices": [(auto_sources, "monotone", _unchanged)],
    "learning-costs": [(costs.ForwardCosts, "update", _nothing)],
    "corrections-by-width": [(costs, "_MIN_OWN", _NEVER)],
    "ceilings": [(costs.ForwardCosts, "seconds", _seconds_of_own_width)],
    "plain-every-64": [(rounds, "_PLAIN_EVERY", _NEVER)],
    "outlier-cap": [(rounds, "_LONGEST_ROUND", inf)],
    "capped-throughput": [(module, "capped_throughput", lambda throughput, _: throughput) for module in (rounds, auto)],
    # which drafters are worth a try
    "run-memory": [(rounds.RunHistory, "add", _nothing)],
    "reading-expense": [(auto_sources.ModelSource, "_reading_seconds", lambda *_: 0.0)],
    "failed-runs-expense": [(auto_sources, "_TRIAL_ROUNDS", 0)],
    "trials": [(auto_sources.ModelSource, "trial", _nothing)],
    "trial-share": [(auto_knowledge.Known, "trial_seconds", lambda _: inf)],
    "trial-backoff": [(auto_knowledge, "_MOST_FAILURES", 0)],
    "probes": [(rounds.Probes, "is_due", False)],
    "probe-backoff": [(rounds, "_LAST_PROBE", 8)],
    "probe-share": [(rounds, "_PROBE_SHARE", inf)],
    # what is drafted
    "leaves": [(gain_limited, "MAX_LEAVES", 0)],
}
"""By mechanism: where it is, and what stands there without it."""


@contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Within, these mechanisms are off."""
    with ExitStack() as stack:
        for name in names:
            for owner, attribute, stand_in in ABLATIONS[name]:
                stack.enter_context(patch.object(owner, attribute, stand_in))
        yield
