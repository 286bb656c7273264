"""Models on disk, tiny and random, for the commands to load; and which tests are slow."""

import secrets
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from specdec.disk_cache.folders import CacheFolder
from specdec.errors import ModelError
from specdec.models import pull_demo
from tests.support.rotation import is_left_out
from tests.support.tiny_models import save_tiny_model, save_word_model

torch.set_num_threads(1)  # the models are too small for two threads to pay

# `make conformance` asks for the second: other calls every time, and more of them
settings.register_profile("quick", max_examples=200, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "nightly", max_examples=2_000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("rotated") and is_left_out(item):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements and packed weights of a test's own: what another has left there decides nothing."""
    home = tmp_path_factory.getbasetemp().resolve() / f"caches-{secrets.token_hex(4)}"
    monkeypatch.setattr(CacheFolder, "path", property(lambda folder: home / folder.name))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of the demo model, fetched if it is not there; who cannot fetch it skips the test."""
    try:
        return pull_demo(progress=False)
    except ModelError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a smaller model with the same tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("draft"), hidden_size=16, seed=1)


@pytest.fixture(scope="session")
def tiny_without_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("untemplated"), chat_template=None)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that says words, with a long context."""
    return save_word_model(tmp_path_factory.mktemp("words"))
