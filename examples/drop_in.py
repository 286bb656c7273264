"""Drop-in: the same arguments and the same tokens as model.generate(), and what the drafts were worth."""

import sys

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
inputs = tokenizer("def area(width, height):\n    return width * height\n\ndef perimeter(", return_tensors="pt")
out = specdec.generate(model, **inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
plain = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(f"the same as model.generate(): {out.sequences.equal(plain)}")
print(out.stats)
