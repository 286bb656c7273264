"""A tree policy of your own, for a draft model: a few children of the root, then chains while they are likely."""

import sys

import specdec
from specdec.models import load
from trees import GrowthPolicy
from trees.layered import ChildByChildGrower


class Broom(GrowthPolicy):
    def start(self, round_):
        return BroomGrower(round_)


class BroomGrower(ChildByChildGrower):
    def wants(self, slot, value):
        return len(slot.taken) < (3 if slot.parent is None else 1) and value > 0.02


model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
draft = load(sys.argv[2]).model if len(sys.argv) > 2 else model  # a smaller model of the same tokenizer
inputs = tokenizer("one two three one two three one", return_tensors="pt")
options = {**inputs, "max_new_tokens": 24, "do_sample": False}
out = specdec.generate(model, **options, drafter=draft, tree=Broom(), return_dict_in_generate=True)
print(f"the same as model.generate(): {out.sequences.equal(model.generate(**options))}")
print(f"{out.stats.mean_size:.1f} nodes a round, {out.stats.tokens_per_round:.2f} tokens per round")
