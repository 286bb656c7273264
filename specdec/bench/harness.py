"""Measure: every method on every batch of prompts, repetitions interleaved, in one process."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.bench.equality import Comparison, compare
from specdec.bench.memory import PeakMemory
from specdec.bench.suite import Prompt
from specdec.compatibility import position_limit
from specdec.drafters import Drafter
from specdec.errors import SpecdecError
from specdec.prompting import encode_prompts
from trees import GrowthPolicy


@dataclass(frozen=True, slots=True)
class Method:
    """A way to generate: what `specdec.generate` takes; no drafter stands for the model's own `generate()`."""

    name: str
    drafter: Drafter | str | None
    tree: GrowthPolicy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    max_new_tokens: int = 64
    batch_size: int = 1
    repetitions: int = 3
    warmup: int = 1
    sample: bool = False
    temperature: float | None = None
    verify: str = "topdown"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if self.temperature is not None and not self.sample:
            raise ValueError("temperature needs sampling: greedy decoding has none")
        if self.verify != "topdown" and not self.sample:
            raise ValueError(f"verify={self.verify} needs sampling: greedy output is verified in one way only")

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample, **temperature}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One timed call on one batch.

    `tokens` are each row's new tokens, the end-of-sequence token among them; `token_seconds` holds for every
    one of them, in ascending order, when it was there, counted from the start of the call.
    """

    seconds: float
    tokens: list[list[int]]
    token_seconds: list[float]
    stats: "specdec.DecodingStats | None"
    peak_memory_mib: float | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """All repetitions of all methods on one batch. `comparisons`: one a prompt; none at all when sampling."""

    prompts: list[Prompt]
    runs: dict[str, list[Run]]
    comparisons: dict[str, list[Comparison]]

    @property
    def category(self) -> str:
        return self.prompts[0].category

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.runs))


class Harness:
    """Runs `methods` on one model; the first one is the reference that greedy outputs are compared with."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        methods: list[Method],
        settings: Settings,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._methods = methods
        self._settings = settings
        self._memory = PeakMemory(model.device)
        self._eos_ids = _eos_ids(model)
        self._pad_id = _pad_id(model)
        self._generation_kwargs = generation_kwargs(model, settings)

    def num_calls(self, prompts: list[Prompt]) -> int:
        """How often `run` will call `on_call`."""
        num_rounds = len(self._batches(prompts)) * self._settings.repetitions + self._settings.warmup
        return num_rounds * len(self._methods)

    def run(self, prompts: list[Prompt], on_call: Callable[[], None]) -> Iterator[BatchResult]:
        """Yield each batch's result when all its repetitions are done: those stay valid after Ctrl-C.

        Raises `ValueError` if a prompt does not fit into the context, `SpecdecError` if a method fails.
        """
        batches = [(batch, self._encode(batch)) for batch in self._batches(prompts)]
        for _ in range(self._settings.warmup):
            self._run_all(*batches[0], on_call)
        for batch, inputs in batches:
            repetitions = [self._run_all(batch, inputs, on_call) for _ in range(self._settings.repetitions)]
            runs = {method.name: [runs[method.name] for runs in repetitions] for method in self._methods}
            yield BatchResult(prompts=batch, runs=runs, comparisons=self._compare(inputs, runs))

    def _batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        size = self._settings.batch_size
        by_category = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.category)]
        return [group[start : start + size] for group in by_category for start in range(0, len(group), size)]

    def _encode(self, batch: list[Prompt]) -> BatchEncoding:
        inputs = encode_prompts(self._tokenizer, [prompt.text for prompt in batch])
        num_prompt, num_new = inputs["input_ids"].shape[1], self._settings.max_new_tokens
        limit = position_limit(self._model)
        if num_prompt + num_new > limit:
            raise ValueError(
                f"{_name(batch)} has {num_prompt} tokens; with {num_new} new ones that is more than the "
                f"{limit} positions of the model"
            )
        return inputs.to(self._model.device)

    def _run_all(self, batch: list[Prompt], inputs: BatchEncoding, on_call: Callable[[], None]) -> dict[str, Run]:
        runs = {}
        for method in self._methods:
            try:
                runs[method.name] = self._run(method, inputs)
            except Exception as error:
                raise SpecdecError(
                    f"{method.name} failed on {_name(batch)}: {type(error).__name__}: {error}"
                ) from error
            on_call()
        return runs

    def _run(self, method: Method, inputs: BatchEncoding) -> Run:
        torch.manual_seed(self._settings.seed)
        self._memory.reset()
        clock = _StepClock()
        if method.drafter is None:
            sequences = self._model.generate(**inputs, **self._generation_kwargs, streamer=clock)
            stats = None
        else:
            out = specdec.generate(
                self._model,
                **inputs,
                **self._generation_kwargs,
                drafter=method.drafter,
                tree=method.tree,
                verify=self._settings.verify,
                return_dict_in_generate=True,
            )
            assert isinstance(out, specdec.SpeculativeOutput)
            sequences, stats = out.sequences, out.stats
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = clock.seconds()
        tokens = [without_padding(row, self._eos_ids, self._pad_id) for row in new_ids]
        return Run(
            seconds=seconds,
            tokens=tokens,
            token_seconds=clock.token_seconds(tokens) if stats is None else stats.token_seconds,
            stats=stats,
            peak_memory_mib=self._memory.mib(),
        )

    def _compare(self, inputs: BatchEncoding, runs: dict[str, list[Run]]) -> dict[str, list[Comparison]]:
        if self._settings.sample:
            return {}
        first_run, *_ = runs[self._methods[0].name]
        prompts = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        return {
            name: [
                self._worst(prompts[row], first_run.tokens[row], [run.tokens[row] for run in repetitions])
                for row in range(len(prompts))
            ]
            for name, repetitions in runs.items()
        }

    def _worst(self, prompt_ids: torch.Tensor, reference: list[int], outputs: list[list[int]]) -> Comparison:
        comparisons = [
            compare(self._model, prompt_ids, reference, output, self._generation_kwargs) for output in outputs
        ]
        return max(comparisons, key=lambda comparison: comparison.verdict)


class _StepClock(BaseStreamer):
    """Stamps every step of transformers' own loop, which puts the prompt first and then one token a row."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stamps: list[float] = []

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def put(self, value: torch.Tensor) -> None:
        self._stamps.append(self.seconds())

    def end(self) -> None:
        pass

    def token_seconds(self, tokens: list[list[int]]) -> list[float]:
        _prompt, *steps = self._stamps
        return sorted(steps[index] for row in tokens for index in range(len(row)))


def without_padding(row: list[int], eos_ids: list[int], pad_id: int | None) -> list[int]:
    """The row up to and including its first end-of-sequence token, if nothing but padding follows it.

    Anything else after that token is a decoding error, which stays visible to the comparison.
    """
    end = next((index + 1 for index, token in enumerate(row) if token in eos_ids), len(row))
    return row[:end] if all(token == pad_id for token in row[end:]) else row


def generation_kwargs(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """What every method gets, the model's own `generate()` too."""
    return {**settings.generation_kwargs, "pad_token_id": _pad_id(model)}


def _eos_ids(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _pad_id(model: PreTrainedModel) -> int | None:
    """What `generate()` fills finished rows with."""
    pad_id = model.generation_config.pad_token_id
    return next(iter(_eos_ids(model)), None) if pad_id is None else pad_id


def _name(batch: list[Prompt]) -> str:
    what = "the prompt" if len(batch) == 1 else f"the batch of {len(batch)} that starts with the prompt"
    return f"{what} {batch[0].text[:50]!r} ({batch[0].category})"
