"""Heads of every kind that can be read, by what their files say, in a folder or on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from specdec.drafters.head.dflash import DFlash
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.formats import DFLASH, DSPARK, EAGLE3, JUMP, PEAGLE, is_head, read_config
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp import load_mtp
from specdec.drafters.head.mtp_files import holds_mtp
from specdec.drafters.head.network import HeadNetwork, load_network
from specdec.drafters.head.peagle import PEagle
from specdec.hf import is_hub_reachable
from specdec.stages import stage

_NETWORKS: dict[str, type[HeadNetwork]] = {EAGLE3: Eagle3, PEAGLE: PEagle, DFLASH: DFlash, DSPARK: DSpark, JUMP: Jump}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONFIG, _WEIGHTS = ("config.json",), ("config.json", "*.safetensors", "*.safetensors.index.json")


def drafts_as_head(source: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> bool:
    """Whether what is in a folder or on the hub drafts for a model as a head: it is one, or it is the model itself with
    an MTP layer.

    Args:
        model: the model's folder or hub id; None: a folder with an MTP layer is taken for one of the model.
    """
    folder = _found(source, _CONFIG)
    if folder is None or is_head(folder):
        return folder is not None
    if model is None:
        return Path(source).is_dir() and holds_mtp(folder)
    is_itself = os.fspath(source) == os.fspath(model)
    is_itself |= Path(model).is_dir() and folder.resolve() == Path(model).resolve()
    whole = _found(source, _WEIGHTS) if is_itself else None
    return whole is not None and holds_mtp(whole)


def load_head(source: str | os.PathLike[str]) -> HeadNetwork:
    """The head in a folder, or of a hub id, in the dtype of its file.

    Raises:
        DraftError: there is no head of a kind that can be read, or a damaged one.
    """
    folder = _found(source, _WEIGHTS) or Path(source).expanduser()
    if (layer := load_mtp(folder)) is not None:
        return layer
    config = read_config(folder)
    return load_network(_NETWORKS[config.kind], config, folder)


def _found(source: str | os.PathLike[str], files: Sequence[str]) -> Path | None:
    """A folder itself; where the cache keeps files of a hub id, which are fetched if they are not there."""
    folder, hub_id = Path(source).expanduser(), os.fspath(source)
    if folder.exists() or not _HUB_ID.fullmatch(hub_id):
        return folder if folder.is_dir() else None
    with stage(f"looking for {hub_id} on the hub"):
        try:
            is_offline = not is_hub_reachable()
            return Path(snapshot_download(hub_id, allow_patterns=list(files), local_files_only=is_offline))
        except (OSError, ValueError, HfHubHTTPError):  # whoever needs it says what is wrong
            return None
