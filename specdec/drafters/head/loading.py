"""Heads of every kind that can be read, by what their config.json says."""

from __future__ import annotations

import os

from specdec.drafters.head.dflash import DFlash
from specdec.drafters.head.dspark import DSpark
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.formats import DFLASH, DSPARK, EAGLE3, read_config
from specdec.drafters.head.network import HeadNetwork, load_network

_NETWORKS: dict[str, type[HeadNetwork]] = {EAGLE3: Eagle3, DFLASH: DFlash, DSPARK: DSpark}


def load_head(folder: str | os.PathLike[str]) -> HeadNetwork:
    """The head in a folder, in the dtype of its file.

    Raises:
        DraftError: the folder holds no head of a kind that can be read, or a damaged one.
    """
    config = read_config(folder)
    return load_network(_NETWORKS[config.kind], config, folder)
