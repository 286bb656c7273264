"""Trains what drafts from the target's states (`docs/heads.md`, `docs/exits.md`).

collect.py       the model writes what is trained on
openings.py      how its questions begin
corpus.py        batches of that text, with the model's states
recipes.py       how each kind is trained
initial.py       what heads start from; jumps.py: jump heads
trainer.py       what trainers share: steps that can be interrupted
exits.py         early exits
blocks.py        DSpark heads
chains.py        EAGLE-3 and jump heads and MTP layers
layerskip.py     another way: a whole model is trained to exit early
report.py        exits on held-out text, and what they are worth; head_report.py: heads
export.py        a head in the format of speculators
work.py          unfinished work on disk
run.py           collect, train, report: the work of `specdec train-head`
"""
