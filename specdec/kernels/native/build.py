"""Finds the C library: beside its sources where the package was installed with it, else in the user's cache, where the
system's compiler builds it once per machine.

What is loaded runs with the rights of the user. So a file of the cache is loaded only if it and its folder belong to
the user or to root, if nobody else can write them, and if it is what was written: its name ends in its own hash. Where
the cache can not be trusted or written, a private temporary folder takes its place, for one process.
"""

import logging
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from specdec.disk_cache.access import check_access, check_folder
from specdec.disk_cache.folders import cache_folder
from specdec.kernels.native.compiling import COMPILERS, SOURCES, compile_library, digest, packaged_name, sources_digest
from specdec.stages import stage

_log = logging.getLogger("specdec")

Opened = TypeVar("Opened")


def load(open_file: Callable[[Path], Opened]) -> Opened:
    """What `open_file` makes of the library; it raises OSError for a file that it cannot use, which is then rebuilt.

    Raises:
        OSError: no compiler builds a library that can be used; says what each of them said.
    """
    packaged = SOURCES / packaged_name()
    if packaged.exists():  # as trusted as the modules beside it
        try:
            return open_file(packaged)
        except OSError as error:
            _log.info("%s, which came with the package, cannot be used: %s", packaged, error)
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
    return (cache_folder() / "kernels").resolve()


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
        return stat.S_ISREG(file.lstat().st_mode) and file.stem.endswith(digest(file.read_bytes()))
    except OSError as error:
        _log.info("%s is not loaded: %s", file, error)
        return False


def _name(compiler: str) -> str:
    """The beginning of a file's name; it changes with sources, flags and compiler."""
    return f"kernels-{sources_digest(_version(compiler))}"


def _version(compiler: str) -> bytes:
    """Nothing for a compiler that does not say: it will fail to build, too."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


# ---- building ----


def _build(compiler: str, open_file: Callable[[Path], Opened]) -> Opened:
    """Opens the library where it is kept if that can be, else where it was built: either may forbid programs."""
    with (
        stage(f"building the native kernels with {compiler}, once per machine"),
        tempfile.TemporaryDirectory(prefix="specdec-", ignore_cleanup_errors=True) as scratch,
    ):
        built = Path(scratch) / "kernels.so"
        compile_library(compiler, built)
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
        kept = part.replace(cache / f"{name}-{digest(content)}.so")
    finally:
        part.unlink(missing_ok=True)
    return kept
