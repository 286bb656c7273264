"""The errors that specdec raises on purpose.

SpecdecError
├── ModelError              a model cannot be found, fetched or read
├── UnsupportedModelError   a model that cannot be decoded exactly (also a ValueError)
├── UnsupportedOptionError  a generate() option that is refused (also a ValueError)
├── DraftError              a drafter does not fit its target, or broke its contract (also a ValueError)
├── NumericalError          the target's logits are not numbers
└── CapacityError           an engine has no room for a request
"""


class SpecdecError(Exception):
    """Base of every error that specdec raises on purpose."""


class ModelError(SpecdecError):
    """A model cannot be found, fetched or read."""


class UnsupportedModelError(SpecdecError, ValueError):
    """The runtime cannot decode this architecture or configuration exactly."""


class UnsupportedOptionError(SpecdecError, ValueError):
    """A `generate()` option that is refused rather than silently dropped."""


class DraftError(SpecdecError, ValueError):
    """A drafter does not fit its target, or broke its contract."""


class NumericalError(SpecdecError):
    """The target's logits are not numbers."""


class CapacityError(SpecdecError):
    """An engine has no room for a request: its queue is full, or the request would never fit into its memory."""
