"""Step-level routing: the draft writes reasoning steps, and the target those that a router gives to it. Lossy."""

from specdec.routing.loop import StepLoop
from specdec.routing.start import Routing

__all__ = ["Routing", "StepLoop"]
