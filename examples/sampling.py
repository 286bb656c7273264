"""Sampling that can be repeated: the seed is in a generator of your own, not in torch's global one."""

import sys

import torch

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
inputs = tokenizer("The colours of the rainbow are", return_tensors="pt")
options = {**inputs, "max_new_tokens": 16, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
drafter = specdec.drafters.PromptLookup()
first, again, other = (
    specdec.generate(model, **options, drafter=drafter, generator=torch.Generator().manual_seed(seed))
    for seed in (1, 1, 2)
)
print(tokenizer.decode(first[0], skip_special_tokens=True))
print(f"the same seed says the same: {first.equal(again)}; another seed: {first.equal(other)}")
