"""A user's GGUF file, converted once: transformers takes minutes to read one, and seconds to read the copy.

What takes the time is a large vocabulary, which is read item by item. The copy stands in the cache under a name that
changes with the file and with transformers. It holds the tokenizer, the configuration and the same weights, dequantised
to float32; or not the weights, which gguf_weights.py then takes from the file.
"""

import contextlib
import hashlib
import io
import logging
import math
import mmap
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from specdec.disk_cache.access import check_folder
from specdec.disk_cache.folders import cache_folder
from specdec.models.checkpoint import Checkpoint
from specdec.models.download import staging_folder
from specdec.stages import stage

_log = logging.getLogger("specdec")
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_CHAT_TEMPLATE = "tokenizer.chat_template"


def gguf_checkpoint(path: Path) -> Checkpoint:
    """The file itself, as transformers reads it."""
    return Checkpoint(
        name=path.stem,
        location=str(path.parent),
        gguf_file=path.name,
        remedy=f"{path} may be truncated, corrupt, or of a kind that transformers cannot dequantise.",
    )


def convert(path: Path, folder: Path, staging: Path) -> None:
    """Write `folder`, on the disk of `staging`, which appears only when it is complete.

    Raises:
        ModelError: the file cannot be read.
    """
    checkpoint, unfinished = gguf_checkpoint(path), staging / folder.name
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        checkpoint.read_tokenizer().save_pretrained(unfinished)
        checkpoint.read_model(torch.float32).save_pretrained(unfinished)
    unfinished.replace(folder)


def describe(path: Path, folder: Path, staging: Path) -> None:
    """As `convert`, without the weights."""
    checkpoint, unfinished = gguf_checkpoint(path), staging / folder.name
    with contextlib.redirect_stderr(io.StringIO()):  # bars
        checkpoint.read_tokenizer().save_pretrained(unfinished)
        checkpoint.read_config().save_pretrained(unfinished)
    unfinished.replace(folder)


def converted(path: Path) -> Checkpoint:
    """The copy of a file, made if it is not there; the file itself if there can be none, which the log then says.

    Raises:
        ModelError: the file cannot be read, or the disk is full after all.
    """
    return _kept(path, "gguf", convert, "Converting", needs_space=True)


def described(path: Path) -> Checkpoint:
    """The copy of a file without its weights, as `converted` gives one with them."""
    return _kept(path, "gguf-tokenizers", describe, "Reading the tokenizer of", needs_space=False)


def _kept(
    path: Path, place: str, make: Callable[[Path, Path, Path], None], doing: str, *, needs_space: bool
) -> Checkpoint:
    try:
        home = _home(place)
        folder = home / _name(path)
        if needs_space and not _is_complete(folder):
            _check_space(path, home)
    except OSError as error:
        _log.warning("%s is read anew each time, which may take minutes: %s", path, error)
        return gguf_checkpoint(path)
    if not _is_complete(folder):
        with staging_folder(home) as staging:
            if not _is_complete(folder):  # another process may have been faster
                print(f"{doing} {path.name}, once: later starts take seconds. To: {folder}", file=sys.stderr)
                with stage(f"{doing[0].lower()}{doing[1:]} {path.name}"):
                    make(path, folder, staging)
                _remove_older(folder)
    remedy = f"Remove {folder}: it is then made again."
    return Checkpoint(name=path.stem, location=str(folder), remedy=remedy)


def lacks_chat_template(path: Path) -> bool:
    """Whether a file says that it has none, as far as can be told without reading all of it."""
    header = read_header(path)
    return header is not None and _CHAT_TEMPLATE not in header.keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where a tensor lies.

    Args:
        shape: the rows' length last, unlike in the file.
        kind: the number of its type.
        offset: bytes from the beginning of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands before the weights.

    Args:
        keys: names of the settings.
        architecture: as the file names it; empty if it does not.
        data_offset: bytes before the data of the tensors.
    """

    keys: frozenset[str]
    architecture: str
    tensors: dict[str, Tensor]
    data_offset: int

    @property
    def num_weights(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_header(path: Path) -> Header | None:
    """In a second at most, values skipped; None where the file is none, or damaged: transformers says how."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except (OSError, ValueError, KeyError, OverflowError, RecursionError, ZeroDivisionError, struct.error):
        return None


class _Cursor:
    """Goes through a file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._position = 0
        self._values: dict[str, Any] = {}
        """Of the settings that are needed."""

    def header(self) -> Header:
        magic, version, num_tensors, num_keys = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("no GGUF file of a version that is known")
        keys = frozenset(self._key() for _ in range(num_keys))
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = self._values.get("general.alignment", 32)
        return Header(
            keys=keys,
            architecture=self._values.get("general.architecture", b"").decode(),
            tensors=tensors,
            data_offset=-(-self._position // alignment) * alignment,
        )

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self._position)
        self._position += struct.calcsize(f"<{layout}")
        return values

    def _string(self) -> bytes:
        (length,) = self._take("Q")
        self._position += length
        return self._data[self._position - length : self._position]

    def _key(self) -> str:
        name = self._string().decode()
        (kind,) = self._take("I")
        if (name, kind) == ("general.alignment", _UINT32):
            (self._values[name],) = self._take("I")
        elif (name, kind) == ("general.architecture", _STRING):
            self._values[name] = self._string()
        else:
            self._skip(kind)
        return name

    def _skip(self, kind: int, count: int = 1) -> None:
        """Values of a type."""
        if kind in _SIZES:
            self._position += _SIZES[kind] * count
            return
        if kind == _STRING:
            self._skip_strings(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self._skip(*self._take("IQ"))
        else:
            raise ValueError(f"there is no type {kind}")

    def _skip_strings(self, count: int) -> None:
        """In the fewest steps: a vocabulary may have 150,000 of them, and as many merges."""
        data, position, length_at = self._data, self._position, struct.Struct("<Q").unpack_from
        for _ in range(count):
            position += 8 + length_at(data, position)[0]
        self._position = position

    def _tensor(self) -> tuple[str, Tensor]:
        name = self._string().decode()
        (num_dimensions,) = self._take("I")
        shape = self._take(f"{num_dimensions}Q")
        kind, offset = self._take("IQ")
        return name, Tensor(shape=shape[::-1], kind=kind, offset=offset)


def _home(place: str) -> Path:
    """Of the copies, which nobody else can write.

    Raises:
        OSError: there is no such folder.
    """
    home = cache_folder() / place
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = home.resolve()
    check_folder(home)
    if not os.access(home, os.W_OK):
        raise OSError(f"{home} cannot be written")
    return home


def _name(path: Path) -> str:
    place, state = path.resolve(), path.stat()
    version = f"{state.st_size} {state.st_mtime_ns} {transformers.__version__}"
    return f"{path.stem}-{_digest(str(place))}-{_digest(version)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _check_space(path: Path, home: Path) -> None:
    header = read_header(path)
    num_bytes = 0 if header is None else 4 * header.num_weights
    num_free_bytes = shutil.disk_usage(home).free
    if num_free_bytes < num_bytes:
        raise OSError(f"a copy takes {num_bytes / 1e6:.0f} MB, and {home} has {num_free_bytes / 1e6:.0f} MB free")


def _remove_older(folder: Path) -> None:
    """Copies of what the same file was before."""
    beginning = folder.name.rpartition("-")[0]
    for other in folder.parent.iterdir():
        if other.name.rpartition("-")[0] == beginning and other != folder:
            shutil.rmtree(other, ignore_errors=True)
