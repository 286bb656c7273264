"""Arguments of a tree attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.cuda import attention
from specdec.cuda.seen import Seen

SHAPES = {
    "one token": (1, 4, 2, 1, 16, 128, [40]),
    "ragged": (3, 4, 1, 8, 16, 1024, [255, 256, 700]),
    "odd head": (2, 4, 2, 5, 20, 384, [300, 0]),
    "many queries": (1, 8, 2, 24, 16, 384, [200]),
    "windows": (2, 4, 2, 8, 16, 512, [300, 260]),
}


def given(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random arguments of a shape: rows, heads, heads of keys, new slots, head size, slots and lengths."""
    num_rows, num_heads, num_key_heads, width, size, num_slots, lengths = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    seen_BWK = torch.rand((num_rows, width, 64), generator=generator) < 0.4
    seen_BWK[:, torch.arange(width), torch.arange(width)] = True
    lengths_B = torch.tensor(lengths)
    firsts_BW = torch.arange(num_rows).unsqueeze(1) + torch.arange(width) * (name == "windows") * 40
    return {
        "queries_BQWD": normal(num_rows, width, num_heads, size).transpose(1, 2),
        "keys_BHSD": normal(num_rows, num_key_heads, num_slots, size),
        "values_BHSD": normal(num_rows, num_key_heads, num_slots, size),
        "seen": Seen(
            firsts_BW=torch.minimum(firsts_BW, lengths_B.unsqueeze(1)),
            lengths_B=lengths_B,
            bits_BW=attention.seen_bits(seen_BWK),
        ),
        "scale": size**-0.5,
        "num_slots": num_slots,
    }
