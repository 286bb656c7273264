"""Long prompts beside short streams: how far apart do the streams' tokens come, and when do the prompts' first?

    python -m bench.long_prompts [MODEL] [--weights int8] [--streams 4] [--prompts 3] [--tokens 2000] [--threads 1]
        [--instructions avx2] [--clock wall|cpu] [--output FILE.json]

One engine, one process. First the streams decode alone, then a long prompt is read alone, then long prompts arrive
beside the streams, each when the one before has said its first token. Nothing is drafted, so that every round commits a
token of each stream. Time between tokens is over all streams; the time to the first token is the median over the long
prompts. The CPU clock, which the engine then goes by too, leaves out what other
programs take of a shared machine; it is meant for --threads 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from bench._script import WEIGHTS, add_instructions, parser_of, select_instructions, write_json
from specdec.drafters import Plain
from specdec.engine import Engine, Generation, Request
from specdec.kernels import prepare
from specdec.models import load

CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
_MOST_NEW = 2000
"""Of a stream: more than the rounds that there will be."""
_WARM_UP = 10
"""Tokens of each stream before anything is timed."""


class Trial:
    """An engine with some streams that do not end, and the times of their tokens."""

    def __init__(self, model: PreTrainedModel, num_streams: int, clock: Callable[[], float]):
        self._engine = Engine(model, drafter=Plain(), max_rows=num_streams + 1)
        self._engine._clock = clock
        self._unlikely = model.config.get_text_config(decoder=True).vocab_size - 1
        self._clock = clock
        self._random = torch.Generator().manual_seed(0)
        self._times: list[list[float]] = [[] for _ in range(num_streams)]
        for times in self._times:
            self._submit(20, _MOST_NEW, lambda _, times=times: times.append(clock()))
        while any(len(times) < _WARM_UP for times in self._times):
            self._engine.step()
        self._forget()

    def decode(self, num_tokens: int) -> list[float]:
        """Seconds between the tokens of streams that decode alone."""
        while any(len(times) < num_tokens for times in self._times):
            self._engine.step()
        gaps = self.gaps()
        self._forget()
        return gaps

    def read(self, num_tokens: int) -> float:
        """Seconds to the first token of a long prompt."""
        started = self._clock()
        generation = self._submit(num_tokens, 1, None)
        while not generation.is_finished:
            self._engine.step()
        return self._clock() - started

    def gaps(self) -> list[float]:
        return [after - before for times in self._times for before, after in pairwise(times)]

    def close(self) -> None:
        self._engine.close()

    def _forget(self) -> None:
        for times in self._times:
            del times[:-1]

    def _submit(self, num_tokens: int, num_new: int, told: Callable[[Any], None] | None) -> Generation:
        prompt = torch.randint(1000, self._unlikely, (num_tokens,), generator=self._random).tolist()
        config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=self._unlikely)
        return self._engine.submit(Request(prompt=prompt, config=config, on_tokens=told))


def measure(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    clock = CLOCKS[options.clock]
    alone = Trial(model, 0, clock)
    first_alone = [alone.read(options.tokens) for _ in range(options.prompts)]
    alone.close()
    trial = Trial(model, options.streams, clock)
    gaps_alone = trial.decode(_WARM_UP * 10)
    first_beside = [trial.read(options.tokens) for _ in range(options.prompts)]
    gaps_beside = trial.gaps()
    trial.close()
    seconds = {
        "first_token_alone": float(np.median(first_alone)),
        "first_token_beside": float(np.median(first_beside)),
        **{f"gap_p{q}_alone": float(np.percentile(gaps_alone, q)) for q in (50, 99)},
        **{f"gap_p{q}_beside": float(np.percentile(gaps_beside, q)) for q in (50, 99)},
    }
    ratios = {
        name: seconds[f"{name}_beside"] / seconds[f"{name}_alone"] for name in ("first_token", "gap_p50", "gap_p99")
    }
    return {"seconds": seconds, "ratios": ratios, "num_gaps": len(gaps_beside)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    add_instructions(parser)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    select_instructions(options.instructions)
    model, _, _ = load(options.model)
    if options.weights != "stock":
        prepare(model, options.weights)
    result = {"options": {**vars(options), "output": None}, **measure(model, options)}
    print(json.dumps(result, indent=2))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
