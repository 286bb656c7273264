"""The model's own first layers draft. The demo model has a trained exit; other models draft with their own head."""

import sys

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
inputs = tokenizer("Explain in one sentence why the sky is blue.", return_tensors="pt")
options = {**inputs, "max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
out = specdec.generate(model, **options, drafter=specdec.drafters.EarlyExit())
print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
print(f"drafted {out.stats.num_drafted}, accepted {out.stats.num_accepted} in {out.stats.num_rounds} rounds")
