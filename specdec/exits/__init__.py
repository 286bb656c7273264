"""Early exits for ordinary checkpoints (`docs/exits.md`).

module.py     Exit, and the file that holds exits
shipped.py    the exits that come with the package
collect.py    the model writes what exits are trained on
openings.py   how its questions begin
training.py   the loss, and a trainer that can be interrupted
layerskip.py  another way: a whole model is trained to exit early
report.py     acceptance on held-out text, and what it is worth
work.py       unfinished work on disk
run.py        collect, train, report: the work of `specdec train-exits`
"""

from specdec.exits.module import Exit, load_exits, save_exits

__all__ = ["Exit", "load_exits", "save_exits"]
