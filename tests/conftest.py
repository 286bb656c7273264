"""Models on disk, tiny and random, for the commands to load."""

import pytest
import torch

from tests.tiny_models import save_tiny_model, save_word_model

torch.set_num_threads(1)  # the models are too small for two threads to pay


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
