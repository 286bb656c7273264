"""What the kernels buy: width of a verification, plain decoding, perplexity and memory.

    python -m bench.forward_cost MODEL [--weights stock,float,int8,int4] [--instructions avx2] [--only-widths]
        [--context 256] [--repetitions 10] [--threads 2 | --threads 1,2 [--beside 1]] [--tokens 16]

MODEL is a folder, a hub id or `demo`. Forms of one model take turns in one process: `stock` (transformers, float32),
`float` (prepare(model)), `int8` and `int4` (quantized_copy(model, ...)). Every figure is the best of its repetitions,
wall time and CPU time of the calling thread: on a busy machine only the latter (with --threads 1) means something. With
several numbers of threads forwards take turns on each, and it is said how much quicker the others are than the first:
wall time, by the best of the repetitions and by their medians. The latter mean something also `--beside` so many
programs that do nothing but use a core each. All else is measured with the first number. The last line of stdout is
JSON. A wrong result (rows that depend on their company) fails the run.
"""

import argparse
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from transformers import PreTrainedModel

from bench._script import WEIGHTS, add_instructions, parser_of, select_instructions
from specdec import kernels, models
from specdec.hf import CACHE
from specdec.model_options import QuantizedWeights
from specdec.tree_model.cache import TreeCache
from specdec.tree_model.layer_views import LayerViews

WIDTHS = (1, 2, 4, 8, 16)
THREAD_WIDTHS = (1, 4, 8, 256)
QUANTIZED = get_args(QuantizedWeights)


class Forms:
    """A float32 model, and copies of it with other weights.

    Args:
        names: of forms that take turns.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self.names = names
        self.model = model
        self._copies = {name: kernels.quantized_copy(model, name) for name in names if name in QUANTIZED}

    @contextmanager
    def form(self, name: str) -> Iterator[PreTrainedModel]:
        """`stock` and `float` are the same weights (calibration runs once)."""
        if name == "float":
            kernels.prepare(self.model)
        yield self._copies.get(name, self.model)
        if name == "float":
            kernels.unprepare(self.model)


def run_of(model: PreTrainedModel) -> Callable:
    """What the runtime calls: of a prepared model its layers, without transformers' forward around them."""
    return model if kernels.prepared(model) is None else LayerViews(model).whole().run


class Context:
    """A cache filled with `length` tokens, to which forwards of any width are appended and taken back."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.length = ids.shape[1]
        self.cache = TreeCache(model.config.num_hidden_layers, 1, self.length + 64)
        model(ids, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self.cache.commit([range(self.length)])
        self._inputs: dict[int, dict] = {}  # by width: torch's operators on several threads wait for each other

    def _inputs_of(self, width: int) -> dict:
        if width not in self._inputs:
            mask = torch.ones(1, 1, width, self.length + width, dtype=torch.bool).tril(self.length)
            positions = torch.arange(self.length, self.length + width)[None]
            self._inputs[width] = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        return self._inputs[width]

    def forward(self, run: Callable, ids: torch.Tensor) -> torch.Tensor:
        logits = run(input_ids=ids, **{CACHE: self.cache}, **self._inputs_of(ids.shape[1])).logits
        self.cache.rollback()
        return logits


def timed_ms(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.thread_time() - cpu) * 1e3


def measure_widths(forms: Forms, ids: torch.Tensor, repetitions: int) -> dict:
    """Milliseconds of a forward by form and width, all forms in turn."""
    context = Context(forms.model, ids)
    best = {name: {width: (float("inf"),) * 2 for width in WIDTHS} for name in forms.names}
    for _ in range(repetitions):
        for name in forms.names:
            with forms.form(name) as model:
                run = run_of(model)
                context.forward(run, ids[:, :1])  # looks whether the layers are what they were
                for width in WIDTHS:
                    new = ids[:, :width]
                    times = timed_ms(lambda run=run, new=new: context.forward(run, new))
                    best[name][width] = tuple(map(min, best[name][width], times))
    for name in forms.names:
        with forms.form(name) as model:
            if name == "stock" or model._specdec_prepared.num_fused_layers < model.config.num_hidden_layers:
                continue  # calibration or the lack of a compiler left torch products, which are not exact
            wide = context.forward(run_of(model), ids[:, :8])
            assert torch.equal(context.forward(run_of(model), ids[:, :3]), wide[:, :3]), (
                f"{name}: rows depend on their company"
            )
    return {
        name: {w: {"wall_ms": t[0], "cpu_ms": t[1]} for w, t in by_width.items()} for name, by_width in best.items()
    }


@contextmanager
def beside(num_programs: int) -> Iterator[None]:
    """Within, so many other programs use a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_programs)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure_threads(forms: Forms, ids: torch.Tensor, repetitions: int, counts: Sequence[int]) -> dict:
    """Wall milliseconds of a forward, best and median, by form, number of threads and width, all in turn."""
    context = Context(forms.model, ids)
    widths = [width for width in THREAD_WIDTHS if width <= ids.shape[1]]
    times: dict = {name: {count: {width: [] for width in widths} for count in counts} for name in forms.names}
    for _ in range(repetitions):
        for name in forms.names:
            with forms.form(name) as model:
                run = run_of(model)
                for count in counts:
                    torch.set_num_threads(count)
                    context.forward(run, ids[:, :1])  # wakes the threads
                    for width in widths:
                        new = ids[:, :width]
                        wall, _ = timed_ms(lambda run=run, new=new: context.forward(run, new))
                        times[name][count][width].append(wall)
    torch.set_num_threads(counts[0])
    return {
        name: {
            count: {width: {"best_ms": min(each), "median_ms": median(each)} for width, each in by_width.items()}
            for count, by_width in by_count.items()
        }
        for name, by_count in times.items()
    }


def measure_decoding(forms: Forms, ids: torch.Tensor, num_tokens: int, repetitions: int) -> dict:
    """Milliseconds per token of transformers' generate() after the first token, by form."""
    best = {name: (float("inf"),) * 2 for name in forms.names}
    for _ in range(repetitions):
        for name in forms.names:
            with forms.form(name) as model:
                times = []
                for length in (1, 1 + num_tokens):
                    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
                    times.append(timed_ms(lambda model=model, o=options: model.generate(ids[:, :32], **o)))
                per_token = tuple((long - short) / num_tokens for short, long in zip(*times, strict=True))
                best[name] = tuple(map(min, best[name], per_token))
    return {name: {"wall_ms": wall, "cpu_ms": cpu} for name, (wall, cpu) in best.items()}


def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """In pieces of 64 tokens, so that the kernels for few rows are what is measured."""
    cache = TreeCache(model.config.num_hidden_layers, 1, ids.shape[1])
    losses = []
    for start in range(0, ids.shape[1] - 1, 64):
        piece = ids[:, start : start + 64]
        logits = model(piece, **{CACHE: cache}, use_cache=True).logits[0]
        cache.commit([range(piece.shape[1])])
        labels = ids[0, start + 1 : start + 1 + piece.shape[1]]
        losses.append(torch.nn.functional.cross_entropy(logits[: len(labels)], labels, reduction="none"))
    return torch.cat(losses).mean().exp().item()


def memory_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def measure_preparation(model: PreTrainedModel, weights: str) -> dict:
    """prepare(model, weights) in place: seconds, and peak memory over the float model's (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_mib, start = memory_mib("VmRSS"), time.perf_counter()
    kernels.prepare(model, weights)
    seconds = time.perf_counter() - start
    return {
        "weights": weights,
        "seconds": seconds,
        "before_mib": before_mib,
        "peak_ratio": memory_mib("VmHWM") / before_mib,
        "after_ratio": memory_mib("VmRSS") / before_mib,
    }


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    for name, default in (("context", 256), ("repetitions", 10), ("beside", 0), ("tokens", 16), ("text", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="forms of the model, joined by commas")
    parser.add_argument("--threads", default="2", help="a number, or several joined by commas")
    add_instructions(parser)
    parser.add_argument("--only-widths", action="store_true", help="measure forwards, and nothing else")
    arguments = parser.parse_args()
    names = arguments.weights.split(",")
    if unknown := set(names) - set(WEIGHTS):
        parser.error(f"--weights: {', '.join(unknown)} is none of {', '.join(WEIGHTS)}")
    if not all(count.isdecimal() and int(count) for count in arguments.threads.split(",")):
        parser.error(f"--threads {arguments.threads}: positive numbers joined by commas, as in 1,2")
    counts = list(map(int, arguments.threads.split(",")))
    select_instructions(arguments.instructions)
    model, tokenizer, _ = models.load(arguments.model, dtype="float32", device="cpu", threads=counts[0])
    text = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, : arguments.text]
    report = {"model": Path(arguments.model).name, "threads": counts[0], "kernels": kernels.describe()}
    forms = Forms(model, names)
    if len(counts) > 1:
        with beside(arguments.beside):
            report["by_threads"] = measure_threads(forms, text[:, : arguments.context], arguments.repetitions, counts)
    report["forward"] = measure_widths(forms, text[:, : arguments.context], arguments.repetitions)
    if not arguments.only_widths:
        report |= measure_the_rest(forms, text, arguments)
    show(report)
    print(json.dumps(report))


def measure_the_rest(forms: Forms, text: torch.Tensor, arguments: argparse.Namespace) -> dict:
    """Plain decoding, perplexity, and what preparation takes."""
    report = {"decoding": measure_decoding(forms, text, arguments.tokens, max(2, arguments.repetitions // 3))}
    report["perplexity"] = {}
    for name in forms.names:
        with forms.form(name) as current:
            report["perplexity"][name] = perplexity(current, text)
    start = time.perf_counter()
    kernels.prepare(forms.model)
    report["float_preparation_s"] = time.perf_counter() - start
    report["best_threads"] = kernels.calibrate_threads(forms.model)
    kernels.unprepare(forms.model)
    if quantized := [name for name in forms.names if name in QUANTIZED]:
        report["preparation"] = measure_preparation(forms.model, quantized[0])
    return report


def _ratios(one: dict, other: dict) -> str:
    cells = (
        f"T({width}) {one[width]['best_ms'] / other[width]['best_ms']:.2f}x "
        f"({one[width]['median_ms'] / other[width]['median_ms']:.2f}x)"
        for width in one
    )
    return ", ".join(cells)


def show(report: dict) -> None:
    print(f"{report['model']}, {report['threads']} threads, {report['kernels']}")
    for clock in ("wall_ms", "cpu_ms"):
        print(f"forward, {clock}: " + "".join(f"{f'T({width})':>16}" for width in WIDTHS))
        for name, by_width in report["forward"].items():
            one = by_width[1][clock]
            cells = (f"{by_width[w][clock]:8.1f} ({by_width[w][clock] / one:4.2f})" for w in WIDTHS)
            print(f"  {name:18}" + " ".join(cells))
        if "decoding" in report:
            first = next(iter(report["decoding"].values()))[clock]
            rates = (f"{name} {t[clock]:.1f} ({first / t[clock]:.2f}x)" for name, t in report["decoding"].items())
            print(f"plain decoding, {clock} per token: " + ", ".join(rates))
    for name, by_count in report.get("by_threads", {}).items():
        first, *others = by_count
        for count in others:
            print(
                f"  {name}, {count} threads over {first}, best (median): " + _ratios(by_count[first], by_count[count])
            )
    if "perplexity" in report:
        print("perplexity: " + ", ".join(f"{name} {value:.4f}" for name, value in report["perplexity"].items()))
    if "preparation" in report:
        print("preparation: " + ", ".join(f"{name} {value}" for name, value in report["preparation"].items()))


if __name__ == "__main__":
    main()
