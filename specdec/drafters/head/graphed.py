"""A `HeadRunner` whose steps are replayed on a GPU: the head's own forward, captured with static inputs.

Embeddings and LM head, which may be the target's, stay outside, so that a graph knows of no weights but the head's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from specdec.cuda.captured import Inputs, Shape, attending, run_static
from specdec.cuda.graphs import Outputs
from specdec.cuda.model import GraphedTreeModel, has_windows, why_not
from specdec.drafters.head.network import HeadNetwork
from specdec.drafters.head.runner import FED_BACK, HeadRunner
from specdec.hf import CACHE
from specdec.tree_model.layer_views import Layers
from specdec.tree_model.model import TreeModel


class GraphedHeadRunner(HeadRunner, GraphedTreeModel):
    """Steps that come again in one shape are replayed, the others run as in a `HeadRunner`."""

    def __init__(self, head: HeadNetwork, target: TreeModel):
        super().__init__(head, target)
        self._run_static = _step_of(head)

    def _kept_of(self, layers: Layers) -> tuple[int, ...]:
        return (FED_BACK,)

    def _fill(
        self,
        shape: Shape,
        tokens_BT: Tensor,
        offsets_BT: Tensor,
        seen_BTK: Tensor | None,
        hidden: Sequence[Tensor] = (),
    ) -> Inputs:
        return super()._fill(shape, tokens_BT, offsets_BT, seen_BTK, [self._forward.embed(tokens_BT), *hidden])


def runner_of(head: HeadNetwork, target: TreeModel) -> HeadRunner:
    """With CUDA graphs where the head is on a GPU and they can be had."""
    # what a head's layer sees may be told by its mask alone, which no graph reads
    has_graphs = why_not(head) is None and not has_windows(head)
    return GraphedHeadRunner(head, target) if has_graphs else HeadRunner(head, target)


def _step_of(head: HeadNetwork) -> Callable[[Inputs, Cache, Shape], Outputs]:
    """What the LM head reads, and what is fed back; it does not keep the head, which graphs belong to."""
    known = weakref.ref(head)

    def run(inputs: Inputs, cache: Cache, shape: Shape) -> Outputs:
        head = known()
        assert head is not None, "the graphs have outlived their head"
        embeds_BWC, *states = inputs.hidden
        given: dict[str, Any] = {"position_ids": inputs.positions_BW, CACHE: cache}
        given |= {"embeds_BTC": embeds_BWC, "states_BTC": states[0] if states else None}
        output = run_static(attending(head, shape), given, inputs, shape, len(cache.layers))
        return output.normed_BTC, output.states_BTC

    return run
