"""What a multiply-add costs: native products by number of rows, beside torch's float32 and the processor's own limit.

    python -m bench.product_rate [--instructions avx2] [--outputs 4480] [--inputs 1536] [--seconds 20] [--threads 1]

Two matrices of each format take turns. A limit is measured in a loop without memory, compiled by `cc`, on one thread:
of the instructions that a product of that format takes at least. Billions of multiply-adds a second, the best of all
repetitions: of CPU time where there is one thread, which other programs disturb less. To limit torch as well:
ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2. The last line is JSON.
"""

import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench._script import add_instructions, parser_of, select_instructions
from specdec.kernels import native
from specdec.kernels.model.linear import float_matrix
from specdec.kernels.model.quantized_linear import Int4Linear, Int8Linear

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
_LIMITS = {  # by instruction set and format: instructions on register {r}, which is a sum, and their multiply-adds
    ("avx2", "float32"): ("vfmadd231ps %ymm12, %ymm13, %ymm{r};", 8),
    ("avx2", "int8"): (
        "vpsignb %ymm12, %ymm13, %ymm14; vpmaddubsw %ymm14, %ymm12, %ymm14; vpmaddwd %ymm14, %ymm13, %ymm14;"
        "vpaddd %ymm14, %ymm{r}, %ymm{r};",
        32,
    ),
    ("avx2", "int4"): ("vpmaddubsw %ymm12, %ymm13, %ymm14; vpaddw %ymm14, %ymm{r}, %ymm{r};", 32),
    ("avx512", "float32"): ("vfmadd231ps %zmm12, %zmm13, %zmm{r};", 16),
    ("avx512", "int8"): ("vpdpbusd %zmm12, %zmm13, %zmm{r};", 64),
    ("avx512", "int4"): ("vpdpbusd %zmm12, %zmm13, %zmm{r};", 64),
}
_NUM_SUMS, _TURNS = 12, 200_000


def limit(instructions: str) -> float:
    """Seconds that a set of instructions takes, on average over many with sums of their own."""
    body = "".join(f'"{instructions.format(r=r)}"\n' for r in range(_NUM_SUMS)).replace("%", "%%")
    clobbered = ", ".join(f'"xmm{r}"' for r in range(16))
    source = f"void run(long n) {{ while (n--) __asm__ volatile({body} ::: {clobbered}); }}"
    with tempfile.TemporaryDirectory() as folder:
        code, built = Path(folder) / "limit.c", Path(folder) / "limit.so"
        code.write_text(source)
        subprocess.run(["cc", "-O2", "-fPIC", "-shared", "-o", built, code], check=True)
        run = ctypes.CDLL(str(built)).run
    run.argtypes = (ctypes.c_long,)
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        run(_TURNS)
        best = min(best, time.thread_time() - start)
    return best / _TURNS / _NUM_SUMS


def products(n: int, k: int) -> dict[str, list[Callable[[torch.Tensor], torch.Tensor]]]:
    library = native.library()
    if library is None:
        raise SystemExit(native.describe())
    found: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    for _ in range(2):
        linear = nn.Linear(k, n, bias=False).requires_grad_(False)
        short = nn.Linear(k, n, bias=False).requires_grad_(False).bfloat16()
        matrices = {"float32": float_matrix(linear), "bfloat16": float_matrix(short)}
        matrices |= {"int8": Int8Linear(linear).matrix(), "int4": Int4Linear(linear).matrix()}
        found.setdefault("torch float32", []).append(lambda x, w=linear.weight: F.linear(x, w))
        for name, matrix in matrices.items():
            found.setdefault(name, []).append(lambda x, m=matrix: library.linear(m, x))
    return found


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__)
    for name, default in (("outputs", 4480), ("inputs", 1536), ("seconds", 20), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_instructions(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    select_instructions(arguments.instructions)
    found = products(arguments.outputs, arguments.inputs)
    best = {name: dict.fromkeys(ROWS, float("inf")) for name in found}
    deadline = time.perf_counter() + arguments.seconds
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    turn = 0
    while not turn or time.perf_counter() < deadline:
        for num_rows in ROWS[: len(ROWS) if turn % 4 == 0 else -2]:
            x_MK = torch.randn(num_rows, arguments.inputs)
            for name, pair in found.items():
                start = clock()
                for product in pair:
                    product(x_MK)
                best[name][num_rows] = min(best[name][num_rows], (clock() - start) / len(pair))
        turn += 1
    library = native.library()
    assert library is not None
    work = arguments.outputs * arguments.inputs / 1e9
    report = {name: {rows: work * rows / seconds for rows, seconds in times.items()} for name, times in best.items()}
    limits = {
        name: count / limit(instructions) / 1e9
        for (instruction_set, name), (instructions, count) in _LIMITS.items()
        if instruction_set == library.instruction_set
    }
    print(f"{native.describe()}, {arguments.threads} threads, billions of multiply-adds a second, by rows")
    print(f"{'':14}" + "".join(f"{rows:8}" for rows in ROWS) + "   limit of a thread")
    for name, rates in report.items():
        unit = f"{limits[name]:8.0f}" if name in limits else ""
        print(f"{name:14}" + "".join(f"{rate:8.1f}" for rate in rates.values()) + unit)
    print(json.dumps({"rates": report, "limits": limits, "seconds": best}))


if __name__ == "__main__":
    main()
