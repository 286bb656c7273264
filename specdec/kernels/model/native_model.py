"""What the native layers of one model share: whether all of them are native, and what one forward computes once."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from specdec.kernels.model.quantized_linear import QuantizedLinear

Key = TypeVar("Key")
Value = TypeVar("Value")


class Once(Generic[Key, Value]):
    """A function of an object that all layers of one forward share (mask, rotation): computed by the first layer."""

    def __init__(self, function: Callable[[Key], Value]) -> None:
        self._function = function
        self._last: tuple[Key, Value] | None = None

    def __call__(self, key: Key) -> Value:
        last = self._last
        if last is None or last[0] is not key:
            self._last = last = key, self._function(key)
        return last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function, "_last": None}


class NativeLayer(Protocol):
    """A layer's native forward."""

    def is_unchanged(self) -> bool:
        """Whether the layer is what it was when it was recognised."""

    def distrust(self) -> None:
        """Check at the next call, whatever its caller says."""


class NativeModel:
    """The native layers of a model of packed weights. They quantise activations, which is exact only while all of them
    are native: once one has changed (an adapter was put in), all go back to the model's own forward, and activations
    stay float32.

    Args:
        linears: all quantised ones of the model.
    """

    def __init__(self, linears: Sequence[QuantizedLinear]):
        self.layers: list[NativeLayer] = []
        self._linears = linears
        self._check = Once(self._is_unchanged)

    def is_native(self, forward: object) -> bool:
        """Whether all layers are unchanged; looked at by the first layer of a forward, which `forward` stands for."""
        if self._linears[0].weight_only:
            return False
        return self._is_unchanged(None) if forward is None else self._check(forward)

    def _is_unchanged(self, _: object) -> bool:
        if all(layer.is_unchanged() for layer in self.layers):
            return True
        for linear in self._linears:
            linear.weight_only = True
        for layer in self.layers:
            layer.distrust()
        return False
