"""Who else could have written what a cache holds: it is used only if nobody but the user and root could."""

import os
import stat
from pathlib import Path


def check_folder(path: Path) -> None:
    """Raises OSError where somebody else could put a file into a folder, or another folder in its place.

    Folders further up may belong to a group: so do homes, often.
    """
    check_access(path)
    check_owner(path.parent)
    for parent in path.parents:
        mode = parent.lstat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OSError(f"others can write {parent}")


def check_access(path: Path) -> None:
    """Raises OSError where somebody else than the user and root could have written a file or folder."""
    check_owner(path)
    if path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others can write {path}")


def check_owner(path: Path) -> None:
    owner = path.lstat().st_uid
    if owner not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to user {owner}")
