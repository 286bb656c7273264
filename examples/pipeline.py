"""A transformers pipeline, accelerated by one line."""

import sys

from transformers import pipeline

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
specdec.enable(model, drafter=specdec.drafters.PromptLookup())
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
(result,) = write("one two three one two three one", max_new_tokens=16, do_sample=False)
print(result["generated_text"])
specdec.disable(model)
