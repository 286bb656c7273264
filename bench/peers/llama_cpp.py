"""llama.cpp through the wheel `xllamacpp`, as configurations of a contest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.peers.contest import (
    LLAMA,
    Configuration,
    Sample,
    Task,
)
from specdec.bench.equality import Verdict

try:
    import xllamacpp
except ImportError:
    xllamacpp: ModuleType | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaKind:
    type_name: str
    """Of `common_speculative_type`, without its prefix."""
    parameters: str | None = None
    """Where in `CommonParams.speculative` its parameters are."""
    learns: bool = False
    """Keeps what it has seen from one request to the next."""


LLAMA_KINDS = {
    "plain": LlamaKind(type_name="NONE"),
    "draft": LlamaKind(type_name="DRAFT_SIMPLE", parameters="draft"),
    "ngram-simple": LlamaKind(type_name="NGRAM_SIMPLE", parameters="ngram_simple"),
    "ngram-mod": LlamaKind(type_name="NGRAM_MOD", parameters="ngram_mod", learns=True),
    "ngram-map-k": LlamaKind(type_name="NGRAM_MAP_K", parameters="ngram_map_k", learns=True),
    "ngram-map-k4v": LlamaKind(type_name="NGRAM_MAP_K4V", parameters="ngram_map_k4v", learns=True),
    "ngram-cache": LlamaKind(type_name="NGRAM_CACHE", learns=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFiles:
    target: Path | None
    draft: Path | None
    num_threads: int
    context_length: int


class LlamaServer:
    """One llama.cpp configuration in this process: `NAME` or `NAME:parameter=value:...`, such as `draft:n_max=8`."""

    def __init__(self, method: str, files: LlamaFiles) -> None:
        name, *assignments = method.split(":")
        self._kind = LLAMA_KINDS[name]
        self._params = llama_params(self._kind, dict(one.split("=", 1) for one in assignments), files)
        self._server = None

    def decode(self, task: Task, max_new_tokens: int) -> Sample:
        if self._server is None or self._kind.learns:
            self._server = None  # the old one goes first
            self._server = xllamacpp.Server(self._params)
        request = {
            "prompt": task.ids,
            "n_predict": max_new_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
        }
        start = time.perf_counter()
        reply = self._server.handle_completions(request)
        return from_reply(reply, time.perf_counter() - start, len(task.ids))


def llama_params(kind: LlamaKind, values: dict[str, str], files: LlamaFiles) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(files.target)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = files.context_length, 1, 0
    params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, 0
    speculative = params.speculative
    speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind.type_name}")]
    threaded = [params]
    if kind.type_name.startswith("DRAFT"):
        speculative.draft.mparams.path = str(files.draft)
        speculative.draft.n_gpu_layers = 0
        threaded.append(speculative.draft)
    for one in threaded:
        one.cpuparams.n_threads = one.cpuparams_batch.n_threads = files.num_threads
    for name, value in values.items():
        owner = getattr(speculative, kind.parameters or "", None)
        if not hasattr(owner, name):
            raise ValueError(f"llama.cpp's {kind.type_name} has no parameter {name!r}")
        setattr(owner, name, type(getattr(owner, name))(value))
    return params


def from_reply(reply: dict[str, Any], seconds: float, num_prompt: int) -> Sample:
    if "timings" not in reply:
        raise RuntimeError(f"llama.cpp answered {reply.get('error', reply)}")
    timings, usage = reply["timings"], reply["usage"]
    if (usage["prompt_tokens"], timings["cache_n"]) != (num_prompt, 0):
        raise RuntimeError(f"llama.cpp was given {num_prompt} tokens and read {usage} with {timings['cache_n']} cached")
    num_tokens = usage["completion_tokens"]
    return Sample(
        num_tokens=num_tokens,
        seconds=seconds,
        num_decoded=num_tokens - 1,
        decode_seconds=timings["predicted_ms"] / 1e3,
        num_drafted=timings.get("draft_n", 0),
        num_accepted=timings.get("draft_n_accepted", 0),
        output=reply["choices"][0]["text"],
    )


def llama_configurations(methods: str, files: LlamaFiles) -> Iterator[Configuration]:
    for method in methods.split(","):
        reason = llama_lacks(method.partition(":")[0], files)
        if reason is not None:
            yield Configuration(side=LLAMA, method=method, unavailable=reason)
        else:
            server = LlamaServer(method, files)
            yield Configuration(side=LLAMA, method=method, decode=server.decode, judge=same_text)


def llama_lacks(name: str, files: LlamaFiles) -> str | None:
    if xllamacpp is None:
        return "xllamacpp is not installed: pip install 'specdec-runtime[peers]'"
    if not hasattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{LLAMA_KINDS[name].type_name}"):
        return f"xllamacpp {xllamacpp.__version__} does not have it"
    if files.target is None:
        return "no GGUF file of the model: give it with --gguf"
    if name == "draft" and files.draft is None:
        return "no GGUF file of a draft model: give --draft or --draft-gguf"
    return None


def same_text(task: Task, output: str, plain: str) -> Verdict:
    return Verdict.IDENTICAL if output == plain else Verdict.DIFFERENT
