"""Builds the C library in native/ with the system's compiler and keeps it in the user's cache: once per machine.

What is loaded runs with the user's rights. So a kept file is loaded only if it and its folder belong to the user or to
root, if nobody else can write them, and if it is what was written: its name ends in its own hash. Where the cache can
not be trusted or written, a private temporary folder takes its place, for one process.
"""

import hashlib
import logging
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from specdec.kernels.native.access import check_access, check_folder
from specdec.stages import stage

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a sum is rounded the same way wherever it is inlined
)
COMPILERS = ("cc", "gcc", "clang")

_log = logging.getLogger("specdec")

Opened = TypeVar("Opened")


def load(open_file: Callable[[Path], Opened]) -> Opened:
    """What `open_file` makes of the library; it raises OSError for a file that it cannot use, which is then rebuilt.

    Raises:
        OSError: no compiler builds a library that can be used; says what each of them said.
    """
    compilers = _compilers()
    if not compilers:
        raise OSError(
            "no C compiler found (cc, gcc or clang); install one and the kernels will be built "
            "(Debian, Ubuntu: apt-get install gcc libc6-dev; macOS: xcode-select --install)"
        )
    for file in _kept_files(compilers):
        try:
            return open_file(file)
        except OSError as error:
            _log.info("%s cannot be used and is built again: %s", file, error)
    troubles = []
    for compiler in compilers:
        try:
            return _build(compiler, open_file)
        except (OSError, subprocess.SubprocessError) as error:
            troubles.append(str(error))
    raise OSError("; ".join(troubles))


def folder() -> Path:
    """`$XDG_CACHE_HOME/specdec/kernels`, or in `~/.cache`; links on the way are resolved."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from error
    return (home / "specdec" / "kernels").resolve()


def _compilers() -> list[str]:
    return list(filter(None, map(shutil.which, COMPILERS)))


# ---- what was built before ----


def _kept_files(compilers: Sequence[str]) -> Iterator[Path]:
    """Files of these sources that may be loaded."""
    try:
        cache = folder()
        check_folder(cache)
    except OSError:  # a folder that is not there, or not to be trusted: whoever wants to write there says which
        return
    for compiler in compilers:
        for file in sorted(cache.glob(f"{_name(compiler)}-*.so")):
            if _may_be_loaded(file):
                yield file


def _may_be_loaded(file: Path) -> bool:
    try:
        check_access(file)
        return stat.S_ISREG(file.lstat().st_mode) and file.stem.endswith(_digest(file.read_bytes()))
    except OSError as error:
        _log.info("%s is not loaded: %s", file, error)
        return False


def _name(compiler: str) -> str:
    """The beginning of a file's name; it changes with sources, flags and compiler."""
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]"))]
    digest = _digest(b"\0".join([_version(compiler), " ".join(FLAGS).encode(), *sources]))
    return f"kernels-{digest}"


def _version(compiler: str) -> bytes:
    """Nothing for a compiler that does not say: it will fail to build, too."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# ---- building ----


def _build(compiler: str, open_file: Callable[[Path], Opened]) -> Opened:
    """Opens the library where it is kept if that can be, else where it was built: either may forbid programs."""
    with (
        stage(f"building the native kernels with {compiler}, once per machine"),
        tempfile.TemporaryDirectory(prefix="specdec-", ignore_cleanup_errors=True) as scratch,
    ):
        built = _compile(compiler, Path(scratch))
        try:
            return open_file(_keep(built, _name(compiler)))
        except OSError as error:
            opened = open_file(built)  # stays in memory when the folder goes
            _log.warning(
                "the native kernels cannot be kept, so every process builds its own, which takes seconds: %s; let "
                "XDG_CACHE_HOME name a folder that only you can write",
                error,
            )
            return opened


def _compile(compiler: str, scratch: Path) -> Path:
    built = scratch / "kernels.so"
    units = [str(file) for file in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, "-o", str(built), *units, "-lm"]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if run.returncode or not built.exists():
        raise OSError(f"{compiler} failed: {run.stderr.strip()[-500:]}")
    return built


def _keep(built: Path, name: str) -> Path:
    """Copies a library into the cache: another process sees no file or a whole one."""
    cache = folder()
    cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.mkdir(mode=0o700, exist_ok=True)
    check_folder(cache)
    content = built.read_bytes()
    part = cache / f".{secrets.token_hex(8)}.part"
    try:
        part.write_bytes(content)
        part.chmod(0o755)
        kept = part.replace(cache / f"{name}-{_digest(content)}.so")
    finally:
        part.unlink(missing_ok=True)
    return kept
