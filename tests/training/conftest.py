"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specdec.training.heads import layerskip, trainer


@pytest.fixture(scope="session", autouse=True)
def float32_products() -> Iterator[None]:
    """Trainers time which dtype is faster: on a busy machine two of them may answer differently, to other bits."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, layerskip):
            patch.setattr(module, "bfloat16_is_faster", lambda _: False)
        yield
