"""The errors that specdec raises on purpose.

SpecdecError
├── ModelError              a model cannot be found, fetched or read
├── UnsupportedModelError   a model that cannot be decoded exactly (also a ValueError)
├── UnsupportedOptionError  a generate() option that is refused (also a ValueError)
├── DraftError              a drafter does not fit its target, or broke its contract (also a ValueError)
├── ProcessError            another of the processes that share a model has failed
├── BatchError              a line of a batch, its input or its output cannot be used (also a ValueError)
├── WorkerError             what answers the lines of a batch cannot go on
├── NumericalError          the target's logits are not numbers
├── CapacityError           an engine has no room for a request
└── EndpointError           a remote endpoint cannot be reached, refuses, or answers what cannot be read
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from transformers.generation import GenerateDecoderOnlyOutput


class SpecdecError(Exception):
    """Base of every error that specdec raises on purpose."""


class ModelError(SpecdecError):
    """A model cannot be found, fetched or read."""


class UnsupportedModelError(SpecdecError, ValueError):
    """The runtime cannot decode this architecture or configuration exactly."""


class UnsupportedOptionError(SpecdecError, ValueError):
    """A `generate()` option that is refused rather than silently dropped.

    Attributes:
        prompt_is_streamed: the call's streamer, if it has one, was given the prompt before the refusal.
    """

    prompt_is_streamed = False


class DraftError(SpecdecError, ValueError):
    """A drafter does not fit its target, or broke its contract."""


class ProcessError(SpecdecError):
    """Another of the processes that share a model has failed."""


class BatchError(SpecdecError, ValueError):
    """A line of a batch cannot be answered, or its files cannot be used."""


class WorkerError(SpecdecError):
    """What answers the lines of a batch, here or on a cluster, cannot begin or go on: no line is at fault."""


class NumericalError(SpecdecError):
    """The target's logits are not numbers."""


class CapacityError(SpecdecError):
    """An engine has no room for a request: its queue is full, or the request would never fit into its memory."""


class EndpointError(SpecdecError):
    """A remote endpoint cannot be reached, refuses, or answers what cannot be read.

    Args:
        endpoint: which one, a `specdec.Endpoint`.
        trouble: what happened, in its own words where it has some.
        is_final: whether to ask once more is pointless.

    Attributes:
        partial: what the call had generated until then, a `specdec.SpeculativeOutput`; None if it had not begun to.
    """

    def __init__(self, endpoint: Any, trouble: str, *, is_final: bool = True):
        super().__init__(f"{endpoint}: {trouble}")
        self.endpoint = endpoint
        self.is_final = is_final
        self.partial: GenerateDecoderOnlyOutput | None = None
