"""From what was asked for by name to what the harness runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.harness import Method, Settings, encode
from specdec.bench.methods import MethodSpec
from specdec.bench.peers import LLAMA_CPP, PeerSpec
from specdec.bench.peers.llama_cpp import LlamaCpp, LlamaFiles, find_gguf, llama_lacks
from specdec.bench.peers.transformers_modes import OwnGenerate
from specdec.bench.ranks import measure_ranks
from specdec.bench.routed import RouterSpec
from specdec.bench.running import Peer
from specdec.drafters import Auto, Drafter
from specdec.models.pair import LoadedPair
from specdec.specs import SEQUOIA, DrafterSpec
from specdec.suites import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What everyone decodes with. `llama`: what llama.cpp reads, if it is among the peers."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: PreTrainedModel | None = None
    draft_tokenizer: PreTrainedTokenizerBase | None = None
    llama: LlamaFiles | None = None

    @classmethod
    def of(cls, pair: LoadedPair, llama: LlamaFiles | None = None) -> Models:
        target, draft = pair
        models = cls(target=target.model, tokenizer=target.tokenizer, llama=llama)
        return models if draft is None else replace(models, draft=draft.model, draft_tokenizer=draft.tokenizer)

    def drafter(self, spec: DrafterSpec) -> Drafter | str:
        tokenizers = None if self.draft_tokenizer is None else (self.draft_tokenizer, self.tokenizer)
        return spec.build(self.draft, tokenizers=tokenizers)


def build_methods(
    specs: Mapping[str, MethodSpec], models: Models, prompts: Sequence[Prompt], settings: Settings
) -> list[Method]:
    """One instance of each drafter, with its trees.

    Args:
        prompts: what Sequoia's acceptance is measured on, once for each drafter.
    """

    @cache
    def drafter_of(text: str) -> Drafter | str:
        return models.drafter(DrafterSpec.parse(text))

    @cache
    def acceptance_of(text: str) -> tuple[float, ...]:
        return measure_ranks(models.target, models.tokenizer, drafter_of(text), prompts, settings)

    methods = []
    for name, spec in specs.items():
        drafter = None if spec.drafter is None else drafter_of(spec.drafter.text)
        measured = {}
        if spec.drafter is not None and spec.tree is not None and spec.tree.kind == SEQUOIA:
            measured["acceptance"] = acceptance_of(spec.drafter.text)
        methods.append(Method(name, drafter, None if spec.tree is None else spec.tree.build(**measured)))
    return methods


def build_routed(specs: Sequence[RouterSpec], writer: DrafterSpec | None, models: Models) -> list[Method]:
    """A method for each router; the target's own writing takes what is quickest.

    Args:
        writer: who writes the steps that are kept.
    """
    if writer is None:
        return []
    drafter = models.drafter(writer)
    assert isinstance(drafter, Drafter)
    return [Method(spec.name, Auto(drafter), router=spec.build()) for spec in specs]


def build_peers(
    specs: Iterable[PeerSpec], models: Models, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Method]:
    """The peers as methods.

    Args:
        prompts: what llama.cpp needs room for, with `max_new_tokens` new ones.

    Raises:
        ValueError: a parameter that does not fit the model.
    """

    @cache
    def context_length() -> int:
        num_prompt = max(encode(models.tokenizer, [prompt])["input_ids"].shape[1] for prompt in prompts)
        return num_prompt + max_new_tokens

    def build(spec: PeerSpec) -> Peer:
        if spec.family != LLAMA_CPP:
            return OwnGenerate.in_mode(models.target, spec.mode, draft=models.draft, **spec.parameters)
        assert models.llama is not None
        room = {"num_threads": torch.get_num_threads(), "context_length": context_length()}
        return LlamaCpp(spec.mode, spec.parameters, models.llama, **room)

    return [Method(spec.text, peer=build(spec)) for spec in specs]


def llama_files(
    peers: Iterable[PeerSpec], *, model: str, draft: str | None, gguf: Path | None, draft_gguf: Path | None
) -> LlamaFiles | None:
    """What llama.cpp will read; None if it is not among the peers.

    Raises:
        ValueError: the package or a file is missing, or a file is given that nobody reads.
    """
    modes = [spec.mode for spec in peers if spec.family == LLAMA_CPP]
    if not modes:
        if gguf is not None or draft_gguf is not None:
            raise ValueError("--gguf and --draft-gguf are for --peers llama.cpp: add it, or leave them out")
        return None
    files = LlamaFiles(target=find_gguf(gguf, model), draft=find_gguf(draft_gguf, draft))
    for mode in modes:
        if (reason := llama_lacks(mode, files)) is not None:
            raise ValueError(reason)
    return files
