"""`run_batch` in a process of its own, which a test kills."""

from pathlib import Path

import torch

from specdec.batch import Settings, Worker, run_batch
from specdec.drafters import PromptLookup
from specdec.testing import ByteTokenizer, tiny_model

SETTINGS = Settings(max_new_tokens=24)


def make_worker() -> Worker:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Worker(model, tokenizer, drafter=PromptLookup(min_match=1), max_rows=2)


def answer_file(source: str, output: str) -> None:
    torch.set_num_threads(1)
    run_batch(Path(source), Path(output), make_worker, SETTINGS)
