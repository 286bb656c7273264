"""What is importable, and what importing costs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specdec
from specdec import errors

PACKAGES = ("specdec", "specdec.drafters", "specdec.engine", "trees", "routers")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_name_exists(name: str):
    package = importlib.import_module(name)
    for exported in getattr(package, "__all__", ()):
        assert getattr(package, exported) is not None


@pytest.mark.parametrize("name", ["specdec", "trees", "routers"])
def test_packages_carry_their_types(name: str):
    package = importlib.import_module(name)
    assert package.__doc__
    assert (Path(package.__file__).parent / "py.typed").exists()


def test_the_names_that_users_rely_on():
    assert {
        "DecodingStats",
        "SpecdecError",
        "SpeculativeOutput",
        "disable",
        "drafters",
        "enable",
        "generate",
    } <= set(specdec.__all__)
    assert {"Drafter", "DraftSession", "Plain", "PromptLookup", "SmallModel"} <= set(specdec.drafters.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", specdec.__version__)


def test_a_star_import():
    names: dict[str, object] = {}
    exec("from specdec import *", names)
    assert set(specdec.__all__) <= set(names)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'specdec' has no attribute 'genrate'"):
        _ = specdec.genrate


def test_the_tree_of_errors():
    own = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(error, specdec.SpecdecError) and error.__doc__ for error in own)
    for wrong_argument in (errors.UnsupportedModelError, errors.UnsupportedOptionError, errors.DraftError):
        assert issubclass(wrong_argument, ValueError)
    assert {error.__name__ for error in own} <= set(specdec.__all__)
    for error in own:
        assert error.__name__ in errors.__doc__


def imported_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after the statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_it_is_quick():
    """`specdec --help` must not wait for torch."""
    assert not {"torch", "transformers", "numpy"} & imported_by("import specdec")
    assert not {"torch", "transformers"} & imported_by("import routers")
    assert not {"torch", "transformers", "fastapi", "uvicorn", "httpx2"} & imported_by("import specdec.cli")


def test_trees_know_no_model():
    loaded = imported_by("import trees")
    assert "torch" in loaded
    assert not {"transformers", "specdec", "routers"} & loaded
