"""Which linears a model's code reads the weights of, instead of calling them: routers that cast their input to the
weight's dtype, or multiply by hand. Those have to stay what they are.

It is tried with a forward of a few tokens; where a linear is not reached, or the trial fails, the source is asked.
"""

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_NUM_TOKENS = 3


class _Watched(nn.Linear):
    """Notes in `__dict__` whether it is called, and whether anybody else asks for its weight."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.__dict__["_is_read"] = True
        return super().__getattr__(name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["_is_called"] = True
        return linear(input, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]


def read_by_others(model: nn.Module) -> set[nn.Linear]:
    """The linears of a model, of exactly that class, whose `weight` code other than their own reads.

    Costs a forward of three tokens without numbers (some need them), where the model is one of transformers.
    """
    linears = {module for module in model.modules() if type(module) is nn.Linear}
    with _watched(linears):
        _try(model)
        read = {module for module in linears if "_is_read" in module.__dict__}
        called = {module for module in linears if "_is_called" in module.__dict__}
    return read | set(_named_in_source(model, linears - called))


@contextmanager
def _watched(linears: set[nn.Linear]) -> Iterator[None]:
    for module in linears:
        module.__class__ = _Watched
    try:
        yield
    finally:
        for module in linears:
            module.__class__ = nn.Linear
    for module in linears:
        module.__dict__.pop("_is_read", None)
        module.__dict__.pop("_is_called", None)


@torch.no_grad()
def _try(model: nn.Module) -> None:
    """A forward, without numbers if it goes without: it would read all weights. Torch's random numbers stay as they
    are."""
    if not isinstance(model, PreTrainedModel):
        return
    try:
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        input_ids = (torch.arange(_NUM_TOKENS) + 1).unsqueeze(0) * 7919 % vocab_size
        with torch.random.fork_rng(devices=[]):
            try:
                _forward_without_numbers(model, input_ids)
            except Exception:  # what it computes depends on what it has computed
                model(input_ids=input_ids, use_cache=False)
    except Exception as error:
        _log.debug("%s failed a trial forward: its source says which weights are read", type(model).__name__)
        _log.debug("the trial's error", exc_info=error)


def _forward_without_numbers(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """With a mask of four dimensions, which is used as it is: one of two is looked into."""
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, dtype=model.dtype, device="meta")
    given = {"input_ids": input_ids.to("meta"), "attention_mask": mask, "use_cache": False}
    functional_call(model, tensors, kwargs=given)


def _named_in_source(model: nn.Module, linears: set[nn.Linear]) -> Iterator[nn.Linear]:
    """Those of the linears of which the class around them says `name.weight`."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child in linears and re.search(rf"\b{re.escape(name)}\.weight\b", _source(type(parent))):
                assert isinstance(child, nn.Linear)
                yield child


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # made at run time, or in a notebook
        return ""
