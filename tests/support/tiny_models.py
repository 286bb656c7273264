"""Tiny random models on disk, with a byte-level tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from specdec.testing import ByteTokenizer, tiny_model

torch.set_num_threads(1)


def save_tiny_model(folder: Path, *, hidden_size: int = 32, seed: int = 0, **tokenizer_settings: object) -> str:
    tokenizer = ByteTokenizer(**tokenizer_settings)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_model("llama", seed=seed, hidden_size=hidden_size, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


WORDS = tuple(f"{first}{second}" for first in "bdfgklmn" for second in ("a", "e", "i", "o", "u", "al", "en", "or"))
"""What the model of words says."""


def save_word_model(folder: Path) -> str:
    """A model whose text is legible: each token is one of `WORDS`. It never stops by itself."""
    specials = ["<|unk|>", "user:", "assistant:"]
    vocab = {word: index for index, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<|unk|>"))
    backend.pre_tokenizer = WhitespaceSplit()
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}assistant:"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<|unk|>", chat_template=template)
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama", vocab_size=len(vocab), max_position_embeddings=8192)
    model.generation_config.suppress_tokens = list(range(len(specials)))
    model.save_pretrained(folder)
    return str(folder)
