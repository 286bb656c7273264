"""llama.cpp's own server (of the wheel `xllamacpp`, the extra `peers`) in a process that can be looked at.

    python -m bench.serve_llama FILE.gguf [--threads 1] [--slots 16] [--context 1024] [--clients 64]

It says on stderr where it listens, and ends when it is told to. Everything but what is above is llama.cpp's default:
continuous batching, prompts that are kept, the layout of its cache.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from bench._script import parser_of
from specdec.bench.peers import PLAIN
from specdec.bench.peers.llama_cpp import LlamaFiles, llama_lacks, xllamacpp


def params_of(arguments: argparse.Namespace) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(arguments.file)
    params.n_parallel, params.n_ctx = arguments.slots, arguments.slots * arguments.context
    params.n_threads_http = arguments.clients + 8  # one waits for each stream
    params.n_gpu_layers, params.port, params.fit_params, params.verbosity = 0, 0, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    return params


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=16, help="requests that are decoded at once")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a slot")
    parser.add_argument("--clients", type=int, default=64, help="connections at once")
    arguments = parser.parse_args()
    if lacks := llama_lacks(PLAIN, LlamaFiles(target=arguments.file, draft=None)):
        raise SystemExit(lacks)
    server = xllamacpp.Server(params_of(arguments))
    print(f"llama.cpp at {server.listening_address}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
