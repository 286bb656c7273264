"""Small questions to transformers, its models and the hub: what versions call the cache, where a model's parts are.

Calls of models say `**{CACHE: cache}`, outputs and prepared arguments are read by `[CACHE]`: 5.24 takes the old name
too, but warns of it.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers import PreTrainedModel

CACHE: Final = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"

STATES: Final = "cache_params"
"""What models without attention call it (Mamba)."""


def cache_name(model: PreTrainedModel) -> str:
    """By which the model's forward takes its cache."""
    return STATES if STATES in inspect.signature(model.forward).parameters else CACHE


def with_cache_named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate()` call, the cache under the installed transformers' name; callers may use either.

    Raises:
        ValueError: there is a cache under both names.
    """
    caches = [arguments[name] for name in ("past_key_values", "cache") if arguments.get(name) is not None]
    if len(caches) > 1:
        raise ValueError("cache= and past_key_values= are two names of one argument: pass one of them")
    others = {name: value for name, value in arguments.items() if name not in ("past_key_values", "cache")}
    return {**others, CACHE: caches[0]} if caches else others


def num_processes(model: nn.Module) -> int:
    """Over how many processes transformers has split every layer (`tp_plan`); 1 for a model that is whole."""
    return getattr(model, "_tp_size", None) or 1


def home_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; the CPU for one that accelerate has offloaded (its hooks move them on)."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def is_hub_reachable() -> bool:
    """Whether the hub's host has an address, or a proxy that would know it: without one the hub's client tries again
    for half a minute and more before it looks into its cache."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or address.scheme)
    except OSError:
        return False
    return True
