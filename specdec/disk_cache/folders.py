"""Folders of the cache that hold files of one kind: found, written, kept small and cleared."""

import logging
import os
import secrets
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from operator import methodcaller
from pathlib import Path

from specdec.disk_cache.access import check_access, check_folder

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/specdec`, or `~/.cache/specdec`.

    Raises:
        OSError: the user has no home.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return home / "specdec"


class CacheFolder:
    """Files that can be made again: whatever is wrong with them or with the folder, there is nothing to read.

    Args:
        name: of the folder within the cache.
        max_bytes: of its files. The newest is kept, whatever its size; of the others those that were used last.
    """

    def __init__(self, name: str, max_bytes: int):
        self.name, self._max_bytes = name, max_bytes

    @property
    def path(self) -> Path:
        return (cache_folder() / self.name).resolve()

    def find(self, beginning: str) -> Path | None:
        """A file whose name begins so, that only the user and root can have written, and which now counts as used."""
        files = self.find_all([beginning])
        self.touch(files)
        return files[0] if files else None

    def find_all(self, beginnings: Sequence[str]) -> list[Path]:
        """A file for each of these beginnings, up to the first that there is none for. The folder is listed once."""
        found: list[Path] = []
        try:
            folder = self.path
            check_folder(folder)
            names = sorted(os.listdir(folder)) if beginnings else []
            for beginning in beginnings:
                file = next(filter(_is_trusted, _beginning_with(beginning, names, folder)), None)
                if file is None:
                    break
                found.append(file)
        except OSError as error:
            _log.debug("%s is not read: %s", self.path, error)
        return found

    def touch(self, files: Iterable[Path]) -> None:
        """These count as used now, the last of them last."""
        now = time.time_ns()
        for index, file in enumerate(files):
            time_ns = now + 1_000 * index  # the system's own clock for files stands still for milliseconds
            with suppress(OSError):  # root's, for all users; or gone
                os.utime(file, ns=(time_ns, time_ns))

    def write(self, write: Callable[[Path], str]) -> Path | None:
        """Add a file; other processes see no file or a whole one. None where the folder cannot be trusted or written.

        Args:
            write: fills the file at a path, and returns its name.
        """
        part = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            check_folder(self.path)
            part = self.path / f".{secrets.token_hex(8)}.part"
            part.touch(mode=0o600)
            kept = part.replace(self.path / write(part))
            self._trim(kept)
            return kept
        except OSError as error:
            _log.debug("nothing is kept in the cache: %s", error)
            return None
        finally:
            if part is not None:
                part.unlink(missing_ok=True)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a file of that size is within the bound, and leaves as much of the disk free."""
        try:
            place = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
            return num_bytes <= self._max_bytes and 2 * num_bytes <= shutil.disk_usage(place).free
        except OSError:
            return False

    def _trim(self, newest: Path) -> None:
        others = sorted(set(self.files()) - {newest}, key=lambda file: file.stat().st_mtime_ns, reverse=True)
        num_bytes = newest.stat().st_size
        for file in others:
            num_bytes += file.stat().st_size
            if num_bytes > self._max_bytes:
                file.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        try:
            return [file for file in self.path.iterdir() if file.is_file()]
        except OSError:
            return []

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files())

    def clear(self) -> None:
        for file in self.files():
            file.unlink(missing_ok=True)


def _beginning_with(beginning: str, names: Sequence[str], folder: Path) -> Iterator[Path]:
    """names: in order."""
    those = islice(names, bisect_left(names, beginning), None)
    return (folder / name for name in takewhile(methodcaller("startswith", beginning), those))


def _is_trusted(file: Path) -> bool:
    """Raises OSError where somebody else could have written the file; False for what is none."""
    check_access(file)
    return file.is_file() and not file.is_symlink()


MEASUREMENTS = CacheFolder("measurements", 4 << 20)
PACKED_WEIGHTS = CacheFolder("packed-weights", 20 << 30)
"""As large as two models of twice 5 GB: what fits the machines that these files are for."""
PREFIXES = CacheFolder("prefixes", 0)
"""As large as who asks for it allows."""
