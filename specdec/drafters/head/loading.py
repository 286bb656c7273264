"""Heads of every kind that can be read, by what their files say."""

from __future__ import annotations

import os
from pathlib import Path

from specdec.drafters.head.dflash import DFlash
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.formats import DFLASH, DSPARK, EAGLE3, JUMP, PEAGLE, is_head, read_config
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.mtp import load_mtp
from specdec.drafters.head.mtp_files import holds_mtp
from specdec.drafters.head.network import HeadNetwork, load_network
from specdec.drafters.head.peagle import PEagle

_NETWORKS: dict[str, type[HeadNetwork]] = {EAGLE3: Eagle3, PEAGLE: PEagle, DFLASH: DFlash, DSPARK: DSpark, JUMP: Jump}


def drafts_as_head(folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> bool:
    """Whether what is in a folder drafts for a model as a head: it is one, or it is the model itself with an MTP layer.

    Args:
        model: the model's folder; None: a folder with an MTP layer is taken for one of the model.
    """
    if is_head(folder):
        return True
    is_itself = model is None or (Path(model).is_dir() and Path(folder).resolve() == Path(model).resolve())
    return is_itself and holds_mtp(folder)


def load_head(folder: str | os.PathLike[str]) -> HeadNetwork:
    """The head in a folder, in the dtype of its file.

    Raises:
        DraftError: the folder holds no head of a kind that can be read, or a damaged one.
    """
    if (layer := load_mtp(folder)) is not None:
        return layer
    config = read_config(folder)
    return load_network(_NETWORKS[config.kind], config, folder)
