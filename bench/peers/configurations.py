"""specdec, transformers and llama.cpp, as configurations of a contest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from bench.peers.contest import Configuration, Sample, Task
from specdec.bench.harness import Harness, Method, Settings
from specdec.bench.peers import LLAMA_CPP, PeerSpec
from specdec.bench.peers.llama_cpp import LlamaCpp, LlamaFiles, llama_lacks
from specdec.bench.peers.transformers_modes import OwnGenerate
from specdec.specs import PLAIN, TRANSFORMERS, DrafterSpec
from specdec.testing.equality import Verdict, compare, compare_texts


def ours(side: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method) -> Configuration:
    def decode(task: Task, max_new_tokens: int) -> Sample:
        settings = Settings(max_new_tokens=max_new_tokens, repetitions=1, warmup=0)
        harness = Harness(model, tokenizer, [method], settings)
        result = next(harness.run([task.prompt]))
        return Sample.of(result.runs[method.name][0])

    def judge(task: Task, output: list[int], plain: list[int]) -> Verdict:
        options = {"max_new_tokens": len(plain), "do_sample": False}
        return compare(model, torch.tensor(task.ids), plain, output, options).verdict

    return Configuration(side=side, method=method.name, decode=decode, judge=judge)


def transformers_modes(
    methods: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: PreTrainedModel | None
) -> Iterator[Configuration]:
    """transformers' own modes, on the weights as it loads them. Plain decoding, the reference, is always among them."""
    for method in dict.fromkeys((PLAIN, *methods)):
        spec = PeerSpec.parse(f"{TRANSFORMERS}/{method}")
        if spec.needs_draft and draft is None:
            yield Configuration(side=TRANSFORMERS, method=method, unavailable="no --draft was given")
        else:
            peer = OwnGenerate.in_mode(model, spec.mode, draft=draft, **spec.parameters)
            yield ours(TRANSFORMERS, model, tokenizer, Method(method, peer=peer))


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same weights, so that what is done to it leaves the model itself as transformers made it."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())})


def prepared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The float kernels on the same weights."""
    return specdec.prepare(shared_copy(model))


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


def llama_configurations(
    methods: str, files: LlamaFiles, *, num_threads: int, context_length: int
) -> Iterator[Configuration]:
    for method in methods.split(","):
        spec = PeerSpec.parse(f"{LLAMA_CPP}/{method}")
        reason = llama_lacks(spec.mode, files)
        if reason is not None:
            yield Configuration(side=LLAMA_CPP, method=method, unavailable=reason)
        else:
            room = {"num_threads": num_threads, "context_length": context_length}
            yield llama(method, LlamaCpp(spec.mode, spec.parameters, files, **room))


def llama(method: str, peer: LlamaCpp) -> Configuration:
    return Configuration(
        side=LLAMA_CPP,
        method=method,
        decode=lambda task, max_new_tokens: Sample.of(peer.complete(task.ids, max_new_tokens)),
        judge=lambda _, output, plain: compare_texts(plain, output).verdict,
    )
