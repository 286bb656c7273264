"""Is this sample drawn from that distribution? A chi-square test with a stated false-alarm probability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from scipy.stats import chi2

FALSE_ALARM = 1e-6
"""How often one correct sample would be called wrong, if seeds were not fixed."""

_SMALLEST_CELL = 10.0
"""Expected counts below it are pooled: chi-square is the limit of large cells."""


def assert_drawn_from(sample: Iterable[Hashable], expected: Mapping[Hashable, float], what: str = "sample") -> None:
    """Assert that independent outcomes follow a distribution.

    Args:
        expected: probability of each outcome; an outcome that is not in it, or has probability 0, must not occur.
    """
    counts = Counter(sample)
    impossible = {outcome: count for outcome, count in counts.items() if not expected.get(outcome)}
    assert not impossible, f"{what}: outcomes of probability 0: {impossible}"
    statistic, num_cells = _pearson(counts, expected)
    p_value = chi2.sf(statistic, num_cells - 1) if num_cells > 1 else 1.0
    assert p_value >= FALSE_ALARM, f"{what}: chi-square {statistic:.1f} in {num_cells} cells, p = {p_value:.1e}"


def _pearson(counts: Counter[Hashable], expected: Mapping[Hashable, float]) -> tuple[float, int]:
    total = counts.total()
    cells = [(counts[outcome], float(prob) * total) for outcome, prob in expected.items() if prob]
    large = [cell for cell in cells if cell[1] >= _SMALLEST_CELL]
    small = [cell for cell in cells if cell[1] < _SMALLEST_CELL]
    if small:
        pooled = tuple(map(sum, zip(*small, strict=True)))
        large.append(pooled)
    return sum((observed - wanted) ** 2 / wanted for observed, wanted in large), len(large)
