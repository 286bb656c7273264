"""The folder beside the output in which collection and training leave what they have done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from specdec.training.heads.collect import Shard

_STATES = "states."


class WorkFolder:
    """Shards and the trainer's state of one plan. Files appear whole or not at all.

    Args:
        plan: everything that the result depends on, as json takes it.

    Raises:
        ValueError: the folder holds the work of another plan, or cannot be written to.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self._folder = folder
        written = folder / "plan.json"
        text = json.dumps(plan, indent=2, sort_keys=True)
        if written.exists() and (old := written.read_text(encoding="utf-8")) != text:
            raise ValueError(
                f"{folder} holds unfinished work with other settings ({_difference(json.loads(old), plan)}): "
                "repeat the command with those, or remove the folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error}") from error

    @property
    def trainer_state(self) -> Path:
        return self._folder / "trainer.safetensors"

    def curve(self) -> dict[int, float]:
        """What `write_curve` has written last: tokens trained on -> accepted."""
        path = self._folder / "curve.json"
        return (
            {int(tokens): accepted for tokens, accepted in json.loads(path.read_text()).items()}
            if path.exists()
            else {}
        )

    def write_curve(self, curve: Mapping[int, float]) -> None:
        (self._folder / "curve.json").write_text(json.dumps(curve), encoding="utf-8")

    def has_shard(self, index: int) -> bool:
        return self._shard(index).exists()

    def write_shard(self, index: int, shard: Shard) -> None:
        tensors = {name: tensor for name, tensor in shard._asdict().items() if name != "states"}
        tensors |= {f"{_STATES}{depth}": state for depth, state in shard.states.items()}
        finished = self._shard(index)
        unfinished = finished.with_name(f"{finished.name}.part")
        save_file(tensors, unfinished)
        unfinished.replace(finished)

    def read_shard(self, index: int) -> Shard:
        tensors = load_file(self._shard(index))
        depths = [name for name in tensors if name.startswith(_STATES)]
        states = {int(name.removeprefix(_STATES)): tensors.pop(name) for name in depths}
        return Shard(**tensors, states=states)

    def _shard(self, index: int) -> Path:
        return self._folder / f"shard-{index:05}.safetensors"


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} was {old.get(key)!r}" for key in changed)
