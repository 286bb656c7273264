"""From a classifier's logits to probabilities that can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routers.measures import balanced_accuracy
from routers.numbers import logit, sigmoid


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Pr = sigmoid(slope * logit + offset) (Platt 1999).

    Args:
        threshold: the probability at which the balanced accuracy was best.
    """

    slope: float
    offset: float
    threshold: float

    @classmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Calibration:
        """Of logits that have not seen these labels. Needs scikit-learn."""
        from sklearn.linear_model import LogisticRegression

        platt = LogisticRegression(C=1e6).fit(logits[:, None], labels)
        slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
        scores = sigmoid(slope * logits + offset)
        candidates = np.unique(np.quantile(scores, np.linspace(0, 1, 101)))
        accuracies = np.array([balanced_accuracy(scores > candidate, labels) for candidate in candidates])
        best = candidates[accuracies == accuracies.max()]
        return cls(slope=slope, offset=offset, threshold=float(best[len(best) // 2]))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return sigmoid(self.slope * logits + self.offset)


def undo_prior(logits: np.ndarray, share_trained: float, share_true: float) -> np.ndarray:
    """Logits as if positives had not been made more frequent for training: the odds times the ratio of priors."""
    return logits + logit(np.array(share_true)) - logit(np.array(share_trained))
