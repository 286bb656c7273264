"""The few cases of a product that `make test` runs are not too few, and `make test-all` runs the others."""

import itertools

import pytest

from tests.support.rotation import in_rotation, is_left_out

SIZES = [(3,), (6, 18), (10, 2, 2), (2, 3, 2), (5, 5, 5), (4, 1), (7, 4, 3, 2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_value_comes_up(sizes: tuple[int, ...]) -> None:
    cases = [case for case in itertools.product(*map(range, sizes)) if in_rotation(case, sizes)]
    assert len(cases) == max(sizes)
    for axis, size in enumerate(sizes):
        assert {case[axis] for case in cases} == set(range(size))


def test_equal_axes_do_not_keep_step() -> None:
    cases = [case for case in itertools.product(range(6), range(2), range(2)) if in_rotation(case, (6, 2, 2))]
    assert {case[1:] for case in cases} == set(itertools.product(range(2), repeat=2))


@pytest.mark.rotated
@pytest.mark.parametrize(("letter", "rank"), [("a", 0), ("b", 1), ("c", 2)])
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_left_out_is_slow(request: pytest.FixtureRequest, letter: str, rank: int, number: int) -> None:
    left_out = number != rank % 2
    assert is_left_out(request.node) == left_out
    assert (request.node.get_closest_marker("slow") is not None) == left_out
