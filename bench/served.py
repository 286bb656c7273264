"""A server in a process of its own, that can be looked at."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil

START_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server; `process` and `log_file` only of one that can be looked at."""

    url: str
    process: psutil.Process | None
    log_file: Path | None

    def memory_mib(self) -> float | None:
        return None if self.process is None else self.process.memory_info().rss / 2**20

    def peak_memory_mib(self) -> float:
        """At most so far (Linux)."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10

    def num_tracebacks(self) -> int:
        return 0 if self.log_file is None else self.log_file.read_text(errors="replace").count("Traceback")


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[Served]:
    """The one at --url, or one of our own, in a process of its own."""
    if arguments.url is not None:
        process = None if arguments.pid is None else psutil.Process(arguments.pid)
        yield Served(url=arguments.url.rstrip("/").removesuffix("/v1"), process=process, log_file=None)
        return
    with started(_command(arguments)) as served:
        yield served


@contextmanager
def started(command: Sequence[str]) -> Iterator[Served]:
    """A server that says on stderr where it listens: "... at http://..."."""
    environment = {name: value for name, value in os.environ.items() if name != "SPECDEC_API_KEY"}
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder, "log")
        # a file: a server whose log nobody reads would wait
        with log_file.open("w") as out, subprocess.Popen(command, stderr=out, env=environment) as process:
            try:
                url = _announced(process, log_file)
                yield Served(url=url, process=psutil.Process(process.pid), log_file=log_file)
            finally:
                process.terminate()


def _command(arguments: argparse.Namespace) -> list[str]:
    program = "from specdec.cli import main; main()"
    if arguments.instructions is not None:
        program = f"from bench._script import select_instructions as s; s({arguments.instructions!r}); {program}"
    command = [sys.executable, "-c", program, "serve", arguments.model, "--port", "0"]
    command += ["--weights", arguments.weights, "--drafter", arguments.drafter, "--threads", str(arguments.threads)]
    command += ["--max-rows", str(arguments.max_rows), "--max-waiting", str(max(256, 2 * arguments.clients))]
    if arguments.max_cached_tokens is not None:
        command += ["--max-cached-tokens", str(arguments.max_cached_tokens)]
    return command


def _announced(process: subprocess.Popen[bytes], log_file: Path) -> str:
    deadline = monotonic() + START_SECONDS
    while monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text(errors="replace").splitlines():
            if " at http" in line:
                return line.rpartition(" at ")[2].strip().removesuffix("/v1")
        sleep(0.1)
    raise RuntimeError(f"the server has not started:\n{log_file.read_text(errors='replace')}")
