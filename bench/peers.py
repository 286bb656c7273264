"""specdec beside transformers and llama.cpp: the same prompts, greedy, the same threads, one process, taking turns.

    pip install "specdec-runtime[peers]"
    python bench/peers.py MODEL --draft SMALL --float --max-new-tokens 128 --output bench/results/peers.json

MODEL and SMALL are folders or `.gguf` files. llama.cpp (through the wheel `xllamacpp`) reads MODEL itself or the file
`MODEL.gguf` beside the folder, or what --gguf and --draft-gguf name: without one it is reported as not available.

Every configuration gets the same token ids and the same limit, and stops at the end-of-sequence token, which counts on
all sides. Two rates: `end to end` is new tokens over wall time, prefill included; `decode` is the tokens after the
first commit over the time after it (llama.cpp: its own timer, which starts with the first token). A prompt's rate is
the median of its repetitions, a category's the geometric mean of its prompts. Text is not expected to agree between
sides (float32, int8 and GGUF weights differ); `same` counts the prompts on which a configuration says what its own
side's plain decoding says. llama.cpp's servers hold one speculation each, and the n-gram maps learn from earlier
requests: those get a new server for every call, so that no repetition has seen the answer. The prebuilt wheel has no
AVX-512 code: `llama_cpp_features` in the JSON document says what it uses. Exit code 1: an output of specdec differs
from plain decoding by more than a numerical tie.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from specdec import kernels
from specdec.bench.equality import Verdict, compare
from specdec.bench.harness import Harness, Method, Run, Settings
from specdec.bench.methods import PLAIN, QUANTIZED_SELF, TRANSFORMERS, DrafterSpec
from specdec.bench.suite import ALL, Prompt, load_suite
from specdec.cli.loading import load_pair
from specdec.errors import SpecdecError
from specdec.prompting import encode_prompts

try:
    import xllamacpp
except ImportError:
    xllamacpp: ModuleType | None = None

INT8, FLOAT, LLAMA = "int8", "float32", "llama.cpp"
INT8_METHODS = "plain,prompt-lookup,small-model"
FLOAT_METHODS = "plain,prompt-lookup,quantized-self,small-model"
LLAMA_METHODS = "plain,draft,ngram-simple,ngram-mod,ngram-map-k,ngram-map-k4v,ngram-cache"
METRICS = {"decode": "decode tok/s", "end_to_end": "end-to-end tok/s"}
PAUSE_S = 0.05
"""Between two calls, so that one side's idle workers do not spin into the other's time."""
NUM_WARMUP_TOKENS = 8
SMALL_MODEL_PARAMETERS = 500_000_000
"""Below this the bars of the demo model hold, above it those of the 1.5B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed call. `output` is token ids, or text from llama.cpp; `num_decoded`: tokens after the first commit."""

    num_tokens: int
    seconds: float
    num_decoded: int
    decode_seconds: float
    num_drafted: int
    num_accepted: int
    output: list[int] | str

    @property
    def rates(self) -> dict[str, float | None]:
        decode = self.num_decoded / self.decode_seconds if self.num_decoded else None
        return {"decode": decode, "end_to_end": self.num_tokens / self.seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    prompt: Prompt
    ids: list[int]


Decode = Callable[[Task, int], Sample]
"""A task and the number of new tokens."""


@dataclass(slots=True, kw_only=True)
class Configuration:
    """One way of decoding. `judge` says whether an output is what the plain output (second) is."""

    side: str
    method: str
    decode: Decode | None = None
    judge: Callable[[Task, Any, Any], Verdict] | None = None
    unavailable: str | None = None
    samples: list[list[Sample]] = field(default_factory=list)  # by task, then by repetition

    @property
    def name(self) -> str:
        return f"{self.side} {self.method}"

    def rate(self, task: int, metric: str) -> float | None:
        rates = [sample.rates[metric] for sample in self.samples[task]]
        return None if None in rates else statistics.median(rates)


# --- specdec and transformers -------------------------------------------------------------------------------------


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


# --- llama.cpp ----------------------------------------------------------------------------------------------------


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


# --- measuring ----------------------------------------------------------------------------------------------------


def warm_up(configurations: list[Configuration], task: Task, max_new_tokens: int) -> None:
    """One short call each. A peer that fails here is not available; specdec failing is a failed run."""
    for configuration in configurations:
        if configuration.decode is None:
            continue
        log(f"warming up {configuration.name}")
        try:
            configuration.decode(task, min(max_new_tokens, NUM_WARMUP_TOKENS))
        except RuntimeError as error:
            if configuration.side != LLAMA:
                raise
            configuration.decode, configuration.unavailable = None, f"failed: {error}"


def measure(configurations: list[Configuration], tasks: list[Task], max_new_tokens: int, repetitions: int) -> int:
    """Fills the samples; returns how many tasks are complete, fewer than all after Ctrl-C."""
    for index, task in enumerate(tasks):
        rounds: list[dict[str, Sample]] = []
        try:
            for repetition in range(repetitions):
                log(f"{task.prompt.category}: prompt {index + 1} of {len(tasks)}, repetition {repetition + 1}")
                first = repetition % len(configurations)  # nobody always runs after the same neighbour
                turns = configurations[first:] + configurations[:first]
                rounds.append({one.name: timed(one, task, max_new_tokens) for one in turns})
        except KeyboardInterrupt:
            return index
        for configuration in configurations:
            configuration.samples.append([samples[configuration.name] for samples in rounds])
    return len(tasks)


def timed(configuration: Configuration, task: Task, max_new_tokens: int) -> Sample:
    time.sleep(PAUSE_S)
    return configuration.decode(task, max_new_tokens)


# --- reporting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A configuration on the prompts of a category, or on `"all"`. Rates: geometric means; None: one-token outputs."""

    category: str
    side: str
    method: str
    decode: float | None
    end_to_end: float | None
    spread: float
    """Of the end-to-end rate: the median over prompts of (fastest - slowest) / median of the repetitions."""
    num_prompts: int
    num_tokens: int
    acceptance_rate: float | None
    num_same: int
    num_ties: int

    @property
    def name(self) -> str:
        return f"{self.side} {self.method}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    what: str
    category: str
    metric: str
    value: float
    bar: float | None
    numerator: str
    denominator: str


def summarise(configurations: list[Configuration], tasks: list[Task]) -> list[Row]:
    parts = {name: [i for i, task in enumerate(tasks) if task.prompt.category == name] for name in categories(tasks)}
    parts[ALL] = list(range(len(tasks)))
    verdicts = {configuration.name: judge_all(configuration, configurations, tasks) for configuration in configurations}
    return [
        to_row(category, one, part, comparable(configurations, part), verdicts[one.name])
        for category, part in parts.items()
        for one in configurations
    ]


def categories(tasks: list[Task]) -> list[str]:
    return list(dict.fromkeys(task.prompt.category for task in tasks))


def comparable(configurations: list[Configuration], part: list[int]) -> list[int]:
    """The prompts on which every configuration has a decode rate."""
    return [i for i in part if all(one.rate(i, "decode") is not None for one in configurations)]


def judge_all(configuration: Configuration, configurations: list[Configuration], tasks: list[Task]) -> list[Verdict]:
    """By task the worst verdict of all repetitions, against the plain decoding of the same weights."""
    plain = next((one for one in configurations if is_plain(one, configuration.side)), configuration)
    return [
        max(configuration.judge(task, sample.output, plain.samples[index][0].output) for sample in samples)
        for index, (task, samples) in enumerate(zip(tasks, configuration.samples, strict=True))
    ]


def is_plain(configuration: Configuration, side: str) -> bool:
    """float32's own reference is transformers."""
    if side in (TRANSFORMERS, FLOAT):
        return configuration.side == TRANSFORMERS
    return (configuration.side, configuration.method) == (side, PLAIN)


def to_row(category: str, one: Configuration, part: list[int], decoded: list[int], verdicts: list[Verdict]) -> Row:
    samples = [sample for index in part for sample in one.samples[index]]
    num_drafted = sum(sample.num_drafted for sample in samples)
    return Row(
        category=category,
        side=one.side,
        method=one.method,
        decode=statistics.geometric_mean(one.rate(i, "decode") for i in decoded) if decoded else None,
        end_to_end=statistics.geometric_mean(one.rate(i, "end_to_end") for i in part),
        spread=statistics.median(spread(one.samples[i]) for i in part),
        num_prompts=len(part),
        num_tokens=sum(one.samples[index][0].num_tokens for index in part),
        acceptance_rate=sum(sample.num_accepted for sample in samples) / num_drafted if num_drafted else None,
        num_same=sum(verdicts[index] is Verdict.IDENTICAL for index in part),
        num_ties=sum(verdicts[index] is Verdict.TIE for index in part),
    )


def spread(samples: list[Sample]) -> float:
    rates = [sample.rates["end_to_end"] for sample in samples]
    return (max(rates) - min(rates)) / statistics.median(rates)


def ratios(rows: list[Row], is_small: bool) -> list[Ratio]:
    """The ratios that have a bar, by category and metric; those whose sides were not measured are left out."""
    return [
        ratio
        for category, metric in itertools.product(dict.fromkeys(row.category for row in rows), METRICS)
        for ratio in category_ratios([r for r in rows if r.category == category], category, metric, is_small)
    ]


def category_ratios(rows: list[Row], category: str, metric: str, is_small: bool) -> Iterator[Ratio]:
    def best(*sides: str, method: str | None = None) -> Row | None:
        candidates = [row for row in rows if row.side in sides and method in (None, row.method.partition(":")[0])]
        measured = [row for row in candidates if getattr(row, metric) is not None]
        return max(measured, key=lambda row: getattr(row, metric), default=None)

    stock, int8_plain, quantized = best(TRANSFORMERS), best(INT8, method=PLAIN), best(FLOAT, method=QUANTIZED_SELF)
    stock_bar, llama_bar = (4.0, 0.6) if is_small else (5.0, 0.8)
    wanted = [
        ("int8 plain / transformers", int8_plain, stock, stock_bar),
        ("int8 plain / llama.cpp plain", int8_plain, best(LLAMA, method=PLAIN), llama_bar),
        ("best int8 / best llama.cpp", best(INT8), best(LLAMA), {"edit": 1.4, "code": 1.0}.get(category)),
        ("quantized-self / transformers", quantized, stock, 2.2),
        ("quantized-self / float32 plain", quantized, best(FLOAT, method=PLAIN), None),
        ("best int8 / transformers", best(INT8), stock, None),
    ]
    for what, numerator, denominator, bar in wanted:
        if numerator is not None and denominator is not None:
            yield Ratio(
                what=what,
                category=category,
                metric=metric,
                value=getattr(numerator, metric) / getattr(denominator, metric),
                bar=bar,
                numerator=numerator.name,
                denominator=denominator.name,
            )


def show(document: dict[str, Any], rows: list[Row], found: list[Ratio]) -> None:
    console = Console()
    console.width = console.width if console.is_terminal else 120
    console.print(rates_table(document, rows))
    console.print(ratios_table(found))
    for name, reason in document["not_available"].items():
        console.print(f"not available: {name}: {reason}", markup=False, highlight=False)


def rates_table(document: dict[str, Any], rows: list[Row]) -> Table:
    settings = document["environment"]
    title = f"{document['model']}, {settings['threads']} threads, {settings['max_new_tokens']} new tokens at most"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("category", "side", "method"):
        table.add_column(heading)
    for heading in (*METRICS.values(), "spread", "accepted", "tokens", "same", "ties"):
        table.add_column(heading, justify="right")
    for category, group in itertools.groupby(rows, key=lambda row: row.category):
        table.add_section()
        for row in group:
            rates = (number(row.decode, ".1f"), number(row.end_to_end, ".1f"), f"{row.spread:.0%}")
            counts = (str(row.num_tokens), f"{row.num_same}/{row.num_prompts}", str(row.num_ties))
            labels = map(escape, (category, row.side, row.method))
            table.add_row(*labels, *rates, number(row.acceptance_rate, ".0%"), *counts)
    return table


def ratios_table(found: list[Ratio]) -> Table:
    table = Table(title="ratios", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("category", "ratio", "metric", "value", "bar", "of"):
        table.add_column(heading, justify="right" if heading in ("value", "bar") else "left")
    for ratio in found:
        colour = "" if ratio.bar is None else "green" if ratio.value >= ratio.bar else "red"
        labels = (escape(ratio.category), ratio.what, ratio.metric.replace("_", " "))
        best = f"{ratio.numerator} / {ratio.denominator}" if "best" in ratio.what else ""
        table.add_row(*labels, f"{ratio.value:.2f}", number(ratio.bar, ".1f"), best, style=colour)
    return table


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def to_json(configurations: list[Configuration], tasks: list[Task], rows: list[Row], found: list[Ratio]) -> dict:
    return {
        "not_available": {one.name: one.unavailable for one in configurations if one.unavailable},
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(ratio) for ratio in found],
        "prompts": [{"category": task.prompt.category, "num_prompt_tokens": len(task.ids)} for task in tasks],
        "samples": {one.name: [list(map(numbers, samples)) for samples in one.samples] for one in configurations},
    }


def numbers(sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in asdict(sample).items() if name != "output"}


def available(configurations: list[Configuration]) -> list[Configuration]:
    return [one for one in configurations if one.decode is not None]


def environment(arguments: argparse.Namespace, files: LlamaFiles) -> dict[str, Any]:
    return {
        "specdec": specdec.__version__,
        "kernels": kernels.describe(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "xllamacpp": xllamacpp and xllamacpp.__version__,
        "llama_cpp_features": xllamacpp and xllamacpp.get_system_info().strip(" |"),
        "gguf": files.target and files.target.name,
        "draft_gguf": files.draft and files.draft.name,
        "platform": platform.platform(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "max_new_tokens": arguments.max_new_tokens,
        "repetitions": arguments.repetitions,
    }


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- the command --------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model of the same tokenizer")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp reads")
    parser.add_argument("--draft-gguf", type=Path, help="what llama.cpp drafts with")
    parser.add_argument("--int8", metavar="METHODS", default=INT8_METHODS, help="%(default)s")
    parser.add_argument("--float", metavar="METHODS", nargs="?", const=FLOAT_METHODS, help="%(const)s")
    parser.add_argument("--llama", metavar="METHODS", default=LLAMA_METHODS, help="%(default)s")
    parser.add_argument("--prompts", type=Path, help="JSON lines; the built-in suite if absent")
    parser.add_argument("--category", action="append", default=[], help="may be given several times")
    parser.add_argument("--limit", type=int, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of the tables")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file too")
    return parser.parse_args()


def check_methods(arguments: argparse.Namespace) -> None:
    """A typo is found before a model is loaded."""
    for method in f"{arguments.int8},{arguments.float or PLAIN}".split(","):
        DrafterSpec.parse(method)
    for method in arguments.llama.split(","):
        if method.partition(":")[0] not in LLAMA_KINDS:
            raise ValueError(f"unknown llama.cpp method {method!r}; choose from: {', '.join(LLAMA_KINDS)}")


def find_gguf(given: Path | None, source: str | None) -> Path | None:
    """The file that was named, else the source if it is one, else the one of the same name beside the folder."""
    if given is not None:
        if not given.is_file():
            raise ValueError(f"there is no file {given}")
        return given
    if source is None:
        return None
    candidates = [Path(source), Path(source.rstrip("/") + ".gguf")]
    return next((path for path in candidates if path.suffix == ".gguf" and path.is_file()), None)


def pure_greedy(model: PreTrainedModel) -> PreTrainedModel:
    """Some checkpoints ask for a repetition penalty, which llama.cpp applies to another window of tokens."""
    model.generation_config.repetition_penalty = None
    return model


def build(arguments: argparse.Namespace) -> tuple[list[Configuration], list[Task], dict[str, Any], bool]:
    """The configurations, the tasks, what the numbers depend on, and whether the model is a small one."""
    check_methods(arguments)
    loading = {"dtype": "float32", "device": "cpu", "threads": arguments.threads, "weights": "stock"}
    (model, tokenizer, name), draft = load_pair(arguments.model, arguments.draft, **loading, trust_remote_code=False)
    pure_greedy(model)
    prompts = load_suite(arguments.prompts).select(arguments.category, arguments.limit).prompts
    tasks = [Task(prompt=one, ids=encode_prompts(tokenizer, [one.text])["input_ids"][0].tolist()) for one in prompts]
    files = LlamaFiles(
        target=find_gguf(arguments.gguf, arguments.model),
        draft=find_gguf(arguments.draft_gguf, arguments.draft),
        num_threads=arguments.threads,
        context_length=max(len(task.ids) for task in tasks) + arguments.max_new_tokens + 128,
    )
    if draft is not None:
        specdec.prepare(draft, weights="int8")
    configurations = [ours(TRANSFORMERS, model, tokenizer, Method(PLAIN, None))]
    configurations += drafted_by(INT8, arguments.int8, kernels.quantized_copy(model), tokenizer, draft)
    if arguments.float:
        configurations += drafted_by(FLOAT, arguments.float, prepared_copy(model), tokenizer, draft)
    configurations += llama_configurations(arguments.llama, files)
    heading = {"model": name, "draft": arguments.draft and Path(arguments.draft).name}
    heading["environment"] = environment(arguments, files)
    return configurations, tasks, heading, model.num_parameters() < SMALL_MODEL_PARAMETERS


def run(arguments: argparse.Namespace) -> bool:
    """Whether all outputs of specdec are right."""
    configurations, tasks, heading, is_small = build(arguments)
    warm_up(configurations, tasks[0], arguments.max_new_tokens)
    running = available(configurations)
    tasks = tasks[: measure(running, tasks, arguments.max_new_tokens, arguments.repetitions)]
    if not tasks:
        raise ValueError("interrupted before the first prompt was measured")
    rows = summarise(running, tasks)
    found = ratios(rows, is_small)
    document = heading | to_json(configurations, tasks, rows, found)
    text = json.dumps(document, indent=2, allow_nan=False)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        show(document, rows, found)
    wrong = [row for row in rows if row.category == ALL and row.side != LLAMA and is_wrong(row)]
    for row in wrong:
        log(f"{row.name} differs from plain decoding on {row.num_prompts - row.num_same - row.num_ties} prompts")
    return not wrong


def is_wrong(row: Row) -> bool:
    return row.num_same + row.num_ties < row.num_prompts


def main() -> None:
    try:
        is_right = run(parse_arguments())
    except (SpecdecError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
