"""Which drafted nodes survive: pure functions of (draft tokens, q, p, generator). No model, no cache, no config.

`rules.py` has the four rules, `families.py` who is tested against whose q, `coins.py` all that is random,
`outcome.py` what is found.
"""

from specdec.acceptance.coins import draw
from specdec.acceptance.outcome import Acceptance, Accepted, HostAcceptance, to_host
from specdec.acceptance.rules import follow, topdown, traversal, walk

__all__ = [
    "Acceptance",
    "Accepted",
    "HostAcceptance",
    "draw",
    "follow",
    "to_host",
    "topdown",
    "traversal",
    "walk",
]
