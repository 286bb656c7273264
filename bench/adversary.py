"""What `auto` makes of drafters that are useless, of one that lies, and of a machine that becomes slow.

    python -m bench.adversary [MODEL] [--limit 2] [--repetitions 3] [--max-new-tokens 128] [--out NAME]

MODEL (the demo model) decodes prompts of the built-in suite in int8, greedily, with one thread, interleaved in one
process, prefill included: plainly, and with `Auto` and each of these drafters:

    random    draws twelve tokens at random, and says so
    liar      draws twelve tokens at random, and is sure of every one
    useless   a draft model as large as the target, with random weights
    none      prompt lookup alone, which auto always has

Figures are plain decoding's seconds over auto's: medians of the repetitions, geometric mean over prompts. Outputs must
equal plain decoding's, or the run fails. Then a long answer is decoded on one core; in its middle another process
takes that core too. Of every round auto says beforehand how long it will take: the figure is after how many rounds the
median of five is right again, to a quarter.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Sequence
from statistics import geometric_mean, median
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import specdec
from bench._script import RESULTS, command, parser_of, write_json
from specdec.drafters import Auto, Drafter, DraftSession, Plain, Run, SmallModel
from specdec.models import load
from specdec.suites import load_suite
from specdec.text.prompting import encode_prompts
from trees import Draft, TokenTree, TreeBatch

LENGTH = 12
LONG, DISTURBED_AT = 400, 200
"""Tokens of the long answer, and the one at which the core has to be shared."""
WINDOW, TOLERANCE = 5, 0.25


class Noise(Drafter):
    """Draws tokens at random. prob: what it says of them."""

    def __init__(self, prob: float):
        self.prob = prob

    def start(self, run: Run) -> DraftSession:
        return _NoiseSession(run, self.prob)


class _NoiseSession(DraftSession):
    def __init__(self, run: Run, prob: float):
        self._run, self._prob, self._random = run, prob, random.Random(0)

    def propose(self, max_depths: Sequence[int]) -> Draft:
        chains = []
        for depth in max_depths:
            tokens = [self._random.randrange(self._run.vocab_size) for _ in range(min(LENGTH, depth))]
            chains.append(TokenTree.chain(tokens, probs=[self._prob] * len(tokens)))
        return Draft(trees=TreeBatch.stack(chains, self._run.device))


def useless(model_name: str) -> PreTrainedModel:
    """The same architecture, untrained."""
    config = load(model_name).model.config
    torch.manual_seed(0)
    return specdec.prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), weights="int8")


class Disturber(BaseStreamer):
    """Starts a process that takes this core, once so many tokens have come."""

    def __init__(self) -> None:
        self._num_tokens = -1  # the prompt comes first
        self._process: multiprocessing.Process | None = None

    def put(self, value: torch.Tensor) -> None:
        self._num_tokens += value.numel() if self._num_tokens >= 0 else 1
        if self._num_tokens >= DISTURBED_AT and self._process is None:
            self._process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
            self._process.start()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()


def spin() -> None:
    """Keep the core busy; the affinity is that of the parent."""
    while True:
        pass


def rounds_to_adapt(trace: Sequence[dict]) -> tuple[float, int | None]:
    """How much slower rounds became, and after how many slow ones the forecasts were right again; None: never.

    The disturbance is where the round times change most between one window and the next.
    """
    times = [record["ms"] / record["expected_ms"] for record in trace]
    plain = [record["plain_ms"] for record in trace]
    jumps = [median(times[i : i + WINDOW]) / median(times[i - WINDOW : i]) for i in range(WINDOW, len(times) - WINDOW)]
    onset = max(range(len(jumps)), key=jumps.__getitem__) + WINDOW
    slowdown = max(plain[onset:]) / median(plain[:onset])
    for start in range(onset, len(times) - WINDOW):
        if abs(median(times[start : start + WINDOW]) - 1) <= TOLERANCE:
            return slowdown, start - onset
    return slowdown, None


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each category")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", help="also write bench/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = load(args.model)
    specdec.prepare(model.float(), weights="int8")
    ways = {
        "plain": Plain(),
        "none": Auto(),
        "random": Auto(Noise(1 / tokenizer.vocab_size)),
        "liar": Auto(Noise(0.99)),
        "useless": Auto(SmallModel(useless(args.model))),
    }
    settings = {"do_sample": False, "repetition_penalty": 1.0, "return_dict_in_generate": True}
    prompts = load_suite().select(limit=args.limit).prompts
    speedups: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in prompts:
        inputs = encode_prompts(tokenizer, [prompt.text])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        expected = None
        for _ in range(args.repetitions):
            for name, drafter in ways.items():
                started = perf_counter()
                out = specdec.generate(model, **inputs, drafter=drafter, max_new_tokens=args.max_new_tokens, **settings)
                seconds[name].append(perf_counter() - started)
                expected = out.sequences if expected is None else expected
                if not torch.equal(out.sequences, expected):
                    sys.exit(f"{prompt.category}: the output with {name!r} differs from plain decoding's")
        for name in ways:
            speedups[name].append(median(seconds["plain"]) / median(seconds[name]))
    found = {name: {"over_plain": geometric_mean(each), "slowest_prompt": min(each)} for name, each in speedups.items()}
    for name, each in found.items():
        print(
            f"{name:8} {each['over_plain']:.2f}x plain, slowest of {len(prompts)} prompts {each['slowest_prompt']:.2f}x"
        )

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    inputs = encode_prompts(tokenizer, [prompts[-1].text])
    options = {"max_new_tokens": LONG, "min_new_tokens": LONG, "streamer": Disturber(), **settings}
    trace = specdec.generate(model, **inputs, drafter=Auto(), **options).stats.trace
    slowdown, rounds = rounds_to_adapt(trace)
    print(f"a core taken in mid-run: rounds {slowdown:.1f}x slower, forecasts right again after {rounds} rounds")
    if args.out:
        disturbed = {"slowdown": slowdown, "rounds": rounds}
        document = {"command": command("adversary"), "drafters": found, "disturbed": disturbed}
        write_json(RESULTS / f"{args.out}.json", document)


if __name__ == "__main__":
    main()
