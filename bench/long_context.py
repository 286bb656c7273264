"""What a token costs at the end of a long text, plain and drafted with a part of it, and what reading the text costs.

    python -m bench.long_context [MODEL] [--lengths 256,1024,4096,8000] [--weights int8] [--tokens 64] [--repeats 3]
        [--methods plain,auto,sparse-self] [--threads 1] [--instructions avx2] [--llama FILE.gguf] [--keep FOLDER]
        [--output FILE.json]

The text is this project's documentation, followed by the request to sum it up. Each length goes on reading where the
one before stopped, and every method goes on from there, in turns; equal output is checked. Seconds of prefill are those
of all that has been read of the text so far. Its memory, told of the first length only, is the peak that it adds, with
the keys and values, which are named beside it. Milliseconds a token are medians over the turns after the first token;
`auto` learns from one turn to the next. With --llama, llama.cpp reads and continues the same token ids.
With --keep, what has been read stays in a folder for the next call, which then times decoding only: for machines that
are quiet for a short time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from bench._script import (
    WEIGHTS,
    add_instructions,
    command,
    parser_of,
    pipe_table,
    select_instructions,
    write_json,
)
from specdec.bench.memory import PeakMemory
from specdec.bench.peers import PLAIN
from specdec.bench.peers.llama_cpp import LlamaCpp, LlamaFiles, llama_lacks
from specdec.drafters import Plain
from specdec.kernels import prepare
from specdec.models import LoadedModel, load
from specdec.specs import DrafterSpec
from specdec.testing.equality import compare

DOCS = Path(__file__).parent.parent / "docs"
REQUEST = "\n\nA summary of the text above, in a few paragraphs:\n\n"


@dataclass(slots=True)
class Read:
    """What has been read of the texts before: they begin alike."""

    ids: list[int] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    seconds: float = 0.0


class Text:
    """A text of so many tokens, and what the model has read of it: all but the last token.

    Attributes:
        prefill: what reading took, None where it has been kept from another call.
    """

    def __init__(self, loaded: LoadedModel, length: int, keep: Path | None, read: Read):
        self.model = loaded.model
        self.ids_1P = _prompt(loaded, length)
        self._read_before = read
        self._file = None if keep is None else keep / f"{length}.pt"
        self.prefill: dict[str, float | None] | None = None
        self._layers = self._read()

    def past(self) -> DynamicCache:
        """A cache of its own for a call."""
        return _cache(self._layers)

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        if self._file is not None and self._file.exists():
            kept: list[tuple[Tensor, Tensor]] = torch.load(self._file, mmap=True)
            return kept
        memory = PeakMemory(self.model.device)
        memory.reset()
        before = memory.mib()
        past = self._read_before
        num_same = _num_same(past.ids, self.ids_1P[0].tolist())
        known = [(keys[:, :, :num_same], values[:, :, :num_same]) for keys, values in past.layers] if num_same else []
        options = {"past_key_values": _cache(known)} if known else {}
        out = _generate(self.model, self.ids_1P, Plain(), 1, **options)
        peak = memory.mib()
        layers = [(layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in out.past_key_values.layers]
        past.ids, past.layers = self.ids_1P[0, :-1].tolist(), layers
        past.seconds += out.stats.prefill_seconds
        self.prefill = {
            "seconds": past.seconds,
            "memory_mib": None if known or peak is None or before is None else peak - before,
            "keys_and_values_mib": sum(part.nbytes for layer in layers for part in layer) / 2**20,
        }
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            torch.save([tuple(part.contiguous() for part in layer) for layer in layers], self._file)
        return layers


def _cache(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(*layer, index)
    return cache


def _num_same(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _prompt(loaded: LoadedModel, length: int) -> Tensor:
    assert loaded.tokenizer is not None
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(DOCS.glob("*.md")))
    ids, request = (loaded.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, REQUEST))
    ids *= -(-length // len(ids))
    return torch.tensor([[*ids[: length - len(request)], *request]])


def _generate(model: Any, ids_1P: Tensor, drafter: specdec.drafters.Drafter, num_new: int, **options: Any) -> Any:
    limits = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    return specdec.generate(model, ids_1P, drafter=drafter, return_dict_in_generate=True, **limits, **options)


def measure(loaded: LoadedModel, length: int, options: argparse.Namespace, read: Read) -> Iterator[dict[str, Any]]:
    """One entry for each method."""
    text = Text(loaded, length, options.keep, read)
    methods = {name: DrafterSpec.parse(name).build() for name in options.methods.split(",")}
    runs: dict[str, list[Any]] = {name: [] for name in methods}
    for _ in range(options.repeats):
        for name, drafter in methods.items():
            out = _generate(text.model, text.ids_1P, drafter, options.tokens, past_key_values=text.past())
            out.past_key_values = None
            runs[name].append(out)
    reference = next(iter(runs.values()))[0]
    for name, outs in runs.items():
        stats = outs[-1].stats
        yield {
            "length": length,
            "method": name,
            "ms_per_token": [_ms_per_token(out.stats.token_seconds, out.stats.setup_seconds) for out in outs],
            "tokens_per_round": stats.tokens_per_round,
            "acceptance_rate": stats.acceptance_rate,
            "draft_share": stats.draft_seconds / (stats.draft_seconds + stats.verify_seconds),
            "output": sorted({_compare(text, reference, out) for out in outs}),
            "prefill": text.prefill,
        }


def _ms_per_token(seconds: Sequence[float], setup_seconds: float = 0.0) -> float:
    """After the first; without the work that the next call will not do again, such as timing forwards."""
    return 1000 * (seconds[-1] - seconds[0] - setup_seconds) / (len(seconds) - 1)


def _compare(text: Text, reference: Any, out: Any) -> str:
    first, other = (each.sequences[0, text.ids_1P.shape[1] :].tolist() for each in (reference, out))
    return compare(text.model, text.ids_1P[0], first, other, {"do_sample": False}).verdict.name.lower()


def measure_llama(loaded: LoadedModel, length: int, options: argparse.Namespace) -> dict[str, Any]:
    files, room = LlamaFiles(target=options.llama, draft=None), length + options.tokens
    peer = LlamaCpp(PLAIN, {}, files, num_threads=options.threads, context_length=room)
    ids = _prompt(loaded, length)[0].tolist()
    peer.complete(ids[:8], 4)
    run = peer.complete(ids, options.tokens)
    prefill = {"seconds": run.token_seconds[0], "memory_mib": None, "keys_and_values_mib": None}
    return {
        "length": length,
        "method": "llama.cpp",
        "ms_per_token": [_ms_per_token(run.token_seconds)],
        "prefill": prefill,
    }


def _line(entry: dict[str, Any], plain_ms: float) -> list[str]:
    ms, prefill = median(entry["ms_per_token"]), entry["prefill"] or {}
    memory, states = prefill.get("memory_mib"), prefill.get("keys_and_values_mib")
    return [
        f"{entry['length']}",
        entry["method"],
        f"{ms:.1f}",
        f"{plain_ms / ms:.2f}x",
        f"{entry['tokens_per_round']:.2f}" if "tokens_per_round" in entry else "",
        ", ".join(entry.get("output", ["not compared"])),
        f"{prefill['seconds']:.1f}" if prefill else "",
        "" if memory is None or states is None else f"{memory:.0f} ({states:.0f})",
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--lengths", default="256,1024,4096,8000")
    parser.add_argument("--methods", default="plain,auto,sparse-self")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_instructions(parser)
    parser.add_argument("--llama", type=Path, help="a GGUF file that llama.cpp reads")
    parser.add_argument("--keep", type=Path, help="folder for what has been read of a text")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.llama and (lack := llama_lacks(PLAIN, LlamaFiles(target=options.llama, draft=None))):
        parser.error(lack)
    torch.set_num_threads(options.threads)
    select_instructions(options.instructions)
    loaded = load(options.model)
    prepare(loaded.model, options.weights)
    entries: list[dict[str, Any]] = []
    headings = [
        "tokens",
        "method",
        "ms a token",
        "to first",
        "a round",
        "output",
        "prefill s",
        "its MiB (keys, values)",
    ]
    print(pipe_table(headings, []), flush=True)
    read = Read()
    for length in map(int, options.lengths.split(",")):
        found = list(measure(loaded, length, options, read))
        if options.llama:
            found.append(measure_llama(loaded, length, options))
        plain_ms = median(found[0]["ms_per_token"])
        for entry in found:
            print("|", " | ".join(_line(entry, plain_ms)), "|", flush=True)
        entries += found
    if options.output:
        write_json(options.output, {"command": command("long_context"), "entries": entries})


if __name__ == "__main__":
    main()
