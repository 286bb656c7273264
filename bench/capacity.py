"""The capacity model beside measurements: how many tokens per second an engine of B rows was to make, and makes.

    python -m bench.capacity MODEL [--weights int8] [--rows 1,2,4,8,16] [--prompt 64] [--new 48] [--output FILE]

Every row has a prompt of its own of so many random tokens; all start together and none stops early. Rounds are counted
once every row has joined. What forwards cost is measured before every repetition.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from bench._script import WEIGHTS, parser_of, write_json
from specdec.control.capacity import Capacity, measure_rows, slot_bytes, weight_bytes
from specdec.drafters import Plain
from specdec.engine import Engine, Request
from specdec.kernels import prepare
from specdec.models import load


def measure(model: PreTrainedModel, num_rows: int, prompt: int, num_new: int, seed: int) -> tuple[float, int]:
    """Tokens per second of full batches, and bytes of keys and values at the end."""
    generator = torch.Generator().manual_seed(seed)
    engine = Engine(model, drafter=Plain(), max_rows=num_rows, prefill_chunk=prompt * num_rows)
    # nothing is to end early, and no processor is to be at work
    unlikely = model.config.get_text_config(decoder=True).vocab_size - 1
    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=unlikely)
    generations = [
        engine.submit(Request(prompt=torch.randint(1000, (prompt,), generator=generator).tolist(), config=config))
        for _ in range(num_rows)
    ]
    while not all(generation.tokens for generation in generations):
        engine.step()
    before, started = sum(len(generation.tokens) for generation in generations), perf_counter()
    held = 0
    while not any(generation.is_finished for generation in generations):
        engine.step()
        held = max(held, _held_bytes(engine))
    seconds = perf_counter() - started
    tokens = sum(len(generation.tokens) for generation in generations) - before
    engine.run()
    engine.close()
    return tokens / seconds, held


def _held_bytes(engine: Engine) -> int:
    layers = engine._loop.target.cache.layers
    parts = [part for layer in layers if layer.is_initialized for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in parts)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--rows", default="1,2,4,8,16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [int(count) for count in options.rows.split(",")]
    model, _, name = load(options.model, threads=options.threads)
    if options.weights != "stock":
        prepare(model, weights=options.weights)
    forwards: list[dict[int, float]] = []
    speeds: dict[int, list[float]] = {count: [] for count in rows}
    held: dict[int, int] = {}
    for repetition in range(options.repetitions):
        forwards.append(measure_rows(model, most=max(rows), length=options.prompt + options.new // 2))
        for count in rows:
            speed, held[count] = measure(model, count, options.prompt, options.new, repetition)
            speeds[count].append(speed)
    row_seconds = {count: median(measured[count] for measured in forwards) for count in forwards[0]}
    capacity = Capacity(slot_bytes=slot_bytes(model.config, model.dtype), kv_bytes=0, row_seconds=row_seconds)
    table = [
        {
            "rows": count,
            "predicted_tokens_per_second": round(capacity.tokens_per_second(count), 1),
            "measured_tokens_per_second": round(median(speeds[count]), 1),
            "all": [round(speed, 1) for speed in speeds[count]],
            "measured_over_predicted": round(median(speeds[count]) / capacity.tokens_per_second(count), 2),
            "kv_bytes_held": held[count],
            "kv_bytes_of_slots": capacity.slot_bytes * count * (options.prompt + options.new),
        }
        for count in rows
    ]
    document: dict[str, Any] = {
        "model": name,
        "weights": options.weights,
        "threads": options.threads,
        "prompt": options.prompt,
        "new": options.new,
        "weight_bytes": weight_bytes(model),
        "slot_bytes": capacity.slot_bytes,
        "row_ms": {count: round(1000 * seconds, 2) for count, seconds in row_seconds.items()},
        "rows": table,
    }
    print(json.dumps(document, indent=2))
    if options.output is not None:
        write_json(options.output, document)


if __name__ == "__main__":
    main()
