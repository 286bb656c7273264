"""Tiny random models on disk, with a byte-level tokenizer."""

from pathlib import Path

import torch

from specdec.testing import ByteTokenizer, tiny_model

torch.set_num_threads(1)


def save_tiny_model(folder: Path, *, hidden_size: int = 32, seed: int = 0, **tokenizer_settings: object) -> str:
    tokenizer = ByteTokenizer(**tokenizer_settings)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model("llama", seed=seed, hidden_size=hidden_size, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
