"""A GGUF file executed as it is, beside the same file dequantised, and beside llama.cpp.

    python -m bench.gguf_file FILE [--threads 1] [--instructions avx2] [--measure speed,memory,perplexity]
        [--prompt 512] [--tokens 32] [--repetitions 3] [--text 4096]

`speed`: a prompt of so many tokens and plain decoding, in turn with llama.cpp in one process, the best of the
repetitions. `memory`: start-up and peak of a process of each, which reads the prompt and decodes the tokens; what of it
is there before a model is loaded (torch and transformers) is said. `perplexity`: of Python source, in pieces of 64
tokens, natively and dequantised (of 1,024 tokens alone it changes by 0.3 % with every rounding). The last line of
stdout is JSON.
"""

import argparse
import inspect
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench._script import add_instructions, parser_of, select_instructions
from bench.forward_cost import perplexity
from specdec import kernels, models
from specdec.bench.peers import PLAIN
from specdec.bench.peers.llama_cpp import LlamaCpp, LlamaFiles, llama_lacks
from specdec.generation import generate
from specdec.kernels.model.quantized_linear import QuantizedLinear

_MEASURES = ("speed", "memory", "perplexity")


def ids_of(file: Path, length: int) -> torch.Tensor:
    """The beginning of a Python source, [1, length]."""
    checkpoint = models.gguf.described(file)
    return checkpoint.read_tokenizer()(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :length]


def llama_of(file: Path, arguments: argparse.Namespace) -> LlamaCpp:
    files = LlamaFiles(target=file, draft=None)
    if lacks := llama_lacks(PLAIN, files):
        raise SystemExit(lacks)
    return LlamaCpp(PLAIN, {}, files, num_threads=arguments.threads, context_length=arguments.prompt + arguments.tokens)


def times_of(stamps: list[float]) -> dict[str, float]:
    """Of the prompt, which gives the first token, and of each further token."""
    return {"prompt_s": stamps[0], "token_ms": 1e3 * (stamps[-1] - stamps[0]) / (len(stamps) - 1)}


def decode(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int) -> dict[str, float]:
    stamps: list[float] = []

    class Stamps:
        def put(self, value: torch.Tensor) -> None:
            stamps.append(time.perf_counter() - start)

        def end(self) -> None:
            pass

    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "drafter": "plain"}
    start = time.perf_counter()
    generate(model, ids, attention_mask=torch.ones_like(ids), streamer=Stamps(), **options)
    return times_of(stamps[1:])  # the first is the prompt


def measure_speed(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    model, llama = load(arguments), llama_of(arguments.file, arguments)
    ids, best = ids_of(arguments.file, arguments.prompt), {"specdec": {}, "llama.cpp": {}}
    for _ in range(arguments.repetitions):
        for name, found in (
            ("specdec", decode(model, ids, arguments.tokens)),
            ("llama.cpp", times_of(llama.complete(ids[0].tolist(), arguments.tokens).token_seconds)),
        ):
            best[name] = {key: min(value, best[name].get(key, value)) for key, value in found.items()}
    return best


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    return models.load(arguments.file, weights="gguf", threads=arguments.threads).model


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_one(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    ids, before_mib, start = ids_of(arguments.file, arguments.prompt), peak_mib(), time.process_time()
    if name == "llama.cpp":
        llama_of(arguments.file, arguments).complete(ids[0].tolist(), arguments.tokens)
        return {"before_mib": before_mib, "peak_mib": peak_mib()}
    model = load(arguments)
    report = {"ready_cpu_s": time.process_time() - start, "before_mib": before_mib, "ready_mib": peak_mib()}
    decode(model, ids, arguments.tokens)
    packed = [part.packed for part in model.modules() if isinstance(part, QuantizedLinear) and part.library]
    return report | {"peak_mib": peak_mib(), "packed_mib": sum(each.numel() for each in packed) / 2**20}


def measure_memory(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    models.gguf.described(arguments.file)  # it is the second start that is measured
    report = {}
    for name in ("specdec", "llama.cpp"):
        command = [sys.executable, "-m", "bench.gguf_file", *sys.argv[1:], "--one", name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        report[name] = json.loads(run.stdout.splitlines()[-1])
    return report


def measure_perplexity(arguments: argparse.Namespace) -> dict[str, float]:
    ids = ids_of(arguments.file, arguments.text)
    report = {"gguf": perplexity(load(arguments), ids)}
    dequantised = models.load(arguments.file, dtype="float32", device="cpu").model
    return report | {"float": perplexity(dequantised, ids)}


@torch.inference_mode()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--measure", default=",".join(_MEASURES), help="joined by commas")
    for name, default in (("threads", 1), ("prompt", 512), ("tokens", 32), ("repetitions", 3), ("text", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_instructions(parser)
    parser.add_argument("--one", choices=("specdec", "llama.cpp"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.measure.split(",")
    if unknown := set(wanted) - set(_MEASURES):
        parser.error(f"--measure: {', '.join(unknown)} is none of {', '.join(_MEASURES)}")
    select_instructions(arguments.instructions)
    if arguments.one:
        print(json.dumps(measure_one(arguments.one, arguments)))
        return
    report = {"file": arguments.file.name, "threads": arguments.threads, "kernels": kernels.describe()}
    measures = {"speed": measure_speed, "memory": measure_memory, "perplexity": measure_perplexity}
    for name in wanted:
        report[name] = measures[name](arguments)
        for key, value in report[name].items():
            print(f"{name}, {key}: {value}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
