"""Masks against a brute-force oracle, written natively and by torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels import native
from specdec.kernels.trees import masks as visibility
from specdec.tree_model import masks


@pytest.fixture(params=["native", "torch"], scope="module", autouse=True)
def writer(request: pytest.FixtureRequest):
    if request.param == "native" and native.library() is None:
        pytest.skip(native.describe())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(visibility, "can_write", lambda seen_BTK: False)
        yield


@settings(deadline=None)
@given(st.data())
def test_each_token_sees_what_is_committed_and_its_own_part_of_the_tail(data: st.DataObject) -> None:
    num_rows, num_new, num_tail = (data.draw(st.integers(1, most)) for most in (3, 4, 5))
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=num_rows, max_size=num_rows))
    bits = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # a part of something larger, as the nodes without the root are
    seen_BTK = torch.randint(2, (num_rows, num_new, num_tail + 1), generator=bits).bool()[:, :, 1:]
    if data.draw(st.booleans()):
        seen_BTK = seen_BTK[:1].expand(num_rows, -1, -1)
    prompt_BP = None
    if data.draw(st.booleans()):
        prompt_BP = torch.randint(2, (num_rows, data.draw(st.integers(1, 8))), generator=bits).bool()
    visible_BTS = masks.visible_slots(seen_BTK, lengths, prompt_BP)
    assert visible_BTS.shape == (num_rows, num_new, max(lengths) + num_tail)
    for row, length in enumerate(lengths):
        for token in range(num_new):
            expected = [*[True] * length, *seen_BTK[row, token].tolist(), *[False] * (max(lengths) - length)]
            for slot, is_real in enumerate([] if prompt_BP is None else prompt_BP[row, : len(expected)].tolist()):
                expected[slot] &= is_real
            assert visible_BTS[row, token].tolist() == expected
