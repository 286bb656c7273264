"""Does a long generation stay as quick and as small as a short one?

    python -m bench.long_run MODEL [--tokens 4000] [--weights int8] [--threads 1]

Generates plainly and with prompt lookup, end-of-sequence tokens ignored. Prints milliseconds a token in each quarter of
the run (attention over a longer context costs more by right), and the slope of the resident memory after the first
quarter beside what the KV cache alone needs. Pages of mapped files do not count: rows of the embedding that a new token
brings in, with their neighbours, which the system takes back when it likes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

import specdec
from bench._script import WEIGHTS, parser_of
from specdec.drafters import Drafter, Plain, PromptLookup
from specdec.models import load

PROMPT = "Write down everything you know about rivers, and then about mountains."
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Without what is shared or a file's."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * PAGE_BYTES


@dataclass
class Probe(BaseStreamer):
    """Notes the time and the resident memory at every token."""

    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(perf_counter())
        self.resident.append(resident_bytes())

    def end(self) -> None:
        pass


def kv_bytes_per_token(model) -> int:
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 4


def report(name: str, probe: Probe, kv_bytes: int) -> None:
    per_token_ms = 1000 * np.diff(probe.seconds[1:])
    quarters = [float(np.mean(part)) for part in np.array_split(per_token_ms, 4)]
    tokens = np.arange(len(probe.resident))
    settled = slice(len(tokens) // 4, None)
    slope = np.polyfit(tokens[settled], np.array(probe.resident)[settled], 1)[0]
    print(
        f"{name:<14} {' '.join(f'{ms:7.1f}' for ms in quarters)}   median {median(per_token_ms):6.1f}   "
        f"RSS {slope / 1024:6.1f} KiB a token, KV {kv_bytes / 1024:.1f}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--weights", choices=(*WEIGHTS, "gguf"), default="int8", help="gguf: a file as it is")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    as_it_is = args.weights == "gguf"
    model, tokenizer, _ = load(args.model, threads=args.threads, weights="gguf" if as_it_is else None)
    if args.weights != "stock" and not as_it_is:
        specdec.prepare(model, weights=args.weights)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    print(f"{'':<14} {'ms a token, by quarter':>31}")
    drafters: dict[str, Drafter] = {"plain": Plain(), "prompt-lookup": PromptLookup()}
    for name, drafter in drafters.items():
        probe = Probe()
        specdec.generate(
            model,
            **inputs,
            max_new_tokens=args.tokens,
            eos_token_id=None,
            do_sample=False,
            drafter=drafter,
            streamer=probe,
        )
        report(name, probe, kv_bytes_per_token(model))


if __name__ == "__main__":
    main()
