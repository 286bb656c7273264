"""The files that a model was loaded from: what is kept of them on disk holds as long as the model is what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from specdec.kernels.model.changes import State, state_of
from specdec.kernels.model.profile import profile_of


@dataclass(slots=True)
class _Origin:
    files: str | None = None
    state: State | None = None


def note_files(model: nn.Module, files: str) -> None:
    """The model is what the files hold; `files` changes when they do."""
    origin = profile_of(model).part(_Origin)
    origin.files, origin.state = files, state_of(model)


def files_of(model: nn.Module) -> str | None:
    """What `note_files` was told, if weights and modules are still those; None for a model from elsewhere."""
    origin = profile_of(model).part(_Origin)
    return origin.files if origin.files is not None and origin.state == state_of(model) else None
