"""What attention over a long past costs: the native kernel by the past's length and the number of new tokens.

    python -m bench.attention_cost [--heads 9,3,64] [--lengths 1024,4096,8192] [--tokens 1,2,4,8,16] [--seconds 20]
        [--threads 1] [--instructions avx2] [--prefill]

HEADS are query heads, key/value heads and their size: 9,3,64 of the demo model, 14,2,64 of Qwen2.5's 0.5B, 12,2,128 of
its 1.5B. As many layers take turns as fill a quarter of a gigabyte, so that no past stays in a cache. Milliseconds of a
layer, the best of all repetitions, beside the rate at which float32 keys and values were read (GB/s, each counted once)
and the multiply-adds (billions a second). `copy` is what a copy of the same bytes by numpy reads, as a measure of the
memory. With --prefill, the tokens are the past: each sees those before it. The last line is JSON.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch

from bench._script import add_instructions, parser_of, pipe_table, select_instructions
from specdec.kernels import native

_BYTES = 1 << 28


class Case:
    """Attention of `num_tokens` tokens after a past, with the mask that a forward would give it."""

    def __init__(self, heads: tuple[int, int, int], length: int, num_tokens: int, layers: list[torch.Tensor]):
        H, _, D = heads
        self.query_BTHD = torch.randn(1, num_tokens, H, D)
        mask = None
        if num_tokens < length:
            mask = torch.ones(1, 1, num_tokens, length, dtype=torch.bool).tril(length - num_tokens)
        self._calls = [native.attention(self.query_BTHD, layer[0], layer[1], mask, D**-0.5) for layer in layers]
        seen = sum(range(length - num_tokens + 1, length + 1))
        self.multiply_adds = 2 * H * D * seen
        self.num_bytes = layers[0].nbytes
        self.best = float("inf")
        self._turn = 0

    def time(self, library: native.Library) -> None:
        call = self._calls[self._turn % len(self._calls)]
        self._turn += 1
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        library.attend(self.query_BTHD, call)
        self.best = min(self.best, clock() - started)


def copy_rate(num_bytes: int) -> float:
    """Bytes a second that are read and written elsewhere."""
    source, best = np.ones(_BYTES // 4, np.float32), float("inf")
    for start in range(0, _BYTES - num_bytes + 1, num_bytes):
        part = source[start // 4 : (start + num_bytes) // 4]
        started = time.perf_counter()
        part.max()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--heads", default="9,3,64")
    parser.add_argument("--lengths", default="1024,4096,8192,16384,32768")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill", action="store_true")
    add_instructions(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    select_instructions(options.instructions)
    library = native.library()
    if library is None:
        raise SystemExit(native.describe())
    num_heads, num_kv_heads, size = map(int, options.heads.split(","))
    lengths = list(map(int, options.lengths.split(",")))
    lines, report = [], []
    for length in lengths:
        layer_bytes = 2 * num_kv_heads * length * size * 4
        count = max(_BYTES // layer_bytes, 2)
        layers = [torch.randn(2, 1, num_kv_heads, length, size) for _ in range(count)]
        widths = [length] if options.prefill else list(map(int, options.tokens.split(",")))
        cases = {width: Case((num_heads, num_kv_heads, size), length, width, layers) for width in widths}
        deadline = time.perf_counter() + options.seconds / len(lengths)
        while True:
            for case in cases.values():
                case.time(library)
            if time.perf_counter() > deadline:
                break
        for width, case in cases.items():
            entry = {
                "length": length,
                "tokens": width,
                "ms": 1000 * case.best,
                "read_gb_s": case.num_bytes / case.best / 1e9,
                "multiply_adds_g_s": case.multiply_adds / case.best / 1e9,
            }
            report.append(entry)
            lines.append([length, width, *(f"{entry[name]:.2f}" for name in ("ms", "read_gb_s", "multiply_adds_g_s"))])
    print(f"{native.describe()}, {options.threads} threads, heads {options.heads}")
    print(pipe_table(["past", "tokens", "ms a layer", "GB/s", "billion multiply-adds/s"], lines))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
