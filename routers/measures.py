"""How good a router's scores are, on steps whose advantage is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routers.numbers import ranks


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one of them is constant."""
    ranked = np.stack([ranks(a), ranks(b)])
    if (ranked.std(1) == 0).any():
        return 0.0
    return float(np.corrcoef(ranked)[0, 1])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive has a higher score than a negative, ties counting half; NaN without both kinds."""
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    wins = ranks(scores)[labels].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the shares of positives and of negatives that are told; NaN without both kinds."""
    if labels.all() or not labels.any():
        return float("nan")
    return float((predicted[labels].mean() + (~predicted[~labels]).mean()) / 2)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error over bins of equal numbers of steps."""
    bins = np.array_split(np.argsort(probabilities, kind="stable"), num_bins)
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in bins if len(part)]
    return float(sum(gaps) / len(labels))


def regret(scores: np.ndarray, advantages: np.ndarray, rate: float) -> float:
    """Reward a step that is lost against the best choice of as many steps; what random choice loses comes beside it.

    The budgeted oracle takes the greatest advantages, and only positive ones (Maheswaran et al. 2025, theorem B.1).
    """
    count = round(rate * len(scores))
    best = np.sort(advantages)[::-1][:count].clip(min=0).sum()
    chosen = advantages[np.argsort(-scores, kind="stable")[:count]].sum()
    return float((best - chosen) / len(scores))


def controlled_threshold(scores: np.ndarray, harms: np.ndarray, level: float) -> float:
    """The largest threshold at which steps that are kept are harmful in expectation no more often than `level`.

    Conformal risk control (Angelopoulos et al. 2024): of all steps the share that is kept (score <= threshold) and
    harmful, n / (n + 1) R + 1 / (n + 1) <= level. The expectation is over steps exchangeable with these.

    Args:
        harms: bool [N]: keeping the draft's step would do harm.

    Returns:
        -inf where no threshold is safe enough: then everything is escalated.
    """
    order = np.argsort(scores, kind="stable")
    ordered, count = scores[order], len(scores)
    risks = (np.cumsum(harms[order]) + 1) / (count + 1)
    is_last_of_ties = np.append(ordered[1:] > ordered[:-1], True)
    safe = np.flatnonzero((risks <= level) & is_last_of_ties)
    # risks never fall along the order, so that all that stand before the last safe one are safe
    return float(ordered[safe[-1]]) if len(safe) else -np.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A router on held-out steps.

    Args:
        num_steps, num_texts: held out.
        share_positive: of steps on which the target does better.
        rank_correlation: Spearman's, of score and advantage.
        balanced_accuracy: at the threshold that was best in training.
        auc: of score and "the target does better".
        calibration_error: of the score as a probability.
        regret, random_regret: reward a step lost to the oracle at a rate of `rate`, and by random choice.
        rate: share of steps escalated for those two.
        harm_level, controlled_threshold: see `routers.measures.controlled_threshold`.
    """

    num_steps: int
    num_texts: int
    share_positive: float
    rank_correlation: float
    balanced_accuracy: float
    auc: float
    calibration_error: float
    rate: float
    regret: float
    random_regret: float
    harm_level: float
    controlled_threshold: float


def report(
    scores: np.ndarray,
    advantages: np.ndarray,
    *,
    threshold: float,
    margin: float,
    num_texts: int,
    rate: float,
    harm_level: float,
) -> Report:
    """Measure scores of held-out steps.

    Args:
        threshold: of the accuracy.
        margin: the advantage above which the target does better.
    """
    labels = advantages > margin
    count = round(rate * len(scores))
    best = np.sort(advantages)[::-1][:count].clip(min=0).sum() / len(scores)
    return Report(
        num_steps=len(scores),
        num_texts=num_texts,
        share_positive=float(labels.mean()),
        rank_correlation=spearman(scores, advantages),
        balanced_accuracy=balanced_accuracy(scores > threshold, labels),
        auc=auc(scores, labels),
        calibration_error=calibration_error(scores, labels),
        rate=rate,
        regret=regret(scores, advantages, rate),
        random_regret=float(best - rate * advantages.mean()),
        harm_level=harm_level,
        controlled_threshold=controlled_threshold(scores, labels, harm_level),
    )
