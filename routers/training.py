"""Trains a `LightRouter` on collected steps. Needs scikit-learn (the extra `train`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from routers.calibration import Calibration, undo_prior
from routers.collecting import StepTuple, is_usable, matrix, split_texts
from routers.features import NAMES
from routers.light import Forest, LightRouter, Linear
from routers.measures import report

if TYPE_CHECKING:
    from sklearn.ensemble import GradientBoostingClassifier

_FOLDS = 5
_KEPT_COMPONENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LightRecipe:
    """How a light router is trained.

    Args:
        kind: "forest" (gradient boosting) or "linear" (logistic regression).
        hidden: whether to read hidden states too, as 64 principal components.
        margin: advantage above which the target does better.
        held_out: share of texts that the report is made on.
        rate: share of escalated steps at which regret is reported.
        harm_level: of the risk-controlled threshold.
        seed: of the split, and of what the training draws.
    """

    kind: str = "forest"
    hidden: bool = False
    margin: float = 0.0
    held_out: float = 0.25
    rate: float = 0.3
    harm_level: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("forest", "linear"):
            raise ValueError(f"LightRecipe(kind={self.kind!r}): kind is 'forest' or 'linear'")
        for name in ("held_out", "rate", "harm_level"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"LightRecipe({name}={getattr(self, name)!r}): it is between 0 and 1")


def train_light(tuples: Sequence[StepTuple], recipe: LightRecipe) -> LightRouter:
    """Fit on some texts, calibrate on folds of them, and report on the others.

    Both kinds of steps weigh the same in training, as in the paper; calibration undoes that.

    Raises:
        ValueError: there are too few texts, or all steps are of one kind.
    """
    usable = [item for item in tuples if is_usable(item)]
    if recipe.hidden and not all(item.hidden for item in usable):
        raise ValueError("these steps were collected without hidden states: collect them again with --hidden")
    if not recipe.hidden:
        usable = [replace(item, hidden=[]) for item in usable]
    is_test = split_texts(usable, recipe.held_out, recipe.seed, margin=recipe.margin)
    texts, inputs = np.array([item.problem for item in usable]), matrix(usable)
    advantages = np.array([item.advantage for item in usable])
    labels = advantages > recipe.margin
    router = _calibrated(inputs[~is_test], labels[~is_test], texts[~is_test], recipe)
    measured = report(
        router.probabilities(inputs[is_test]),
        advantages[is_test],
        threshold=router.calibration.threshold,
        margin=recipe.margin,
        num_texts=len(np.unique(texts[is_test])),
        rate=recipe.rate,
        harm_level=recipe.harm_level,
    )
    return replace(router, report=measured)


def _calibrated(inputs: np.ndarray, labels: np.ndarray, texts: np.ndarray, recipe: LightRecipe) -> LightRouter:
    """Fitted on everything given; calibration and threshold come from folds that did not see their texts."""
    from sklearn.model_selection import GroupKFold

    folded = np.zeros(len(labels))
    num_folds = min(_FOLDS, len(np.unique(texts)))
    for train, test in GroupKFold(num_folds).split(inputs, labels, texts):
        part = _fit(inputs[train], labels[train], recipe)
        folded[test] = undo_prior(part.model.logits(part.prepared(inputs[test])), 0.5, labels[train].mean())
    calibration = Calibration.fit(folded, labels)
    router = _fit(inputs, labels, recipe)
    # the prior is undone in one place: the shift of the logits goes into the offset
    shift = float(undo_prior(np.zeros(()), 0.5, labels.mean()))
    return replace(router, calibration=replace(calibration, offset=calibration.offset + calibration.slope * shift))


def _fit(inputs: np.ndarray, labels: np.ndarray, recipe: LightRecipe) -> LightRouter:
    mean, scale = inputs.mean(0).astype(np.float64), inputs.std(0).astype(np.float64)
    scale[scale == 0] = 1.0
    components = _components((inputs - mean) / scale) if recipe.hidden else None
    router = LightRouter(
        model=Linear(weights=np.zeros(1), bias=np.zeros(1)),
        mean=mean,
        scale=scale,
        components=components,
        calibration=Calibration(slope=1.0, offset=0.0, threshold=0.5),
        num_hidden=inputs.shape[1] - len(NAMES),
    )
    fit = _fit_forest if recipe.kind == "forest" else _fit_linear
    return replace(router, model=fit(router.prepared(inputs), labels, recipe.seed))


def _components(scaled: np.ndarray) -> np.ndarray:
    """The features as they are, and the leading principal components of the hidden states: [F + 64, F + C]."""
    from sklearn.decomposition import PCA

    num_features, hidden = len(NAMES), scaled[:, len(NAMES) :]
    pca = PCA(min(_KEPT_COMPONENTS, *hidden.shape), random_state=0).fit(hidden)
    size = pca.components_ / np.sqrt(pca.explained_variance_ + 1e-9)[:, None]
    components = np.zeros((num_features + len(size), scaled.shape[1]))
    components[:num_features, :num_features] = np.eye(num_features)
    components[num_features:, num_features:] = size
    return components


def _balanced(labels: np.ndarray) -> np.ndarray:
    share = labels.mean()
    return np.where(labels, 0.5 / share, 0.5 / (1 - share))


def _fit_linear(inputs: np.ndarray, labels: np.ndarray, seed: int) -> Linear:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(inputs, labels, sample_weight=_balanced(labels))
    return Linear(weights=fitted.coef_[0].astype(np.float64), bias=fitted.intercept_.astype(np.float64))


def _fit_forest(inputs: np.ndarray, labels: np.ndarray, seed: int) -> Forest:
    from sklearn.ensemble import GradientBoostingClassifier

    boosted = GradientBoostingClassifier(
        n_estimators=80, max_depth=3, learning_rate=0.05, subsample=0.7, min_samples_leaf=10, random_state=seed
    )
    inputs = inputs.astype(np.float32)
    boosted.fit(inputs, labels, sample_weight=_balanced(labels))
    forest = _as_forest(boosted)
    # what scikit-learn adds before the first tree is found by comparison, not in its private attributes
    bias = boosted.decision_function(inputs[:1]) - forest.logits(inputs[:1])
    return replace(forest, bias=np.asarray(bias, np.float64))


def _as_forest(boosted: GradientBoostingClassifier) -> Forest:
    trees = [estimator.tree_ for estimator in boosted.estimators_[:, 0]]
    starts = np.cumsum([0, *(tree.node_count for tree in trees)])
    own = [start + np.arange(tree.node_count) for start, tree in zip(starts, trees, strict=False)]

    def children(name: str) -> np.ndarray:
        columns = [
            np.where(getattr(tree, name) < 0, nodes, getattr(tree, name) + nodes[0])
            for tree, nodes in zip(trees, own, strict=True)
        ]
        return np.concatenate(columns).astype(np.int32)

    return Forest(
        left=children("children_left"),
        right=children("children_right"),
        feature=np.concatenate([tree.feature for tree in trees]).clip(min=0).astype(np.int32),
        threshold=np.concatenate([tree.threshold for tree in trees]),
        value=boosted.learning_rate * np.concatenate([tree.value[:, 0, 0] for tree in trees]),
        roots=starts[:-1].astype(np.int32),
        bias=np.zeros(1),
        depth=np.array([max(tree.max_depth for tree in trees)], np.int32),
    )
