"""Where the parts of a model are."""

import torch
from torch import nn
from transformers import PreTrainedModel


def num_processes(model: nn.Module) -> int:
    """Over how many processes transformers has split every layer (`tp_plan`); 1 for a model that is whole."""
    return getattr(model, "_tp_size", None) or 1


def home_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; the CPU for one that accelerate has offloaded (its hooks move them on)."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
