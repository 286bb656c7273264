"""What `Auto` would make of recorded runs, in virtual time: with all its mechanisms, and without some.

    python -m bench.simulate_auto record MODEL [--draft MODEL] [--copy] --prompts FILE --out FILE
    python -m bench.simulate_auto run [TRACES] [--machine NAME ...] [--without NAME ... | --ablate] [--seeds 16]

`record` decodes prompts (of a Spec-Bench file those whose ids are *not* divisible by 3; the others are reported)
greedily with the model in int8, and notes what a draft model would have proposed at every position of the answers; with
`--copy` also what the same model says in float32, which differs from it as often as an int8 copy from its original.

`run` gives the real `Auto` a clock that only forwards move, and drafters that replay the traces (a folder, by default
bench/traces). What it is given to see is noisy; what is scored is what the same forwards take on average, against those
of plain decoding. A seed is an order of the prompts, of which `Auto` remembers the earlier ones, and a noise.
`--ablate` switches off each mechanism of `bench/auto_ablations.py` in turn. A table goes to stdout.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import exp, log, sqrt
from pathlib import Path
from random import Random
from statistics import geometric_mean, mean, stdev

import torch

from bench._script import parser_of
from bench.auto_ablations import ABLATIONS, without
from bench.auto_clock import Clock, Noise
from bench.auto_replay import Machine, Player
from bench.auto_traces import Trace, load_traces, record

TRACES = Path(__file__).parent / "traces"
DEMO_AVX512 = {1: 13.4, 2: 14.9, 4: 15.7, 8: 17.3, 16: 26.3, 32: 43.3, 64: 84.4}
DEMO_AVX2 = {1: 15.4, 2: 17.1, 4: 22.7, 8: 36.7, 16: 63.5, 32: 114.4, 64: 210.7}
INT8_1_5B = {1: 67.0, 2: 73.0, 4: 78.5, 8: 100.6, 16: 125.9, 32: 220.0, 64: 410.0}
INT8_0_5B = {1: 24.0, 2: 26.0, 4: 28.0, 8: 36.0, 16: 45.0, 32: 78.0, 64: 145.0}
MACHINES = {
    "demo-avx512": Machine(traces="demo", target=DEMO_AVX512),
    "demo-avx2": Machine(traces="demo", target=DEMO_AVX2),
    "demo-batch-of-4": Machine(traces="demo", target=DEMO_AVX512, rows=4),
    **{
        f"demo-{name}-packed-{rows}": Machine(traces="demo", target=costs, rows=rows, is_packed=True)
        for name, costs in (("avx512", DEMO_AVX512), ("avx2", DEMO_AVX2))
        for rows in (2, 4, 8, 16)
    },
    "1.5b-int8": Machine(traces="qwen", target=INT8_1_5B, draft=INT8_0_5B),
    "liar": Machine(traces="qwen", target=INT8_1_5B, draft=INT8_0_5B, wrong_until=1.0),
    "half-liar": Machine(traces="qwen", target=INT8_1_5B, draft=INT8_0_5B, wrong_until=0.5),
    "recovering": Machine(traces="qwen", target=INT8_1_5B, draft=INT8_0_5B, bad_passes=1),
}
"""Milliseconds by tokens, one thread of an AMD EPYC (Zen 4). The demo model: medians of CPU time. The 1.5B: up to 8
tokens bench/results/forward-cost-1.5b.json, wider ones as docs/log.md has them or on the same line; a step of the 0.5B
is a third of a forward."""
NOISES = {
    "quiet": Noise(sigma=0.05, slow_share=0.02),
    "busy": Noise(sigma=0.17, slow_share=0.07, switch_share=0.02),
}
"""`quiet` is what forwards scatter by on a machine of one's own; `busy` what was measured beside seven programs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One simulation: all prompts, in an order."""

    machine: str
    noise: str
    seed: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Speed over plain decoding of every batch, by category (of a batch's first prompt), and rounds by source."""

    speedups: Sequence[tuple[str, float]]
    sources: Counter[str]

    @property
    def mean(self) -> float:
        return geometric_mean(speedup for _, speedup in self.speedups)

    @property
    def slowest(self) -> float:
        return min(speedup for _, speedup in self.speedups)

    @property
    def slowest_category(self) -> float:
        by_category: defaultdict[str, list[float]] = defaultdict(list)
        for category, speedup in self.speedups:
            by_category[category].append(speedup)
        return min(map(geometric_mean, by_category.values()))


def simulate(machine: Machine, traces: Sequence[Trace], noise: Noise, seed: int) -> Result:
    """Every prompt once, in the seed's order."""
    random = Random(seed)
    order = random.sample(traces, len(traces))
    player = Player(machine=machine, clock=Clock(noise=noise, random=random))
    most = max(len(trace.answer) for trace in traces)
    batches = [order[start : start + machine.rows] for start in range(0, len(order), machine.rows)]
    for _ in range(machine.bad_passes):
        player.wrong_until = 1.0
        for batch in batches:
            player.speedup(batch, most)
    player.wrong_until = machine.wrong_until
    speedups = [(batch[0].category, player.speedup(batch, most)) for batch in batches]
    sources = Counter({(name or "nobody").removeprefix("Replayed"): count for name, count in player.sources.items()})
    return Result(speedups=speedups, sources=sources)


@cache
def _traces(path: Path) -> list[Trace]:
    return load_traces(path)


def _run(folder: Path, job: Job) -> Result:
    torch.set_num_threads(1)
    machine = MACHINES[job.machine]
    with without(job.without):
        return simulate(machine, _traces(folder / f"{machine.traces}.npz"), NOISES[job.noise], job.seed)


def interval(logs: Sequence[float]) -> str:
    """The mean of logarithms as a ratio, and twice its standard error."""
    error = 2 * stdev(logs) / sqrt(len(logs)) if len(logs) > 1 else 0.0
    return f"{exp(mean(logs)):.3f} ± {error:.3f}"


def row(name: str, results: Sequence[Result], full: Sequence[Result]) -> str:
    """Of one table: the results of all seeds, beside those of the whole `Auto` with the same seeds."""
    cells = [f"{geometric_mean(each.mean for each in results):.3f}"]
    if results is full:
        cells += ["", ""]
    else:
        pairs = list(zip(results, full, strict=True))
        cells.append(interval([log(own.mean / other.mean) for own, other in pairs]))
        cells.append(interval([log(own.slowest / other.slowest) for own, other in pairs]))
    cells.append(f"{mean(each.slowest for each in results):.3f} ({min(each.slowest for each in results):.3f})")
    cells.append(f"{mean(each.slowest_category for each in results):.3f}")
    rounds: Counter[str] = sum((each.sources for each in results), Counter())
    cells.append(", ".join(f"{source} {count / rounds.total():.0%}" for source, count in rounds.most_common()))
    return f"| {name} | {' | '.join(cells)} |"


def report(machine: str, noise: str, results: dict[tuple[str, ...], list[Result]]) -> list[str]:
    columns = ["speed over plain", "of the whole", "slowest prompt, of the whole", "slowest prompt, mean (least)"]
    head = " | ".join(["without", *columns, "slowest category", "rounds by source"])
    lines = [f"### {machine}, {noise}", "", f"| {head} |", f"|---|{'--:|' * 5}---|"]
    full = results[()]
    lines += [row(", ".join(names) or "(nothing)", each, full) for names, each in results.items()]
    return [*lines, ""]


def run(args: argparse.Namespace) -> None:
    each = (
        [(name,) for name in (args.without or ABLATIONS)]
        if args.ablate
        else [tuple(args.without)]
        if args.without
        else []
    )
    variants: list[tuple[str, ...]] = [(), *each]
    tables = list(product(args.machine, args.noise))
    jobs = [
        Job(machine=machine, noise=noise, seed=seed, without=names)
        for (machine, noise), names, seed in product(tables, variants, range(args.seeds))
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        found = dict(zip(jobs, pool.map(_run, [args.traces] * len(jobs), jobs, chunksize=4), strict=True))
    for machine, noise in tables:
        results: defaultdict[tuple[str, ...], list[Result]] = defaultdict(list)
        for job, result in found.items():
            if (job.machine, job.noise) == (machine, noise):
                results[job.without].append(result)
        print("\n".join(report(machine, noise, results)))


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.set_defaults(call=record)
    recording.add_argument("model")
    recording.add_argument("--draft")
    recording.add_argument("--copy", action="store_true", help="compare with float32")
    recording.add_argument("--prompts", type=Path, required=True)
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--limit", type=int, default=2, help="prompts of each category")
    recording.add_argument("--longest", type=int, default=900, help="tokens of a prompt; longer ones are left out")
    recording.add_argument("--max-new-tokens", type=int, default=96)
    recording.add_argument("--threads", type=int, default=1)
    running = commands.add_parser("run")
    running.set_defaults(call=run)
    running.add_argument("traces", type=Path, nargs="?", default=TRACES)
    running.add_argument("--machine", nargs="+", choices=MACHINES, default=list(MACHINES))
    running.add_argument("--noise", nargs="+", choices=NOISES, default=["quiet"])
    running.add_argument("--without", nargs="+", choices=ABLATIONS, default=[], help="switched off, together")
    running.add_argument("--ablate", action="store_true", help="each mechanism by itself")
    running.add_argument("--seeds", type=int, default=16)
    running.add_argument("--processes", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
