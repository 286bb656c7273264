"""Where the parts of a model are."""

from torch import nn


def num_processes(model: nn.Module) -> int:
    """Over how many processes transformers has split every layer (`tp_plan`); 1 for a model that is whole."""
    return getattr(model, "_tp_size", None) or 1
