"""Tokens as they come, into a for loop, while the model decodes in another thread."""

import sys
from threading import Thread

from transformers import TextIteratorStreamer

import specdec
from specdec.models import load

model, tokenizer, _ = load(sys.argv[1] if len(sys.argv) > 1 else "demo")
inputs = tokenizer("Once upon a time", return_tensors="pt")
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600)
options = {**inputs, "max_new_tokens": 24, "do_sample": False, "streamer": streamer}
thread = Thread(target=specdec.generate, args=(model,), kwargs=options)
thread.start()
for text in streamer:
    print(text, end="", flush=True)
print()
thread.join()
