"""Trains early exits (`docs/exits.md`).

collect.py    the model writes what exits are trained on
openings.py   how its questions begin
training.py   the loss, and a trainer that can be interrupted
layerskip.py  another way: a whole model is trained to exit early
report.py     acceptance on held-out text, and what it is worth
work.py       unfinished work on disk
run.py        collect, train, report: the work of `specdec train-exits`
"""
