"""Step-level routing: the draft writes reasoning steps, and the target those that a router gives to it. Lossy."""

from specdec.routing.endpoint import Endpoint
from specdec.routing.loop import StepLoop
from specdec.routing.start import RoutedCall, Routing, stand_in

__all__ = ["Endpoint", "RoutedCall", "Routing", "StepLoop", "stand_in"]
