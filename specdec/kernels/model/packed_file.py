"""Packed weights on disk: made once of a checkpoint's files, mapped from then on.

They are written one by one, so that neither the float model nor its packed form is ever held in memory as a whole. The
format is safetensors (https://huggingface.co/docs/safetensors), each tensor at a multiple of 64 bytes; a file's name
ends in its checksum.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from specdec.disk_cache.folders import PACKED_WEIGHTS

_log = logging.getLogger(__name__)
_VERSION = 1
_ALIGNMENT = 64
_CHUNK_BYTES = 16 << 20
_DTYPES = {torch.int8: "I8", torch.float32: "F32"}


class Entry(NamedTuple):
    """A tensor to be written.

    Args:
        make: the parts of it, one after the other, flattened.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PackedFile:
    """What one checkpoint is packed to.

    Args:
        key: everything that the bytes depend on: the checkpoint's files, and how they are packed.
    """

    def __init__(self, *key: str):
        self._key = hashlib.sha256("\0".join([str(_VERSION), *key]).encode()).hexdigest()[:24]

    def open(self) -> Mapping[str, torch.Tensor] | None:
        """The tensors, mapped: memory is taken by what is read of them. None if there is no intact file."""
        file = PACKED_WEIGHTS.find(f"{self._key}-")
        if file is None:
            return None
        try:
            if file.stem != self._name(_checksum(file)).removesuffix(".safetensors"):
                raise ValueError("its checksum is another")
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            _log.debug("%s is ignored: %s", file, error)
            return None

    def write(self, entries: Mapping[str, Entry]) -> Mapping[str, torch.Tensor] | None:
        """Write the file, and open it. None where there is no room for it, or the cache cannot be written."""
        if not PACKED_WEIGHTS.has_room(sum(entry.num_bytes for entry in entries.values())):
            return None

        def write(part: Path) -> str:
            with part.open("wb") as file:
                _write_tensors(file, entries)
            return self._name(_checksum(part))

        return None if PACKED_WEIGHTS.write(write) is None else self.open()

    def _name(self, checksum: int) -> str:
        return f"{self._key}-{checksum:08x}.safetensors"


def _write_tensors(file: BinaryIO, entries: Mapping[str, Entry]) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name, entry in entries.items():
        end = position + entry.num_bytes
        header[name] = _described(_DTYPES[entry.dtype], entry.shape, position, end)
        position = end + -end % _ALIGNMENT
        if position > end:  # the format allows no gaps
            header[f"{name}.padding"] = _described("I8", (position - end,), end, position)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries.values():
        for part in entry.make():
            file.write(part.contiguous().view(torch.uint8).numpy().data)
        file.write(b"\0" * (-entry.num_bytes % _ALIGNMENT))


def _described(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while part := content.read(_CHUNK_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def as_float32(tensor: torch.Tensor, done: Callable[[torch.Tensor], None]) -> Entry:
    """The values of a tensor, converted part by part, so that they are never all in memory; `done` is told of each."""
    num_rows = max(_CHUNK_BYTES // 4 // max(math.prod(tensor.shape[1:]), 1), 1)

    def make() -> Iterable[torch.Tensor]:
        for part in tensor.detach().split(num_rows):
            yield part.float().flatten()
            done(part)

    return Entry(torch.float32, tuple(tensor.shape), make)


_PAGEOUT, _PAGE = 21, 4096


def release(tensor: torch.Tensor) -> None:
    """Let the system take back the pages of a mapped file that will not be read soon. They are not lost."""
    if sys.platform != "linux" or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return
    begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if end > begin:
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _PAGEOUT)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
