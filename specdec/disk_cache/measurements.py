"""What has been measured on this machine, so that the next process need not: a small file for each measurement."""

import functools
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.disk_cache.folders import MEASUREMENTS

_log = logging.getLogger(__name__)
_MAX_AGE_S = 30 * 24 * 3600
"""Machines change: a measurement that is older is made again."""


def recall(key: Sequence[object]) -> Any:
    """What was kept for the key on this machine: a JSON value; None if nothing was, or it is damaged."""
    name = _name(key)
    file = MEASUREMENTS.find(name)
    if file is None:
        return None
    try:
        document = json.loads(file.read_text())
        if document["checksum"] != _digest(document["value"]):
            raise ValueError("its checksum is another")
        is_recent = 0 <= time.time() - document["time"] < _MAX_AGE_S
        return document["value"] if is_recent else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.debug("%s is ignored: %s", file, error)
        return None


def keep(key: Sequence[object], value: Any) -> None:
    """Keep a JSON value for the key and this machine."""

    def write(part: Path) -> str:
        part.write_text(json.dumps({"time": time.time(), "checksum": _digest(value), "value": value}))
        return _name(key)

    MEASUREMENTS.write(write)


def _name(key: Sequence[object]) -> str:
    return f"{_digest([_processor(), *map(str, key)])}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@functools.cache
def _processor() -> str:
    """Its name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or ARM
        name = platform.processor() or platform.machine()
    return f"{name} {os.cpu_count()}"
