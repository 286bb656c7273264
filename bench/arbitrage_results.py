"""What methods came to on problems: a file that is appended to, so that a run goes on where it was stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from routers import Router


class Results:
    """Problems that methods have been run on, in a file.

    Attributes:
        is_unchanged: nothing has been added.
    """

    def __init__(self, path: Path, done: list[dict[str, Any]]):
        self.path, self.done = path, done
        self.is_unchanged = True

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls(path, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])

    def missing(self, method: str, numbers: Sequence[int]) -> list[int]:
        known = {result["problem"] for result in self.done if result["method"] == method}
        return [number for number in numbers if number not in known]

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        self.is_unchanged = False
        self.done += results
        with self.path.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)

    def of(self, methods: Sequence[str], problems: Collection[int]) -> list[dict[str, Any]]:
        return [result for result in self.done if result["method"] in methods and result["problem"] in problems]

    def recall(self, routers_of: Mapping[str, Router]) -> None:
        """A rate is held over all runs, those before an interruption included."""
        for result in self.done:
            gate = getattr(routers_of.get(result["method"]), "gate", None)
            if gate is None or gate.budget is None:
                continue
            for score, escalated in result.get("decisions", ()):
                if score is None or math.isnan(score):
                    gate.budget.count(escalated)
                else:
                    gate.budget.observe(score, escalated)
