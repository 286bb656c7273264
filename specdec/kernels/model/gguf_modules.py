"""The linears and the embedding of a model whose weights are a GGUF file's blocks.

Shape letters: M rows, K inputs, N outputs, V tokens, C channels.
"""

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from specdec.kernels.model.quantized_linear import QuantizedLinear

BLOCK_TYPES = frozenset(
    gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)
"""What a linear takes, see `native/gguf.h`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A matrix as it lies in a file.

    Args:
        rows: uint8 [rows, bytes of a row], without gaps; may be mapped.
        block_type: of BLOCK_TYPES, or a type of floats.
    """

    rows: npt.NDArray[np.uint8]
    block_type: gguf.GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, int]:
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[self.block_type]
        return self.rows.shape[0], self.rows.shape[1] // num_bytes * num_values

    def take(self, rows_N: torch.Tensor) -> "Blocks":
        """Copies of some rows."""
        return Blocks(rows=self.rows[rows_N.numpy()], block_type=self.block_type)

    def floats(self) -> torch.Tensor:
        """float32, [rows, columns]."""
        return torch.from_numpy(np.array(gguf.dequantize(self.rows, self.block_type), dtype=np.float32))


class GgufLinear(QuantizedLinear):
    """Blocks, repacked once for the native product. Torch makes float weights of them for every product.

    K-quants' scales, products of two numbers in a file, are rounded to float16 for the native product.

    Args:
        blocks: [N, K].
        bias_N: float32 [N].
        rows_N: int64 [N], the row of `blocks` that each output is; None: in their order.

    Raises:
        OverflowError: a scale is beyond float16, or no number.
    """

    weights = "gguf"
    blocks: Blocks

    def __init__(self, blocks: Blocks, bias_N: torch.Tensor | None = None, rows_N: torch.Tensor | None = None):
        n, k = blocks.shape
        self._begin(n, k, bias_N)
        self.block_type = blocks.block_type
        self.register_buffer("scale", None, persistent=False)
        if self.library:
            packed, self.bits = self.library.repack(blocks.block_type, blocks.rows, rows_N, n, k)
            self.register_buffer("packed", packed, persistent=False)
        else:
            self.bits = 0
            self.blocks = blocks.take(torch.arange(n) if rows_N is None else rows_N)

    def _torch_product(self, x_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_MK, self.blocks.floats())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.block_type.name}"


class GgufEmbedding(nn.Module):
    """An `nn.Embedding` whose rows become floats as they are looked up. Inference only.

    Args:
        blocks: [V, C]; if they are mapped, nothing else is ever read of the file.
    """

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks = blocks
        self.num_embeddings, self.embedding_dim = blocks.shape

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.numel() and input_ids.min() < 0:
            raise IndexError("a token id is below zero")  # which numpy would count from the end
        return self.blocks.take(input_ids.flatten()).floats().view(*input_ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.blocks.block_type.name}"

    def __deepcopy__(self, memo: dict[int, object]) -> "GgufEmbedding":
        return self  # immutable, and possibly large: copies of a model share it

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError("the embedding of a model of weights='gguf' has no float weight: call it")
        return super().__getattr__(name)
