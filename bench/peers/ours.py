"""specdec and transformers, as configurations of a contest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from bench.peers.contest import (
    Configuration,
    Sample,
    Task,
)
from specdec.bench.equality import Verdict, compare
from specdec.bench.harness import Harness, Method, Run, Settings
from specdec.bench.methods import DrafterSpec


def ours(side: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method) -> Configuration:
    def decode(task: Task, max_new_tokens: int) -> Sample:
        settings = Settings(max_new_tokens=max_new_tokens, repetitions=1, warmup=0)
        harness = Harness(model, tokenizer, [method], settings)
        result = next(harness.run([task.prompt], on_call=lambda: None))
        return from_run(result.runs[method.name][0])

    def judge(task: Task, output: list[int], plain: list[int]) -> Verdict:
        options = {"max_new_tokens": len(plain), "do_sample": False}
        return compare(model, torch.tensor(task.ids), plain, output, options).verdict

    return Configuration(side=side, method=method.name, decode=decode, judge=judge)


def from_run(run: Run) -> Sample:
    first, last = run.token_seconds[0], run.token_seconds[-1]
    return Sample(
        num_tokens=run.num_tokens,
        seconds=run.seconds,
        num_decoded=sum(stamp > first for stamp in run.token_seconds),
        decode_seconds=last - first,
        num_drafted=run.stats.num_drafted if run.stats else 0,
        num_accepted=run.stats.num_accepted if run.stats else 0,
        output=run.tokens[0],
    )


def prepared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The float kernels on the same weights, so that the model itself stays as transformers made it."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return specdec.prepare(copy.deepcopy(model, shared))


def drafted_by(
    side: str,
    methods: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedModel | None,
) -> Iterator[Configuration]:
    for spec in map(DrafterSpec.parse, methods.split(",")):
        if spec.needs_draft and draft is None:
            yield Configuration(side=side, method=spec.text, unavailable="no --draft was given")
        else:
            yield ours(side, model, tokenizer, Method(spec.text, spec.build(draft)))
