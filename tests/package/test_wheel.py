"""The wheel: it holds what the packages need, and what it installs runs from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import specdec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGES = ("specdec", "trees", "routers")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str, folder: Path) -> str:
    """What a command prints that sees neither this checkout nor the network."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".", folder=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


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


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows only the dependencies of this one."""
    home = tmp_path / "clean"
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    run(*PIP, "--python", str(scripts / "python"), "install", "--no-deps", str(wheel), folder=tmp_path)
    (package,) = home.rglob("site-packages/specdec")
    borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
    (package.parent / "borrowed.pth").write_text("\n".join(borrowed))

    report = json.loads(run(str(scripts / "specdec"), "doctor", "--json", folder=tmp_path))
    assert report["specdec"] == specdec.__version__
    where = run(str(scripts / "python"), "-c", "import specdec; print(specdec.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
