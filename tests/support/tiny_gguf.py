"""A tiny random GGUF file."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from tests.support.gguf_blocks import random_blocks

HIDDEN_SIZE = 32
FEED_FORWARD_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 2


def write_tiny_gguf(
    path: Path,
    *,
    context_length: int = 128,
    size: int = HIDDEN_SIZE,
    types: Mapping[str, str] | None = None,
    seed: int = 0,
    architecture: str = "llama",
    extra: str | None = None,
    rope_factors: np.ndarray | None = None,
) -> None:
    """A random Llama with a byte-level tokenizer of the printable ASCII characters.

    Args:
        size: of states; `FEED_FORWARD_SIZE` for the default, and as large for others, whose heads are of 32.
        types: of matrices, by the beginning of their names in a layer; all others are Q4_K. None: all are floats.
        extra: the name of a further tensor.
    """
    num_heads = NUM_HEADS if size == HIDDEN_SIZE else size // 32
    tokens = [chr(code) for code in range(33, 127)] + ["th", "Ġ", "<|end|>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context_length)
    writer.add_embedding_length(size)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(max(size, FEED_FORWARD_SIZE))
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size // num_heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_eos_token_id(len(tokens) - 1)
    _add_tiny_tensors(writer, len(tokens), size, types, seed)
    if extra is not None:
        writer.add_tensor(extra, np.zeros((4, size), dtype=np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tiny_tensors(
    writer: gguf.GGUFWriter, vocab_size: int, size: int, types: Mapping[str, str] | None, seed: int
) -> None:
    inner = max(size, FEED_FORWARD_SIZE)
    shapes = {"token_embd": (vocab_size, size), "output_norm": (size,)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"blk.{layer}.{norm}": (size,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{part}": (size, size) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{part}": (inner, size) for part in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (size, inner)
    random = np.random.default_rng(seed)
    for number, (name, shape) in enumerate(shapes.items()):
        if types is None or len(shape) == 1:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
            continue
        part = name.rpartition(".")[2]
        kind = next((kind for beginning, kind in types.items() if part.startswith(beginning)), "Q4_K")
        if kind in ("F16", "F32", "Q2_K"):
            block_type = gguf.GGMLQuantizationType[kind]
            num_values, num_bytes = gguf.GGML_QUANT_SIZES[block_type]
            rows = np.zeros((shape[0], shape[1] // num_values * num_bytes), dtype=np.uint8)
        else:
            blocks = random_blocks(kind, *shape, seed=seed * 1000 + number, largest=0.15)
            rows, block_type = blocks.rows, blocks.block_type
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=block_type)
