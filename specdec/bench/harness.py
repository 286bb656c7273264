"""Measure: every method on every batch of prompts, repetitions interleaved, in one process."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from routers import Router
from specdec.bench.memory import PeakMemory
from specdec.bench.peers.transformers_modes import OwnGenerate
from specdec.bench.running import Peer, Run, decode, pad_id
from specdec.drafters import Drafter
from specdec.errors import SpecdecError
from specdec.suites import Prompt
from specdec.testing.equality import Comparison, compare, compare_texts
from specdec.text.prompting import encode_prompts
from specdec.tree_model.compatibility import position_limit
from trees import GrowthPolicy


@dataclass(frozen=True, slots=True)
class Method:
    """What `specdec.generate` takes, or a peer; without either it is the model's own `generate()`.

    With a router it is lossy, and compared with nobody.
    """

    name: str
    drafter: Drafter | str | None = None
    tree: GrowthPolicy | None = None
    peer: Peer | None = None
    router: Router | None = None


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
    without_penalty: bool = False
    """Leave the checkpoint's repetition penalty out: llama.cpp's looks at another window of tokens."""

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
        penalty = {"repetition_penalty": 1.0} if self.without_penalty else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample, **temperature, **penalty}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """All repetitions of all methods on one batch.

    `comparisons`: one a prompt; none at all when sampling. `references`: whom each of them was compared with; `peers`:
    the methods that are not specdec's.
    """

    prompts: list[Prompt]
    runs: dict[str, list[Run]]
    comparisons: dict[str, list[Comparison]]
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    peers: frozenset[str] = frozenset()
    settings: Settings = Settings()

    @property
    def category(self) -> str:
        return self.prompts[0].category

    @property
    def reference(self) -> str:
        """The method that the others are compared with, where they have no plain decoding of their own."""
        return next(iter(self.runs))


@dataclass(frozen=True, slots=True, kw_only=True)
class NotAvailable:
    """A peer that could not take part."""

    name: str
    batch_size: int
    max_new_tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that begins, or one that is over: with its `run`, unless it is a peer's that failed or takes no part."""

    method: str
    category: str
    is_warmup: bool
    is_over: bool = False
    run: Run | None = None


class Harness:
    """Runs `methods` on one model; the first one is the reference that greedy outputs are compared with.

    A peer that cannot take part, or that fails, is left out; `missing` says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        methods: list[Method],
        settings: Settings,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.settings = settings
        self._lacking = dict(_lacking(methods, settings))
        self._methods = [method for method in methods if method.name not in self._lacking]
        self._lossy = {method.name for method in methods if method.router is not None}
        self._references = dict(_references(self._methods))
        self._own_generate = OwnGenerate(model)
        self._settle_seconds = max((method.peer.settle_seconds for method in self._methods if method.peer), default=0.0)
        self._memory = PeakMemory(model.device)
        self._generation_kwargs = generation_kwargs(model, settings)

    @property
    def missing(self) -> list[NotAvailable]:
        size, length = self.settings.batch_size, self.settings.max_new_tokens
        return [
            NotAvailable(name=name, batch_size=size, max_new_tokens=length, reason=reason)
            for name, reason in self._lacking.items()
        ]

    def num_calls(self, prompts: list[Prompt]) -> int:
        """How many calls `run` will tell of."""
        num_rounds = len(self._batches(prompts)) * self.settings.repetitions + self.settings.warmup
        return num_rounds * len(self._methods)

    def run(self, prompts: list[Prompt], on_call: Callable[[Call], None] = lambda call: None) -> Iterator[BatchResult]:
        """Yield each batch's result when all its repetitions are done: those stay valid after Ctrl-C.

        Args:
            on_call: is told of every call, when it begins and when it is over.

        Raises `ValueError` if a prompt does not fit into the context, `SpecdecError` if specdec fails.
        """
        batches = [(batch, self._encode(batch)) for batch in self._batches(prompts)]
        for turn in range(self.settings.warmup):
            self._run_all(*batches[0], turn, on_call, is_warmup=True)
        for batch, inputs in batches:
            repetitions = [self._run_all(batch, inputs, turn, on_call) for turn in range(self.settings.repetitions)]
            present = [method.name for method in self._methods if method.name not in self._lacking]
            runs = {name: [runs[name] for runs in repetitions] for name in present}
            yield BatchResult(
                prompts=batch,
                runs=runs,
                comparisons=self._compare(inputs, runs),
                references=self._references,
                peers=frozenset(method.name for method in self._methods if method.peer is not None),
                settings=self.settings,
            )

    def _batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        size = self.settings.batch_size
        by_category = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.category)]
        return [group[start : start + size] for group in by_category for start in range(0, len(group), size)]

    def _encode(self, batch: list[Prompt]) -> BatchEncoding:
        inputs = encode(self._tokenizer, batch)
        num_prompt, num_new = inputs["input_ids"].shape[1], self.settings.max_new_tokens
        limit = position_limit(self._model)
        if num_prompt + num_new > limit:
            raise ValueError(
                f"{_name(batch)} has {num_prompt} tokens; with {num_new} new ones that is more than the "
                f"{limit} positions of the model"
            )
        return inputs.to(self._model.device)

    def _run_all(
        self,
        batch: list[Prompt],
        inputs: BatchEncoding,
        turn: int,
        on_call: Callable[[Call], None],
        *,
        is_warmup: bool = False,
    ) -> dict[str, Run]:
        """Everyone once. The first one changes from turn to turn: nobody always runs after the same neighbour."""
        runs = {}
        first = turn % len(self._methods)
        for method in self._methods[first:] + self._methods[:first]:
            call = Call(method=method.name, category=batch[0].category, is_warmup=is_warmup)
            on_call(call)
            if method.name not in self._lacking:
                try:
                    runs[method.name] = self._run(method, inputs)
                except Exception as error:
                    reason = f"failed on {_name(batch)}: {type(error).__name__}: {error}"
                    if method.peer is None:
                        raise SpecdecError(f"{method.name} {reason}") from error
                    self._lacking[method.name] = reason
            on_call(dataclasses.replace(call, is_over=True, run=runs.get(method.name)))
        return runs

    def _run(self, method: Method, inputs: BatchEncoding) -> Run:
        torch.manual_seed(self.settings.seed)
        time.sleep(self._settle_seconds)
        self._memory.reset()
        peer = self._own_generate if method.drafter is None and method.peer is None else method.peer
        if peer is not None:
            run = peer.decode(inputs, self._generation_kwargs)
        else:
            assert method.drafter is not None
            run = decode(
                self._model,
                inputs,
                self._generation_kwargs,
                drafter=method.drafter,
                tree=method.tree,
                verify=self.settings.verify,
                router=method.router,
                tokenizer=self._tokenizer,
            )
        return dataclasses.replace(run, peak_memory_mib=self._memory.mib())

    def _compare(self, inputs: BatchEncoding, runs: dict[str, list[Run]]) -> dict[str, list[Comparison]]:
        if self.settings.sample:
            return {}
        prompts = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        return {
            name: self._compare_runs(prompts, runs[self._references[name]][0], repetitions)
            for name, repetitions in runs.items()
            if self._references[name] in runs and name not in self._lossy
        }

    def _compare_runs(self, prompts: list[torch.Tensor], reference: Run, runs: list[Run]) -> list[Comparison]:
        """The worst verdict of all repetitions, for each prompt."""
        if reference.text is not None:
            return [_worst([compare_texts(reference.text, run.text or "") for run in runs])]
        return [
            _worst(
                [
                    compare(self._model, prompt_ids, reference.tokens[row], run.tokens[row], self._generation_kwargs)
                    for run in runs
                ]
            )
            for row, prompt_ids in enumerate(prompts)
        ]


def generation_kwargs(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """What every method gets, the model's own `generate()` too."""
    return {**settings.generation_kwargs, "pad_token_id": pad_id(model)}


def _lacking(methods: list[Method], settings: Settings) -> Iterator[tuple[str, str]]:
    for method in methods:
        if method.peer is not None:
            reason = method.peer.lacks(batch_size=settings.batch_size, sample=settings.sample)
            if reason is not None:
                yield method.name, reason


def _references(methods: list[Method]) -> Iterator[tuple[str, str]]:
    """Whom each method's output must equal: the first method, or the first one of a family with weights of its own."""
    first: dict[str, str] = {}
    for method in methods:
        family = method.peer.family if method.peer is not None and method.peer.has_own_weights else ""
        yield method.name, first.setdefault(family, method.name)


def _worst(comparisons: list[Comparison]) -> Comparison:
    return max(comparisons, key=lambda comparison: comparison.verdict)


def encode(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Prompt]) -> BatchEncoding:
    """`input_ids` and `attention_mask`, [B, P], left-padded."""
    if batch[0].token_ids is None:
        return encode_prompts(tokenizer, [prompt.text for prompt in batch])
    input_ids = torch.tensor([prompt.token_ids for prompt in batch])
    return BatchEncoding({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})


def _name(batch: list[Prompt]) -> str:
    what = "the prompt" if len(batch) == 1 else f"the batch of {len(batch)} that starts with the prompt"
    return f"{what} {batch[0].text[:50]!r} ({batch[0].category})"
