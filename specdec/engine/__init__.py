"""The decoding loop as an engine: requests join and leave the batch between rounds."""

from specdec.engine.adapters import LoraEngine, check_adapters, load_adapters
from specdec.engine.engine import Engine
from specdec.engine.request import Generation, GenerationStats, Request, RoundReport, TokenLogprobs
from specdec.engine.thread import EngineThread
from specdec.errors import CapacityError

__all__ = [
    "CapacityError",
    "Engine",
    "EngineThread",
    "Generation",
    "GenerationStats",
    "LoraEngine",
    "Request",
    "RoundReport",
    "TokenLogprobs",
    "check_adapters",
    "load_adapters",
]
