"""Random calls do what plain `model.generate()` does; what differs is on the list in docs/conformance.md.

`make test` runs a few hundred, always the same; `make conformance` runs thousands, others every time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from transformers import EosTokenCriteria, StoppingCriteriaList
from transformers.utils import logging as hf_logging

import specdec
from specdec.drafters import Plain
from specdec.testing import tiny_model
from tests.support.conformance import EXPLAINED, differences, run_case
from tests.support.conformance_cases import Case, cases

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Random calls are warned about at length."""
    hf_logging.set_verbosity_error()
    yield
    hf_logging.set_verbosity_warning()


@pytest.mark.filterwarnings("ignore")
def test_random_calls(request: pytest.FixtureRequest) -> None:
    profile = settings.get_profile(request.config.getoption("--hypothesis-profile") or "quick")
    tally: Counter[str] = Counter()

    @settings(parent=profile)
    @given(cases())
    def compare(case: Case) -> None:
        plain, ours = run_case(case)
        found = differences(case, plain, ours)
        unexplained = [f"{difference.what}: {difference.detail}" for difference in found if difference.reason is None]
        assert not unexplained, "\n".join([repr(case), *unexplained])
        for name in {difference.reason for difference in found} or {"alike"}:
            tally[name] += 1
        tally["outputs compared"] += plain.error is None and ours.error is None

    compare()
    tally["calls"] = profile.max_examples
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(f"{count:6} {name}" for name, count in tally.most_common()))
    assert tally["outputs compared"] > 0.6 * tally["calls"], "most calls should go through"


def test_every_explained_difference_is_in_the_docs() -> None:
    listed = re.findall(r"^\*\*(.+?)\.\*\*", DOCUMENT.read_text(), re.MULTILINE)
    assert listed == [reason.name.capitalize() for reason in EXPLAINED]


# what the random calls found


def test_int32_prompts_come_back_as_int64() -> None:
    """Plain decoding appends int64 tokens; we used to return the prompt's own dtype."""
    model, prompt = tiny_model("llama"), torch.tensor([[1, 2, 3]], dtype=torch.int32)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(prompt, **options)
    out = specdec.generate(model, prompt, drafter=Plain(), **options)
    assert out.dtype == expected.dtype == torch.int64
    assert torch.equal(out, expected)


def test_an_eos_criterion_without_padding_is_refused() -> None:
    """Plain decoding cannot fill finished rows then and fails; we used to fill them with token 0."""
    model, prompt = tiny_model("llama"), torch.tensor([[1, 2, 3]])
    criteria = [EosTokenCriteria(eos_token_id=7)]
    for decode, error in ((type(model).generate, TypeError), (specdec.generate, ValueError)):
        with pytest.raises(error, match=r"NoneType|pass pad_token_id="):
            decode(model, prompt, stopping_criteria=StoppingCriteriaList(criteria), max_new_tokens=3)
    out = specdec.generate(
        model, prompt, stopping_criteria=StoppingCriteriaList(criteria), max_new_tokens=3, pad_token_id=0
    )
    assert out.shape == (1, 6)
