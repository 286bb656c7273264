"""Early exits for ordinary checkpoints (`docs/exits.md`): `specdec.training.heads` makes them.

module.py     Exit, and the file that holds exits
shipped.py    the exits that come with the package
"""

from specdec.exits.module import Exit, load_exits, save_exits

__all__ = ["Exit", "load_exits", "save_exits"]
