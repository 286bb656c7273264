"""llama.cpp in this process, through the wheel `xllamacpp` (the extra `peers`).

It reads a GGUF file, so its weights are others than the target's, and its text is compared with its own plain decoding.
It gets the same token ids and limit, decodes greedily on the same number of CPU threads and stops at the
end-of-sequence token. A server holds one kind of speculation; the n-gram maps learn from earlier requests, so those
get a new server for every call, outside the timed part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from transformers import BatchEncoding

from specdec.bench.peers import DRAFT, LLAMA_CPP, PLAIN
from specdec.bench.running import Peer, PeerCounts, Run

try:
    xllamacpp: Any = import_module("xllamacpp")
except ImportError:
    xllamacpp = None


_MARGIN = 128
"""Tokens of context beyond the longest prompt and its answer: drafts go past the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    type_name: str
    """Of `common_speculative_type`, without its prefix."""
    parameters: str | None = None
    """Where in `CommonParams.speculative` its parameters are."""
    learns: bool = False
    """Keeps what it has seen from one request to the next."""


_KINDS = {
    PLAIN: _Kind(type_name="NONE"),
    DRAFT: _Kind(type_name="DRAFT_SIMPLE", parameters="draft"),
    "ngram-simple": _Kind(type_name="NGRAM_SIMPLE", parameters="ngram_simple"),
    "ngram-mod": _Kind(type_name="NGRAM_MOD", parameters="ngram_mod", learns=True),
    "ngram-map-k": _Kind(type_name="NGRAM_MAP_K", parameters="ngram_map_k", learns=True),
    "ngram-map-k4v": _Kind(type_name="NGRAM_MAP_K4V", parameters="ngram_map_k4v", learns=True),
    "ngram-cache": _Kind(type_name="NGRAM_CACHE", learns=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFiles:
    """What llama.cpp reads. None: there is no such file."""

    target: Path | None
    draft: Path | None


class LlamaCpp(Peer):
    """One mode of llama.cpp.

    Args:
        parameters: of its speculation, under llama.cpp's own names.
        context_length: room for the longest prompt and its answer.
    """

    family: ClassVar[str] = LLAMA_CPP
    has_own_weights: ClassVar[bool] = True
    settle_seconds: ClassVar[float] = 0.05

    def __init__(
        self,
        mode: str,
        parameters: Mapping[str, Any],
        files: LlamaFiles,
        *,
        num_threads: int,
        context_length: int,
    ) -> None:
        self._kind = _KINDS[mode]
        self._params = _params(self._kind, files, num_threads=num_threads, context_length=context_length + _MARGIN)
        for name, value in parameters.items():
            setattr(getattr(self._params.speculative, self._kind.parameters or ""), name, value)
        self._server: Any = None

    def lacks(self, *, batch_size: int, sample: bool) -> str | None:
        if sample:
            return "llama.cpp is compared in greedy decoding only"
        return "llama.cpp is asked for one prompt at a time" if batch_size > 1 else None

    def decode(self, inputs: BatchEncoding, generation_kwargs: dict[str, Any]) -> Run:
        """Raises `RuntimeError` with llama.cpp's own words."""
        (prompt_ids,) = inputs["input_ids"].tolist()
        return self.complete(prompt_ids, generation_kwargs["max_new_tokens"])

    def complete(self, prompt_ids: list[int], max_new_tokens: int) -> Run:
        """Continue one prompt; raises `RuntimeError` with llama.cpp's own words."""
        if self._server is None or self._kind.learns:
            self._server = None  # the old one goes first
            self._server = xllamacpp.Server(self._params)
        request = {
            "prompt": prompt_ids,
            "n_predict": max_new_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,
        }
        pieces: list[tuple[float, dict[str, Any]]] = []
        start = time.perf_counter()
        self._server.handle_completions(request, lambda piece: pieces.append((time.perf_counter() - start, piece)))
        seconds = time.perf_counter() - start
        return _to_run(pieces, seconds, len(prompt_ids), is_plain=self._kind is _KINDS[PLAIN])


def find_gguf(given: Path | None, source: str | None) -> Path | None:
    """The file that was named, else the source if it is one, else the one of the same name beside the folder."""
    if given is not None:
        if not given.is_file():
            raise ValueError(f"there is no file {given}")
        return given
    if source is None:
        return None
    if source == "demo":
        from specdec.models import pull_demo

        source = str(pull_demo())
    candidates = [Path(source), Path(source.rstrip("/") + ".gguf")]
    return next((path for path in candidates if path.suffix == ".gguf" and path.is_file()), None)


def llama_lacks(mode: str, files: LlamaFiles) -> str | None:
    """What keeps a mode from running here, and what to do about it; None if nothing does."""
    if xllamacpp is None:
        return "llama.cpp needs the package xllamacpp: pip install 'specdec-runtime[peers]'"
    if not hasattr(xllamacpp.common_speculative_type, _type_name(_KINDS[mode])):
        return f"xllamacpp {xllamacpp.__version__} does not have {mode}"
    if files.target is None:
        return "llama.cpp reads a GGUF file of the model: give it with --gguf"
    if mode == DRAFT and files.draft is None:
        return "llama.cpp drafts with a GGUF file: give it with --draft-gguf"
    return None


def describe(files: LlamaFiles) -> dict[str, Any]:
    """The wheel, what it was built with, and what it reads: part of the environment of a measurement."""
    return {
        "xllamacpp": xllamacpp and xllamacpp.__version__,
        "llama_cpp_features": xllamacpp and xllamacpp.get_system_info().strip(" |"),
        "gguf": files.target and files.target.name,
        "draft_gguf": files.draft and files.draft.name,
    }


def _type_name(kind: _Kind) -> str:
    return f"COMMON_SPECULATIVE_TYPE_{kind.type_name}"


def _params(kind: _Kind, files: LlamaFiles, *, num_threads: int, context_length: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(files.target)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context_length, 1, 0
    params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, 0
    speculative = params.speculative
    speculative.types = [getattr(xllamacpp.common_speculative_type, _type_name(kind))]
    threaded = [params]
    if kind.type_name.startswith("DRAFT"):
        speculative.draft.mparams.path = str(files.draft)
        speculative.draft.n_gpu_layers = 0
        threaded.append(speculative.draft)
    for one in threaded:
        one.cpuparams.n_threads = one.cpuparams_batch.n_threads = num_threads
    return params


def _to_run(pieces: list[tuple[float, dict[str, Any]]], seconds: float, num_prompt: int, *, is_plain: bool) -> Run:
    """From what was streamed: pieces of text, each with the number of tokens so far."""
    _, last = pieces[-1] if pieces else (seconds, {})
    if "timings" not in last or "usage" not in last:
        raise RuntimeError(f"llama.cpp answered {last.get('error', last)}")
    timings, usage = last["timings"], last["usage"]
    if (usage["prompt_tokens"], timings["cache_n"]) != (num_prompt, 0):
        raise RuntimeError(f"llama.cpp was given {num_prompt} tokens and read {usage} with {timings['cache_n']} cached")
    stamps: list[float] = []
    for stamp, piece in pieces:
        stamps += [stamp] * (piece["timings"]["predicted_n"] - len(stamps))
    counts = None if is_plain else _counts(timings, num_new=len(stamps))
    return Run(
        seconds=seconds,
        tokens=[],
        token_seconds=stamps if counts is None else _commits(stamps, counts.num_rounds or 0),
        text="".join(piece["choices"][0]["text"] for _, piece in pieces),
        peer_counts=counts,
    )


def _counts(timings: dict[str, Any], *, num_new: int) -> PeerCounts:
    """Every round commits what it accepts and one token more; the prefill yields the first. No draft, no entry."""
    num_accepted = timings.get("draft_n_accepted", 0)
    return PeerCounts(
        num_new_tokens=num_new,
        num_rounds=num_new - 1 - num_accepted,
        num_committed=num_new - 1,
        num_accepted=num_accepted,
        num_drafted=timings.get("draft_n", 0),
        target_forwards=num_new - num_accepted,
    )


def _commits(stamps: list[float], num_rounds: int) -> list[float]:
    """The tokens of a round are sent one by one, microseconds apart: all get the stamp of the first of them.

    The longest gaps are the rounds, whose number is known.
    """
    gaps = sorted(range(1, len(stamps)), key=lambda index: stamps[index] - stamps[index - 1])
    starts = {0, *gaps[len(gaps) - num_rounds :]}
    committed: list[float] = []
    for index, stamp in enumerate(stamps):
        committed.append(stamp if index in starts else committed[-1])
    return committed
