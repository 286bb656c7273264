"""The exits that come with the package."""

from pathlib import Path

from transformers import PreTrainedModel

from specdec.exits.module import fingerprint, read_metadata

_FOLDER = Path(__file__).parent


def shipped_exits(model: PreTrainedModel) -> Path | None:
    """The file of exits that were trained for this model and come with the package, None if there is none."""
    mark = fingerprint(model)
    files = sorted(_FOLDER.glob("*.safetensors"))
    return next((path for path in files if read_metadata(path)["fingerprint"] == mark), None)
