"""Step-level routing: the draft writes reasoning steps, and the target those that a router gives to it. Lossy."""

from specdec.routing.loop import StepLoop
from specdec.routing.options import check_routed, check_writer
from specdec.routing.remote.endpoint import Endpoint
from specdec.routing.start import RoutedCall, Routing, as_routing, local_model

__all__ = ["Endpoint", "RoutedCall", "Routing", "StepLoop", "as_routing", "check_routed", "check_writer", "local_model"]
