"""The tables and the curve of `bench.arbitrage`, and what bounds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench._script import pipe_table
from bench.step_replay import Replayed

NUM_RESAMPLES = 10_000


class Outcome(NamedTuple):
    """A replayed problem."""

    run: Replayed
    correct: bool


class Costs(NamedTuple):
    """Seconds that a token takes, measured on problems alone.

    Args:
        target: by the target, token-level speculation included.
        draft: by the draft.
        verification: of a drafted token that the target reads with the rest of its step.
    """

    target: float
    draft: float
    verification: float
    num_problems: int

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, float]]) -> Costs:
        """Of what `bench.arbitrage` has kept of each problem."""
        kinds = ("target", "draft", "score")
        totals = {name: sum(one[name] for one in measured) for name in measured[0] if name != "problem"}
        target, draft, score = (totals[f"{kind}_seconds"] / totals[f"{kind}_tokens"] for kind in kinds)
        return cls(target, draft, score, len(measured))

    def seconds(self, run: Replayed, *, one_cache: bool = False) -> float:
        """Of a replayed run, reading the prompt aside.

        Args:
            one_cache: had both worked on one cache, and written the same.
        """
        drafted = run.num_kept + run.num_vain + run.num_taken_over
        written = run.num_written - run.num_taken_over
        read = run.num_verified + (0 if one_cache else run.num_caught_up)
        return drafted * self.draft + written * self.target + read * self.verification


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, over problems."""
    chosen = np.random.default_rng(seed).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    return tuple(np.quantile(values[chosen].mean(1), (0.025, 0.975)))


def ratio_interval(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a ratio of total times, over problems."""
    chosen = np.random.default_rng(seed).integers(0, len(ours), (NUM_RESAMPLES, len(ours)))
    return tuple(np.quantile(theirs[chosen].sum(1) / ours[chosen].sum(1), (0.025, 0.975)))


def sign_test(gains: np.ndarray) -> float:
    """One-sided: the chance of so many wins or more among the problems that differ, were both as good."""
    wins, decided = int((gains > 0).sum()), int((gains != 0).sum())
    return sum(comb(decided, count) for count in range(wins, decided + 1)) / 2**decided


def write_report(
    replayed: Mapping[str, Sequence[Outcome]],
    costs: Costs | None,
    batched: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
    baseline: str,
    output: Path,
    command: str,
) -> str:
    """OUTPUT.md and OUTPUT.png; returns the text."""
    rows = [_replayed_row(method, replayed, costs, baseline) for method in replayed]
    num_problems = len(replayed[baseline])
    parts = [
        f"`{command}`",
        f"Replayed on cached greedy steps, {num_problems} problems. All but {baseline} is LOSSY. Intervals are of "
        "paired differences, over problems; the sign test is one-sided, against random routing at the same rate. "
        "Speeds are computed from counts and from what was measured alone (below); in one cache: had the target not "
        "read what the draft has read.",
        pipe_table(_REPLAYED, rows),
        *_bounds(replayed, costs, baseline),
    ]
    if batched:
        answers = {
            method: {outcome.run.problem: outcome.correct for outcome in outcomes}
            for method, outcomes in replayed.items()
        }
        parts += [
            f"Run in batches for their answers, compared with those above on {num_problems} problems. All is LOSSY.",
            pipe_table(
                _BATCHED,
                [
                    _batched_row(method, batched, answers, baseline)
                    for method in dict.fromkeys(r["method"] for r in batched)
                ],
            ),
        ]
    if live:
        parts += [
            f"Live, one problem at a time, {len({result['problem'] for result in live})} problems. "
            f"All but {baseline} is LOSSY.",
            pipe_table(
                _LIVE, [_live_row(method, live, baseline) for method in dict.fromkeys(r["method"] for r in live)]
            ),
        ]
    text = "\n\n".join(parts)
    Path(f"{output}.md").write_text(text + "\n")
    _draw(replayed, costs, baseline, Path(f"{output}.png"))
    return text


_REPLAYED = (
    *("method", "accuracy", "less speculative's, 95 %", "less random's, 95 %", "p, sign test", "steps by the target"),
    *("tokens by the target", "in vain per kept token", "without looks", "computed speed, 95 %", "in one cache"),
    *("router, us a step", "router's time"),
)
_BATCHED = (
    *("method", "problems", "accuracy", "less speculative's, 95 %", "less random's, 95 %", "p, sign test"),
    *("steps by the target", "tokens", "in vain per kept token"),
)
_LIVE = (
    *("method", "problems", "accuracy", "less speculative's, 95 %", "less random's, 95 %", "p, sign test"),
    *("steps by the target", "speed, 95 %", "s, p50", "tokens", "in vain", "router, us a step", "router's time"),
)


def _replayed_row(
    method: str, replayed: Mapping[str, Sequence[Outcome]], costs: Costs | None, baseline: str
) -> list[str]:
    outcomes = replayed[method]
    runs, correct = [outcome.run for outcome in outcomes], _correct(outcomes)
    num_steps, num_tokens = sum(len(run.ends) for run in runs), sum(len(run.tokens) for run in runs)
    router_seconds = sum(run.router_seconds for run in runs)
    speed = at_most = share = ""
    if costs is not None:
        ours = np.array([costs.seconds(run) for run in runs])
        theirs = np.array([costs.seconds(outcome.run) for outcome in replayed[baseline]])
        low, high = ratio_interval(ours, theirs)
        speed = f"{theirs.sum() / ours.sum():.2f} ({low:.2f} .. {high:.2f})"
        at_most = f"{theirs.sum() / sum(costs.seconds(run, one_cache=True) for run in runs):.2f}"
        share = f"{router_seconds / ours.sum():.2%}"
    control = replayed.get(_control(method))
    return [
        method,
        f"{correct.mean():.1%}",
        "" if method == baseline else _points(correct - _correct(replayed[baseline])),
        *_compared(correct, None if control is None else _correct(control)),
        f"{sum(run.num_escalated for run in runs) / num_steps:.1%}",
        f"{sum(run.num_written for run in runs) / num_tokens:.1%}",
        f"{sum(run.num_vain for run in runs) / num_tokens:.2f}",
        f"{sum(run.num_vain_unlooked for run in runs) / num_tokens:.2f}",
        speed,
        at_most,
        f"{1e6 * router_seconds / num_steps:.0f}",
        share,
    ]


def _batched_row(
    method: str, batched: Sequence[Mapping[str, Any]], answers: Mapping[str, Mapping[int, bool]], baseline: str
) -> list[str]:
    results = {result["problem"]: result for result in batched if result["method"] == method}
    numbers = sorted(results.keys() & answers[baseline].keys())
    some = [results[number] for number in numbers]
    theirs, control = (answers.get(name, {}) for name in (baseline, _control(method)))
    correct, beside = _solved(results, numbers), np.array([control[number] for number in numbers if control], float)
    num_tokens = sum(result["num_tokens"] for result in some)
    return [
        method,
        str(len(numbers)),
        f"{correct.mean():.1%}",
        _points(correct - np.array([theirs[number] for number in numbers], float)),
        *_compared(correct, beside if len(beside) else None),
        f"{sum(result['num_escalated'] for result in some) / sum(result['num_steps'] for result in some):.1%}",
        f"{num_tokens / len(some):.0f}",
        f"{sum(result['num_vain'] for result in some) / num_tokens:.2f}",
    ]


def _live_row(method: str, live: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    by_problem = {result["problem"]: result for result in live if result["method"] == method}
    base = {result["problem"]: result for result in live if result["method"] == baseline}
    both = sorted(by_problem.keys() & base.keys())
    results = [by_problem[number] for number in both]
    num_steps = sum(result["num_steps"] for result in results)
    control = {result["problem"]: result for result in live if result["method"] == _control(method)}
    beside = [number for number in both if number in control]
    router_seconds = sum(result["router_seconds"] for result in results)
    seconds, theirs = (np.array([one[number]["seconds"] for number in both]) for one in (by_problem, base))
    low, high = ratio_interval(seconds, theirs)
    return [
        method,
        str(len(both)),
        f"{np.mean([result['correct'] for result in results]):.1%}",
        "" if method == baseline else _points(_solved(by_problem, both) - _solved(base, both)),
        *_compared(_solved(by_problem, beside), _solved(control, beside) if beside else None),
        f"{sum(r['num_escalated'] for r in results) / num_steps:.1%}" if num_steps else "",
        f"{theirs.sum() / seconds.sum():.2f} ({low:.2f} .. {high:.2f})",
        f"{np.median(seconds):.1f}",
        f"{np.mean([result['num_tokens'] for result in results]):.0f}",
        f"{np.mean([result['num_vain'] for result in results]):.0f}",
        f"{1e6 * router_seconds / max(1, num_steps):.0f}",
        f"{router_seconds / seconds.sum():.2%}",
    ]


def _control(method: str) -> str:
    """Random routing at the same rate; nobody of that of random routing."""
    return "" if method.startswith("random") else f"random@{_knob(method)}"


def _compared(correct: np.ndarray, control: np.ndarray | None) -> list[str]:
    """What a method gains over random routing: the interval, and p of the one-sided sign test."""
    if control is None:
        return ["", ""]
    return [_points(correct - control), f"{sign_test(correct - control):.3f}"]


def _solved(results: Mapping[int, Mapping[str, Any]], numbers: Sequence[int]) -> np.ndarray:
    return np.array([results[number]["correct"] for number in numbers], float)


def _bounds(replayed: Mapping[str, Sequence[Outcome]], costs: Costs | None, baseline: str) -> list[str]:
    """What no router can do better than."""
    if costs is None or "draft" not in replayed:
        return []
    gaps = _correct(replayed[baseline]) - _correct(replayed["draft"])
    ratio = costs.draft / costs.target
    return [
        f"Alone, {costs.num_problems} problems: a token by the target, speculation included, "
        f"{1e3 * costs.target:.0f} ms; by the draft {1e3 * costs.draft:.0f} ms; a drafted token verified with its step "
        f"{1e3 * costs.verification:.0f} ms. Cost ratio {ratio:.2f}: whatever is kept, no router is faster than "
        f"{1 / ratio:.2f} times {baseline}. Accuracy gap {gaps.mean():.1%} ({_points(gaps)}): {int((gaps > 0).sum())} "
        f"problems that the target alone solves, {int((gaps < 0).sum())} that the draft alone does."
    ]


def _correct(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([outcome.correct for outcome in outcomes], float)


def _points(gains: np.ndarray) -> str:
    low, high = interval(gains)
    return f"{low:+.1%} .. {high:+.1%}"


def _knob(method: str) -> str:
    knob = method.partition("@")[2]
    for mark in "+~/":
        knob = knob.partition(mark)[0]
    return knob


def _draw(replayed: Mapping[str, Sequence[Outcome]], costs: Costs | None, baseline: str, path: Path) -> None:
    """Accuracy over the target's share of the tokens, and over computed time: a line a router."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(10, 4), layout="constrained")
    total = None if costs is None else sum(costs.seconds(outcome.run) for outcome in replayed[baseline])
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for method, outcomes in replayed.items():
        runs = [outcome.run for outcome in outcomes]
        share = sum(run.num_written for run in runs) / sum(len(run.tokens) for run in runs)
        time = float("nan") if costs is None or not total else sum(map(costs.seconds, runs)) / total
        curves.setdefault(method.partition("@")[0], []).append((100 * share, time, 100 * _correct(outcomes).mean()))
    for name, points in curves.items():
        shares, times, accuracies = zip(*sorted(points), strict=True)
        for axes, values in zip(panels, (shares, times), strict=True):
            axes.plot(values, accuracies, "o-", label=name, markersize=4)
    panels[0].set_xlabel("tokens by the target, %")
    panels[1].set_xlabel(f"computed time, over that of {baseline}")
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
