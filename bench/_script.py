"""What the scripts share: arguments, progress, tables and reports."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from specdec.kernels import native
from specdec.model_options import Weights

RESULTS = Path(__file__).parent / "results"
WEIGHTS: tuple[str, ...] = tuple(name for name in get_args(Weights) if name != "gguf")
"""That a float model can be given."""


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def pair_parser(doc: str | None, *, limit: int, max_new_tokens: int) -> argparse.ArgumentParser:
    """The same for scripts that decode Spec-Bench's questions with a target and a draft."""
    parser = parser_of(doc)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--prompts", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="of the reports, without a suffix")
    parser.add_argument("--limit", type=int, default=limit, help="questions of each task")
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def add_instructions(parser: argparse.ArgumentParser) -> None:
    """`--instructions`, for `select_instructions`."""
    names = native.INSTRUCTION_SETS
    parser.add_argument("--instructions", choices=names, help="of the native kernels; the best there is, if absent")


def select_instructions(name: str | None) -> None:
    library = native.library()
    if name and library is None:
        raise SystemExit(f"--instructions {name}: {native.describe()}")
    if name and library:
        library.select(name)


def command(name: str) -> str:
    """How a script was called; of an absolute path only its last part: where it lies is nobody's business."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return shlex.join(["python", "-m", f"bench.{name}", *words])


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pipe_table(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (headings, ["---"] * len(headings), *lines))


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_report(output: Path, document: Any, *parts: str) -> None:
    """OUTPUT.json, and OUTPUT.md of parts with a blank line between them."""
    write_json(Path(f"{output}.json"), document)
    Path(f"{output}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def percentiles(values: Sequence[float], shares: Sequence[int] = (50, 99, 100)) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(values, share)) for share in shares} if values else {}
