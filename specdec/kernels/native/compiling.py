"""Compiles the C library. setup.py runs this file by itself, where nothing else of the package can be imported."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a sum is rounded the same way wherever it is inlined
)
COMPILERS = ("cc", "gcc", "clang")


def compile_library(compiler: str, built: Path) -> None:
    """Write `built`, a shared library: as many sources are compiled at once as there are cores.

    Raises:
        OSError, SubprocessError: the compiler cannot; says why.
    """
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        units = {file: f"{scratch}/{file.stem}.o" for file in sorted(SOURCES.glob("*.c"))}
        list(pool.map(lambda unit: _run([compiler, *FLAGS, "-c", str(unit), "-o", units[unit]]), units))
        _run([compiler, *FLAGS, "-shared", "-o", str(built), *units.values(), "-lm"])
    if not built.exists():
        raise OSError(f"{compiler} has written nothing")


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if run.returncode:
        raise OSError(f"{command[0]} failed: {run.stderr.strip()[-500:]}")


def sources_digest(*more: bytes) -> str:
    """Changes with the sources, the flags, and whatever else counts."""
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    return digest(b"\0".join([*more, " ".join(FLAGS).encode(), *sources]))


def packaged_name() -> str:
    """Of the library that an installed package brings along, beside its sources."""
    return f"kernels-{sources_digest()}.so"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
