"""A batch of prompts of different lengths. Rows stop where they would stop alone."""

import sys

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
tokenizer.padding_side = "left"
texts = ["one two three one two", "a b a b a", "red green blue red green blue red"]
inputs = tokenizer(texts, return_tensors="pt", padding=True)
out = specdec.generate(model, **inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
for text in tokenizer.batch_decode(out.sequences, skip_special_tokens=True):
    print(repr(text))
print(f"{out.stats.tokens_per_round:.2f} tokens per round")
