"""`specdec serve` beside llama.cpp's own server, under streaming clients of a third-party load tool.

    python -m bench.serve_peers demo --aiperf ENVIRONMENT/bin/aiperf --clients 1,4,16,64 \\
        --servers gguf,int4,llama.cpp --output bench/results/serve-peers-demo

The load is AIPerf's (`pip install aiperf`, into an environment of its own: it pins what it needs). So many clients send
the built-in suite's prompts, one after the other each, greedily, as streams; the servers have them in turn, each in a
process of its own with --threads threads, and decode at most --max-rows at once. `gguf`, `int4`, ... are specdec's with
these weights, all of one file, which llama.cpp reads as it is. A warm-up of a few requests is not counted.

    tokens/s           of all clients, over the whole time, the last answers included
    first token        milliseconds from a request to its first token, waiting included
    between tokens     of an answer: its time after the first token, for each further token
    others             cores that other programs kept busy meanwhile: a cell is worth something where that is near 0
    between parts      from one part of a stream to the next: with speculation a part has several tokens

What was measured is merged into OUTPUT.json by server and number of clients, and OUTPUT.md written anew: a machine that
is quiet for a minute at a time can measure a few cells in each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx2
import psutil

from bench._script import add_instructions, command, log, parser_of, pipe_table, write_report
from bench.served import START_SECONDS, Served, server, started
from specdec import kernels
from specdec.bench.peers import LLAMA_CPP
from specdec.bench.peers.llama_cpp import LlamaFiles, describe, find_gguf
from specdec.models import pull_demo
from specdec.suites import load_suite

COLUMNS = (
    ("tokens/s", "output_token_throughput", "avg"),
    ("first token p50, ms", "time_to_first_token", "p50"),
    ("p99", "time_to_first_token", "p99"),
    ("between tokens p50, ms", "inter_token_latency", "p50"),
    ("p99", "inter_token_latency", "p99"),
    ("between parts p99, ms", "inter_chunk_latency", "p99"),
    ("answers", "request_count", "avg"),
    ("failed", "error_request_count", "avg"),
)


def serving(name: str, file: Path, arguments: argparse.Namespace) -> AbstractContextManager[Served]:
    """A server of this name: llama.cpp's, or specdec's with such weights."""
    if name != LLAMA_CPP:
        return server(argparse.Namespace(**vars(arguments) | {"weights": name}))
    options = {"threads": arguments.threads, "slots": arguments.max_rows, "clients": arguments.clients}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    return started([sys.executable, "-m", "bench.serve_llama", str(file), *words])


def load(served: Served, arguments: argparse.Namespace) -> dict[str, Any]:
    """AIPerf's own report."""
    model = httpx2.get(f"{served.url}/v1/models", timeout=START_SECONDS).raise_for_status().json()["data"][0]["id"]
    with tempfile.TemporaryDirectory() as folder:
        prompts = load_suite().select(arguments.categories.split(",")).prompts
        Path(folder, "prompts.jsonl").write_text("".join(json.dumps({"text": one.text}) + "\n" for one in prompts))
        words = [
            *(arguments.aiperf, "profile", "--model", model, "--url", served.url),
            *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
            *("--tokenizer", str(arguments.tokenizer), "--input-file", f"{folder}/prompts.jsonl"),
            *("--custom-dataset-type", "single_turn", "--dataset-sampling-strategy", "sequential"),
            *("--extra-inputs", "temperature:0", "--extra-inputs", f"max_tokens:{arguments.max_new_tokens}"),
            *("--concurrency", str(arguments.clients), "--benchmark-duration", str(arguments.seconds)),
            *("--warmup-request-count", str(min(4, arguments.clients)), "--artifact-dir", f"{folder}/found"),
            *("--benchmark-grace-period", "inf", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found = Path(folder, "found", "profile_export_aiperf.json")
        if done.returncode or not found.is_file():
            raise RuntimeError(f"the load tool has failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return json.loads(found.read_text())


def measure(name: str, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One cell: this server under `arguments.clients` clients."""
    with serving(name, file, arguments) as served:
        log(f"{name}, {arguments.clients} clients")
        before, started_at = others_seconds(served), perf_counter()
        found = load(served, arguments)
        others = (others_seconds(served) - before) / (perf_counter() - started_at)
        memory = served.peak_memory_mib()
    row = {f"{metric} {share}": found[metric][share] for _, metric, share in COLUMNS if found.get(metric)}
    return {**row, "memory_mib": memory, "others": others, "aiperf": found["aiperf_version"]}


def others_seconds(served: Served) -> float:
    """Processor time of all programs so far but the server and those that this process has waited for."""
    assert served.process is not None
    everybody, own, server_times = psutil.cpu_times(), os.times(), served.process.cpu_times()
    ours = own.user + own.system + own.children_user + own.children_system + server_times.user + server_times.system
    return everybody.user + everybody.nice + everybody.system - ours


def merged(output: Path, rows: dict[str, Any], file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """With what was measured before."""
    path = Path(f"{output}.json")
    document = json.loads(path.read_text()) if path.is_file() else {"commands": [], "cells": {}}
    document["commands"] = list(dict.fromkeys([*document["commands"], command("serve_peers")]))
    document["machine"] = {"kernels": kernels.describe(), **describe(LlamaFiles(target=file, draft=None))}
    cells = document["cells"].setdefault(str(arguments.clients), {})
    for name, row in rows.items():
        suffix = f" {arguments.instructions}" if arguments.instructions and name != LLAMA_CPP else ""
        cells[name + suffix] = row
    return document


def report(document: dict[str, Any]) -> tuple[str, ...]:
    lines = []
    for clients, cells in sorted(document["cells"].items(), key=lambda item: int(item[0])):
        for name, row in cells.items():
            figures = [
                f"{row.get(f'{metric} {share}', 0):.{int(share == 'avg' and metric.endswith('throughput'))}f}"
                for _, metric, share in COLUMNS
            ]
            lines.append((clients, name, *figures, f"{row['memory_mib']:.0f}", f"{row['others']:.2f}"))
    headings = ("clients", "server", *(heading for heading, _, _ in COLUMNS), "peak, MiB", "others")
    commands = "\n".join(f"    {each}" for each in document["commands"])
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items() if value)
    return "# specdec serve beside llama.cpp's server", commands, machine, pipe_table(headings, lines)


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp, if it is not MODEL itself")
    parser.add_argument("--servers", default=f"gguf,int4,{LLAMA_CPP}")
    parser.add_argument("--clients", dest="all_clients", default="4", help="numbers of them, measured in turn")
    parser.add_argument("--seconds", type=int, default=10, help="then no new request is sent")
    parser.add_argument("--categories", default="chat,math", help="of the suite")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-rows", type=int, default=16, help="requests that are decoded at once")
    parser.add_argument("--threads", type=int, default=1, help="of the servers")
    parser.add_argument("--drafter", default="auto", help="of specdec's")
    parser.add_argument("--aiperf", default="aiperf", help="the load tool's program")
    parser.add_argument("--tokenizer", type=Path, help="a folder, for the load tool; of the demo model its own")
    parser.add_argument("--output", type=Path, required=True, help="of the reports, without a suffix")
    add_instructions(parser)
    parser.set_defaults(url=None, max_cached_tokens=None)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    file = find_gguf(arguments.gguf, arguments.model)
    if file is None:
        raise SystemExit("llama.cpp reads a GGUF file of the model: give it with --gguf")
    arguments.tokenizer = arguments.tokenizer or pull_demo()
    for clients, name in product(map(int, arguments.all_clients.split(",")), arguments.servers.split(",")):
        arguments.clients = clients
        document = merged(arguments.output, {name: measure(name, file, arguments)}, file, arguments)
        write_report(arguments.output, document, *report(document))
    print("\n\n".join(report(document)))


if __name__ == "__main__":
    main()
