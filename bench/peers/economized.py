"""economize's drafters, as configurations of a contest: lookup, a draft model, an early exit, a trained head.

It attaches to a transformers model of its own, which has the weights of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.peers.contest import Configuration, Sample, Task
from specdec.bench.running import eos_ids
from specdec.specs import PLAIN
from specdec.testing.equality import Verdict, compare

ECONOMIZE = "economize"
TRAINED = "trained"
_MODES = ("plain", "lookup", "draft-model", "early-exit:LAYER", f"{TRAINED}:FOLDER")


def economize_configurations(
    methods: str, copied: Callable[[], PreTrainedModel], draft: str | None
) -> Iterator[Configuration]:
    """
    Args:
        methods: `MODE` or `MODE:ARGUMENT`, and `@N` for the tokens of a cycle, separated by commas.
        copied: makes a model that shares its weights with the others.
        draft: folder or hub id of a draft model.

    Raises:
        ValueError: an unknown mode.
    """
    try:
        economize: Any = import_module(ECONOMIZE)
    except ImportError:
        reason = f"{ECONOMIZE} is not installed: pip install {ECONOMIZE}"
        yield from (Configuration(side=ECONOMIZE, method=method, unavailable=reason) for method in methods.split(","))
        return
    for method in methods.split(","):
        text, _, cycle = method.partition("@")
        mode, _, argument = text.partition(":")
        if mode not in {known.partition(":")[0] for known in _MODES}:
            raise ValueError(f"unknown mode of economize {mode!r}; choose from: {', '.join(_MODES)}")
        if mode == "draft-model" and draft is None:
            yield Configuration(side=ECONOMIZE, method=method, unavailable="no draft model was given")
            continue
        decoding = economize.DecodeConfig(**{} if not cycle else {"cycle_length": int(cycle)})
        model = _attached(economize, copied(), mode, argument, draft, decoding)
        yield _configuration(method, model, copied())


def _attached(
    economize: Any, model: PreTrainedModel, mode: str, argument: str, draft: str | None, decoding: Any
) -> Any:
    def technique(module: str, name: str, **options: Any) -> Any:
        return getattr(import_module(f"{ECONOMIZE}.techniques.{module}"), name)(**options)

    if mode == TRAINED:
        return economize.load(model, argument, decoding=decoding)
    if mode == PLAIN:
        return economize.apply(model, decoding=economize.DecodeConfig(cycle_length=1))
    config = {
        "lookup": lambda: technique("lookup", "LookupConfig"),
        "draft-model": lambda: technique("draft_model", "DraftModelConfig", model=draft),
        "early-exit": lambda: technique("early_exit", "EarlyExitConfig", exit_layer=int(argument), head="shared"),
    }[mode]()
    return economize.apply(model, config, decoding=decoding)


def _configuration(method: str, model: Any, reference: PreTrainedModel) -> Configuration:
    ends = set(eos_ids(reference))

    def decode(task: Task, max_new_tokens: int) -> Sample:
        stamps: list[float] = []

        def is_over(tokens: Tensor) -> bool:
            """Called for every token that is committed."""
            stamps.append(perf_counter() - started)
            return int(tokens[-1]) in ends

        started = perf_counter()
        result = model.decode(torch.tensor(task.ids), max_new_tokens, stop=is_over)
        seconds = perf_counter() - started
        return Sample(
            num_tokens=len(result.tokens),
            seconds=seconds,
            num_decoded=sum(stamp > stamps[0] + _AT_ONCE_S for stamp in stamps),
            decode_seconds=stamps[-1] - stamps[0],
            num_drafted=sum(drafted for drafted, _ in result.acceptance),
            num_accepted=sum(accepted for _, accepted in result.acceptance),
            output=result.tokens.tolist(),
        )

    def judge(task: Task, output: list[int], plain: list[int]) -> Verdict:
        options = {"max_new_tokens": len(plain), "do_sample": False}
        return compare(reference, torch.tensor(task.ids), plain, output, options).verdict

    return Configuration(side=ECONOMIZE, method=method, decode=decode, judge=judge)


_AT_ONCE_S = 1e-3
"""Tokens of one commit are told one after the other, a forward takes longer."""
