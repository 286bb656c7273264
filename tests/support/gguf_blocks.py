"""Random blocks of GGUF files."""

import gguf
import numpy as np

from specdec.kernels.model.gguf_modules import Blocks

_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where in a block of a type numbers of 16 bits stand; elsewhere only at its beginning."""


def random_blocks(name: str, num_rows: int, num_columns: int, *, seed: int = 0, largest: float = 1) -> Blocks:
    """Of weights that are at most `largest`, about."""
    block_type = gguf.GGMLQuantizationType[name]
    num_values, num_bytes = gguf.GGML_QUANT_SIZES[block_type]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_rows, num_columns // num_values, num_bytes), dtype=np.uint8)
    unscaled = gguf.dequantize(_with_scales(blocks, name, np.float16(1)), block_type)
    scales = (random.uniform(0.2, 1, blocks.shape[:2]) * largest / np.abs(unscaled).max()).astype(np.float16)
    return Blocks(rows=_with_scales(blocks, name, scales).reshape(num_rows, -1), block_type=block_type)


def _with_scales(blocks: np.ndarray, name: str, scales: np.ndarray | np.float16) -> np.ndarray:
    blocks = blocks.copy()
    for place in _HALVES.get(name, (0,)):
        halves = np.broadcast_to(scales, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = halves[..., None].view(np.uint8)
    return blocks
