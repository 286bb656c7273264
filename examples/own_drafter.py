"""A drafter of your own: it bets that every token is followed by what followed it last."""

import sys
from itertools import pairwise

import specdec
from specdec.drafters import Drafter, DraftSession
from specdec.models import load
from trees import Draft, TokenTree, TreeBatch


class Bigrams(Drafter):
    def start(self, run):
        return BigramSession(run)


class BigramSession(DraftSession):
    def __init__(self, run):
        self.run = run

    def propose(self, max_depths):
        chains = []
        for tokens, depth in zip(self.run.sequences.tokens, max_depths, strict=True):
            follower, chain = dict(pairwise(tokens)), [tokens[-1]]
            while len(chain) <= min(depth, 4) and chain[-1] in follower:
                chain.append(follower[chain[-1]])
            chains.append(TokenTree.chain(chain[1:]))
        return Draft(trees=TreeBatch.stack(chains, self.run.device))


model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
inputs = tokenizer("one two three one two three one", return_tensors="pt")
options = {**inputs, "max_new_tokens": 24, "do_sample": False}
out = specdec.generate(model, **options, drafter=Bigrams(), return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(f"the same as model.generate(): {out.sequences.equal(model.generate(**options))}")
print(f"drafted {out.stats.num_drafted}, accepted {out.stats.num_accepted}")
