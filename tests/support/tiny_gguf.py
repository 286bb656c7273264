"""A tiny random GGUF file."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN_SIZE = 32
FEED_FORWARD_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 2


def write_tiny_gguf(path: Path, *, context_length: int = 128) -> None:
    """A random Llama with a byte-level tokenizer of the printable ASCII characters."""
    tokens = [chr(code) for code in range(33, 127)] + ["th", "Ġ", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context_length)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD_SIZE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN_SIZE // NUM_HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_eos_token_id(len(tokens) - 1)
    _add_tiny_tensors(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tiny_tensors(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    shapes = {"token_embd": (vocab_size, HIDDEN_SIZE), "output_norm": (HIDDEN_SIZE,)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"blk.{layer}.{norm}": (HIDDEN_SIZE,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{part}": (HIDDEN_SIZE, HIDDEN_SIZE) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{part}": (FEED_FORWARD_SIZE, HIDDEN_SIZE) for part in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN_SIZE, FEED_FORWARD_SIZE)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
