"""How long a proposal of `Auto`'s lookup may be, by what it costs and what has been right in the run."""

from specdec.control import AcceptanceMemory, AcceptanceModel, ForwardCosts, Plan
from specdec.drafters.auto.lookup_source import LONGEST_LOOKUP, LookupSource, _Row
from specdec.drafters.auto.sources import RoundContext

DEAR = {1: 1.0, 2: 1.1, 4: 1.5, 8: 2.4, 16: 4.2, 32: 8.0}
"""As with AVX2: seconds by tokens."""


def lengths(
    num_accepted: list[int], seconds: dict[int, float], max_depth: int = 99, *, is_packed: bool = True
) -> list[int]:
    rows = [_Row(AcceptanceModel(AcceptanceMemory())) for _ in num_accepted]
    for row, accepted in zip(rows, num_accepted, strict=True):
        row.acceptance.update_chain([0.9] * accepted, accepted)
    source = LookupSource.__new__(LookupSource)
    context = context_of(len(rows), seconds, is_packed=is_packed)
    return [source._proven_length(row, max_depth, context) for row in rows]


def context_of(num_rows: int, seconds: dict[int, float], *, is_packed: bool) -> RoundContext:
    costs = ForwardCosts(seconds)
    plain: Plan[object] = Plan(source=None, length=0, tokens=num_rows, seconds=costs.seconds(num_rows))
    return RoundContext(
        max_depths=[99] * num_rows,
        costs=costs,
        plain=plain,
        throughput=num_rows / plain.seconds,
        is_packed=is_packed,
    )


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


def test_where_rows_are_padded_a_proposal_widens_all_of_them() -> None:
    packed, padded = (lengths([2] * 4, DEAR, is_packed=is_packed)[0] for is_packed in (True, False))
    assert 1 <= padded < packed
