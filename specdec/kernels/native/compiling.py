"""Compiles the C library. setup.py runs this file by itself, where nothing else of the package can be imported."""

import hashlib
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a sum is rounded the same way wherever it is inlined
)
COMPILERS = ("cc", "gcc", "clang")


def compile_library(compiler: str, built: Path) -> None:
    """Write `built`, a shared library.

    Raises:
        OSError, SubprocessError: the compiler cannot; says why.
    """
    units = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, "-o", str(built), *units, "-lm"]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if run.returncode or not built.exists():
        raise OSError(f"{compiler} failed: {run.stderr.strip()[-500:]}")


def sources_digest(*more: bytes) -> str:
    """Changes with the sources, the flags, and whatever else counts."""
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    return digest(b"\0".join([*more, " ".join(FLAGS).encode(), *sources]))


def packaged_name() -> str:
    """Of the library that an installed package brings along, beside its sources."""
    return f"kernels-{sources_digest()}.so"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
