"""specdec makes a Hugging Face causal LM decode faster without changing what it says.

out = specdec.generate(model, **inputs, max_new_tokens=256)      # everything model.generate() takes
specdec.enable(model)                                            # model.generate(...) is now accelerated
"""

from typing import TYPE_CHECKING, Any

from specdec.errors import (
    BatchError,
    CapacityError,
    DraftError,
    EndpointError,
    ModelError,
    NumericalError,
    ProcessError,
    SpecdecError,
    UnsupportedModelError,
    UnsupportedOptionError,
    WorkerError,
)

if TYPE_CHECKING:
    from specdec import drafters
    from specdec.decoding.stats import DecodingStats, SpeculativeOutput
    from specdec.generation import disable, enable, generate, last_stats
    from specdec.kernels import prepare, unprepare
    from specdec.routing.remote.endpoint import Endpoint

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "CapacityError",
    "DecodingStats",
    "DraftError",
    "Endpoint",
    "EndpointError",
    "ModelError",
    "NumericalError",
    "ProcessError",
    "SpecdecError",
    "SpeculativeOutput",
    "UnsupportedModelError",
    "UnsupportedOptionError",
    "WorkerError",
    "disable",
    "drafters",
    "enable",
    "generate",
    "last_stats",
    "prepare",
    "unprepare",
]

_LAZY = {
    "DecodingStats": "specdec.decoding.stats",
    "Endpoint": "specdec.routing.remote.endpoint",
    "SpeculativeOutput": "specdec.decoding.stats",
    "disable": "specdec.generation",
    "enable": "specdec.generation",
    "generate": "specdec.generation",
    "last_stats": "specdec.generation",
    "prepare": "specdec.kernels",
    "unprepare": "specdec.kernels",
}


def __getattr__(name: str) -> Any:
    """Load torch and transformers only when something needs them, so that `specdec --help` is quick."""
    from importlib import import_module

    if name == "drafters":
        return import_module("specdec.drafters")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
