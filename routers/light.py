"""A router that reads only what the draft already has in memory: boosted trees or a logistic regression on features.

Trained by `routers.training`, stored as `router.safetensors` (arrays) and `router.json` (what they mean).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routers.base import DraftedStep, Need, TargetView
from routers.calibration import Calibration
from routers.features import NAMES, features
from routers.measures import Report

SETTINGS = "router.json"
_FORM = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """A logit that is linear in the inputs.

    Args:
        weights: float64 [F].
        bias: float64 [1].
    """

    weights: np.ndarray
    bias: np.ndarray

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        return inputs @ self.weights + self.bias[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Forest:
    """A logit that is a sum of regression trees.

    Args:
        left, right: int32 [M] the nodes' children, all trees' nodes one after the other; a leaf is its own child.
        feature: int32 [M] what a node looks at; it goes left where that is at most `threshold`, float64 [M].
        value: float64 [M] of the leaves, the learning rate included.
        roots: int32 [T].
        bias: float64 [1].
        depth: int32 [1] of the deepest tree.
    """

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    roots: np.ndarray
    bias: np.ndarray
    depth: np.ndarray

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        inputs = inputs.astype(np.float32)  # as they were when the trees were grown
        rows = np.arange(len(inputs))[:, None]
        nodes = np.broadcast_to(self.roots, (len(inputs), len(self.roots)))
        for _ in range(int(self.depth[0])):
            goes_left = inputs[rows, self.feature[nodes]] <= self.threshold[nodes]
            nodes = np.where(goes_left, self.left[nodes], self.right[nodes])
        return self.value[nodes].sum(1) + self.bias[0]


_KINDS: dict[str, type[Linear] | type[Forest]] = {"linear": Linear, "forest": Forest}


@dataclass(frozen=True, kw_only=True, eq=False)
class LightRouter:
    """Scores steps with Pr(the target does better), calibrated; a `routers.Scorer`.

    Args:
        model: logits from standardised inputs.
        mean, scale: float64 [F], of the features.
        components: float64 [F, F + C] what is made of features and hidden states before the model; None: nothing.
        calibration: from logits to probabilities, and the threshold that was best in training.
        num_hidden: C, 0 if hidden states are not read.
        report: on held-out steps.
    """

    model: Linear | Forest
    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray | None
    calibration: Calibration
    num_hidden: int
    report: Report | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"signals", "hidden"} if self.num_hidden else {"signals"})

    def score(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return [float(score) for score in self.probabilities(np.stack([self._read(step) for step in steps]))]

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Pr(the target does better), float64 [N], of features and hidden states [N, F + C]."""
        return self.calibration.probabilities(self.model.logits(self.prepared(inputs)))

    def prepared(self, inputs: np.ndarray) -> np.ndarray:
        """What the model reads."""
        scaled = (inputs - self.mean) / self.scale
        return scaled if self.components is None else scaled @ self.components.T

    def save(self, folder: str | Path) -> None:
        """Write it, as arrays and JSON."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = next(name for name, form in _KINDS.items() if isinstance(self.model, form))
        arrays = {f"model.{name}": np.ascontiguousarray(value) for name, value in vars(self.model).items()}
        arrays |= {"mean": self.mean, "scale": self.scale}
        if self.components is not None:
            arrays["components"] = np.ascontiguousarray(self.components)
        settings = {
            "form": _FORM,
            "kind": kind,
            "features": NAMES,
            "calibration": asdict(self.calibration),
            "num_hidden": self.num_hidden,
            "report": None if self.report is None else asdict(self.report),
        }
        save_file(arrays, folder / "router.safetensors")
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> LightRouter:
        """Read what `save` has written.

        Raises:
            ValueError: it is no router, or one of other features than this version's.
        """
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            arrays = load_file(folder / "router.safetensors")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no router (router.json and router.safetensors): {error}") from error
        if settings.get("form") != _FORM or tuple(settings.get("features", ())) != NAMES:
            raise ValueError(f"{folder} holds a router of another version: train it again with specdec train-router")
        return cls._from_parts(settings, arrays)

    @classmethod
    def _from_parts(cls, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LightRouter:
        parts = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
        written = settings["report"]
        return cls(
            model=_KINDS[settings["kind"]](**parts),
            mean=arrays["mean"],
            scale=arrays["scale"],
            components=arrays.get("components"),
            calibration=Calibration(**settings["calibration"]),
            num_hidden=settings["num_hidden"],
            report=None if written is None else Report(**written),
        )

    def _read(self, step: DraftedStep) -> np.ndarray:
        if not self.num_hidden:
            return features(step)
        hidden = step.signals.hidden
        if hidden is None or len(hidden) != self.num_hidden:
            raise ValueError(
                f"this router reads {self.num_hidden} hidden states of the draft it was trained with; "
                "take that draft, or train a router for this one"
            )
        return np.concatenate([features(step), hidden])
