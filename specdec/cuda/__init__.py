"""CUDA graphs of a model's forwards: one launch in the place of a thousand. Not measured on a GPU yet.

`model.py` decides and fills the inputs, `arena.py` keeps the buffers that graphs read and write, `captured.py` is what
is captured, with the attention of `attention.py`; `functions.py` has graphs of what is made of the logits; `graphs.py`
captures and replays, with a stand-in for machines without a GPU; `timing.py` tells a device's time. Whatever does not
fit is done as everywhere else.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specdec.cuda.arena import Arena
from specdec.cuda.attention import can_attend
from specdec.cuda.early_exit import GraphedExitModel
from specdec.cuda.functions import GraphedFunctions
from specdec.cuda.graphs import graphs_for
from specdec.cuda.model import GraphedTreeModel, why_not, why_not_captured
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.model import TreeModel

__all__ = ["GraphedExitModel", "GraphedTreeModel", "describe", "exit_model_of", "functions_of", "tree_model_of"]


def tree_model_of(model: PreTrainedModel) -> TreeModel:
    """The tree model of a causal LM: with CUDA graphs where the model is on a GPU and they can be had."""
    return TreeModel(model) if why_not(model) else GraphedTreeModel(model)


def exit_model_of(model: PreTrainedModel, arena: Arena | None = None) -> EarlyExitModel:
    """The same of a model that drafts for itself.

    Args:
        arena: in the place of the model's own, for trials beside a run.
    """
    return EarlyExitModel(model) if why_not(model) else GraphedExitModel(model, arena)


def functions_of(target: TreeModel) -> GraphedFunctions | None:
    """Graphs of what is made of a target's logits; None where it has none."""
    return target.functions if isinstance(target, GraphedTreeModel) else None


def describe(model: PreTrainedModel | None = None) -> str:
    """A line for people: of this machine, or of what a model would have on a GPU."""
    if model is not None:
        reason = why_not_captured(model)
        return "CUDA graphs, tried before they are used" if reason is None else f"no CUDA graphs: {reason}"
    if graphs_for(torch.device("cuda")) is None:
        return "none: PyTorch sees no CUDA device"
    read = "used slots" if can_attend(torch.device("cuda")) else "all slots of a shape (no Triton)"
    return f"of forwards that come again, reading {read}, for models of attention, in full or in windows (not measured)"
