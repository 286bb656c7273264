"""The files of a checkpoint, looked at before they are loaded: where they are, which, and whether they fit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from specdec.errors import ModelError
from specdec.model_options import Weights

_PACKED_BYTES = {"int8": 1.0, "int4": 0.625}
"""Of a weight."""
_CGROUP = Path("/sys/fs/cgroup")


def weight_files(location: str) -> list[Path]:
    """Of a folder, or of a hub id that has been fetched before; none where they are not here yet."""
    folder = Path(location)
    if not folder.is_dir():
        config = try_to_load_from_cache(location, "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted(folder.glob("*.safetensors"))


def fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file, or the configuration beside it, does: by places, sizes and times."""
    read = sorted({*files, *(file.with_name("config.json") for file in files)})
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in read if file.exists()]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def check_memory(name: str, files: Sequence[Path], dtype: torch.dtype | str, weights: Weights) -> None:
    """Refuse what does not fit beside what runs already.

    Args:
        dtype: that the model will have; "auto": that of the files.

    Raises:
        ModelError: says what it takes, what is free, and what would fit.
    """
    num_bytes, num_free_bytes = _num_bytes(files, dtype, weights), free_memory()
    if num_bytes <= num_free_bytes:
        return
    smaller = {other: _num_bytes(files, dtype, other) for other in _PACKED_BYTES if other != weights}
    fitting = [
        f"--weights {other} takes {size / 1e9:.1f} GB" for other, size in smaller.items() if size <= num_free_bytes
    ]
    advice = " and ".join(fitting) or "take a smaller model, or end other programs"
    raise ModelError(
        f"the model {name} takes about {num_bytes / 1e9:.1f} GB of memory with weights {weights!r}, and "
        f"{num_free_bytes / 1e9:.1f} GB are free: {advice}"
    )


def _num_bytes(files: Sequence[Path], dtype: torch.dtype | str, weights: str) -> int:
    """Embeddings of packed models stay in the file, but for the rows that are used."""
    num_bytes = 0.0
    for tensor_name, shape, itemsize in _shapes(files):
        size = math.prod(shape)
        if weights in ("stock", "float"):
            num_bytes += size * (dtype.itemsize if isinstance(dtype, torch.dtype) else itemsize)
        elif len(shape) == 2 and "embed" not in tensor_name:
            num_bytes += size * _PACKED_BYTES[weights]
        elif len(shape) == 2:
            num_bytes += size  # of a head that shares them
        else:
            num_bytes += size * 4
    return round(num_bytes)


def _shapes(files: Sequence[Path]) -> Iterator[tuple[str, list[int], int]]:
    """Name, shape and bytes of a value of every tensor."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                yield name, part.get_shape(), _itemsize(part.get_dtype())


def _itemsize(dtype: str) -> int:
    """Of "BF16" and the like."""
    return int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8) // 8 or 1


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its container."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit = int((_CGROUP / "memory.max").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()) + cached)
    return free
