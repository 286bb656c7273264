"""The wheel: it holds what the packages need, and what it installs runs from anywhere."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import specdec
from specdec.kernels import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGES = ("specdec", "trees", "routers")
GENERATE = ("generate", "hello", "--raw", "--max-new-tokens", "8", "--weights", "int8", "--json")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str, folder: Path, **variables: str) -> str:
    """What a command prints that sees neither this checkout nor the network."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PIP_NO_INDEX": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def build(source: Path, to: str, **variables: str) -> Path:
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", to, ".", folder=source, **variables)
    (built,) = (source / to).glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "dist")


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment of its own, which borrows only the dependencies of this one."""
    home = tmp_path_factory.mktemp("installed") / "clean"
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    run(*PIP, "--python", str(scripts / "python"), "install", "--no-deps", str(wheel), folder=home)
    (package,) = home.rglob("site-packages/specdec")
    borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
    (package.parent / "borrowed.pth").write_text("\n".join(borrowed))
    return scripts


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= held
    assert {f"{package}/py.typed" for package in PACKAGES} <= held
    assert not [name for name in held if name.startswith(("tests", "bench"))]


def test_it_runs_where_it_is_installed(scripts: Path, tmp_path: Path) -> None:
    report = json.loads(run(str(scripts / "specdec"), "doctor", "--json", folder=tmp_path))
    assert report["specdec"] == specdec.__version__
    where = run(str(scripts / "python"), "-c", "import specdec; print(specdec.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(scripts.parent)


@pytest.mark.skipif(native.library() is None or sys.platform != "linux", reason=native.describe())
def test_its_kernels_need_no_compiler_where_it_is_installed(
    wheel: Path, scripts: Path, tiny: str, tmp_path: Path
) -> None:
    bare = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert re.fullmatch(rf"py3-none-manylinux_2_\d+_{platform.machine()}", wheel.stem.split("-", 2)[2])
    report = json.loads(run(str(scripts / "specdec"), "doctor", "--json", folder=tmp_path, **bare))
    assert report["kernels"].startswith("native kernels")
    answer = run(str(scripts / "specdec"), *GENERATE, "--model", tiny, folder=tmp_path, **bare)
    assert len(json.loads(answer)["tokens"]) == 8
    assert not (tmp_path / "cache" / "specdec" / "kernels").exists(), "nothing was built"


def test_without_a_compiler_it_is_pure(source: Path, wheel: Path) -> None:
    """Also where a library of an earlier build is lying about."""
    pure = build(source, "pure", PATH="")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]
