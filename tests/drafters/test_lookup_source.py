"""How long a proposal of `Auto`'s lookup may be, by what it costs and what has been right in the run."""

from types import SimpleNamespace

from specdec.control import AcceptanceMemory, AcceptanceModel, ForwardCosts
from specdec.drafters.auto.lookup_source import LONGEST_LOOKUP, LookupSource, _Row

DEAR = {1: 1.0, 2: 1.1, 4: 1.5, 8: 2.4, 16: 4.2, 32: 8.0}
"""As with AVX2: seconds by tokens."""


def lengths(num_accepted: list[int], seconds: dict[int, float], max_depth: int = 99) -> list[int]:
    source = LookupSource.__new__(LookupSource)
    source._rows = [_Row(AcceptanceModel(AcceptanceMemory())) for _ in num_accepted]
    for row, accepted in zip(source._rows, num_accepted, strict=True):
        row.acceptance.update_chain([0.9] * accepted, accepted)
    num_rows = len(num_accepted)
    costs, depths = ForwardCosts(seconds), [max_depth] * num_rows
    return source._proven_lengths(SimpleNamespace(num_rows=num_rows, costs=costs, max_depths=depths))


def test_before_anything_was_right_little_may_be_lost() -> None:
    assert lengths([0], DEAR) == [1]


def test_what_was_right_allows_more() -> None:
    grown = [lengths([accepted], DEAR)[0] for accepted in range(20)]
    assert grown == sorted(grown)
    assert grown[1] > 2
    assert grown[-1] == LONGEST_LOOKUP


def test_what_costs_nothing_may_be_long_at_once() -> None:
    assert lengths([0], dict.fromkeys(DEAR, 1.0)) == [LONGEST_LOOKUP]


def test_rows_prove_themselves() -> None:
    unproven, proven = lengths([0, 30], DEAR)
    assert unproven < proven == LONGEST_LOOKUP


def test_no_longer_than_what_can_be_committed() -> None:
    assert lengths([0, 30], DEAR, max_depth=0) == [0, 0]
    assert lengths([0, 30], DEAR, max_depth=2) == [1, 2]
