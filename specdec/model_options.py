"""How models are loaded. Knows nothing of torch, so that commands can offer it before they have loaded anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DTYPES = ("float32", "bfloat16", "float16")
QuantizedWeights = Literal["int8", "int4"]
Weights = Literal["stock", "float", QuantizedWeights, "gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a target and its draft are loaded.

    Args:
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, the checkpoint's own elsewhere.
        device: anything `torch.device` takes, or "auto": the first CUDA device if there is one, else the CPU.
        threads: CPU threads for torch, process-wide; None leaves torch's setting alone.
        weights: "float": as loaded, in products that are quick for a few tokens on a CPU; "stock": in torch's own;
            "int8", "int4": weights of 8 or 4 bits on a CPU ("int4" on a CUDA device too), which is another model than
            the float one; "gguf": the blocks of a .gguf file as they lie in it, on a CPU.
        trust_remote_code: run the Python code that comes with a model.

    Raises:
        ValueError: a value is none of these. Whether there is such a device shows when a model is loaded.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    weights: Weights = "float"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype {self.dtype!r} is unknown; give 'auto' or one of {', '.join(map(repr, DTYPES))}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights {self.weights!r} is unknown; give one of {', '.join(get_args(Weights))}")
        if self.weights == "gguf" and (self.dtype not in ("auto", "float32") or self.device not in ("auto", "cpu")):
            raise ValueError(
                "weights 'gguf' are executed on a CPU, with all else in float32: leave dtype and device out"
            )
