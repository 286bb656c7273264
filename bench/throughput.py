"""Tokens per second by batch size: the engine with speculation, without it, and transformers' own ways to batch.

    python -m bench.throughput [MODEL] [--sizes 1,2,4,8,16] [--prompts FILE.jsonl] [--num-prompts 16]
        [--max-new-tokens 48] [--repetitions 3] [--peer-repetitions 1] [--threads 1] [--contenders NAME,...]
        [--ragged] [--instructions avx2] [--out NAME]

Distinct prompts, taken from the suite's categories in turn, are decoded greedily in batches of each size; everyone
decodes the same batches, interleaved in one process, prefill included, until the end-of-sequence token or the limit. A
rate is the tokens of all batches over the median of the repetitions of their wall times. The engine works on int8
weights. transformers has the float32 model and its bfloat16 copy, and, as `transformers-int8`, the very model that the
engine has. The engine's outputs must be those of `model.generate()` for each prompt alone but for numerical ties, or
the run fails. `auto_over_plain_decoding` is auto over plain without the time in which prompts were read, which drafts
cannot save and which is most of it for short answers.

`--ragged`, for the engine alone: prompts of 16 to 1,500 tokens, the end of several texts of the suite, with limits
from a third of `--max-new-tokens` on; twice as many as there are rows are submitted at once, so that half of them
arrive when others end.

`--out NAME` merges the sizes that were measured into `bench/results/NAME.json` and writes `NAME.md`
anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

import specdec
from bench._script import (
    RESULTS,
    add_instructions,
    command,
    log,
    parser_of,
    pipe_table,
    select_instructions,
    write_report,
)
from specdec.drafters import Auto, Drafter, Plain
from specdec.engine import Engine, Request
from specdec.models import load
from specdec.suites import Suite, load_suite
from specdec.testing.equality import Verdict, compare
from specdec.text.prompting import encode_prompts

AUTO, PLAIN = "engine-auto", "engine-plain"
PEERS = ("transformers-float32", "transformers-bfloat16", "transformers-int8", "continuous-float32")

SHORTEST, LONGEST = 16, 1500
"""Tokens of ragged prompts."""

Batch = list[list[int]]
Decode = Callable[[Batch], Batch]


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--sizes", default="1,2,4,8,16")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peer-repetitions", type=int, default=1, help="of the first batch of each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", default=",".join((AUTO, PLAIN, *PEERS)))
    parser.add_argument("--ragged", action="store_true")
    add_instructions(parser)
    parser.add_argument("--out")
    return parser.parse_args()


def in_turn(suite: Suite, count: int) -> list[str]:
    """Prompts of every category in turn, so that every batch is mixed."""
    columns = [suite.select([category]).prompts for category in suite.categories]
    mixed = [prompt.text for row in zip_longest(*columns) for prompt in row if prompt is not None]
    if len(mixed) < count:
        raise SystemExit(f"the suite has {len(mixed)} prompts, {count} are wanted: pass --prompts or --num-prompts")
    return mixed[:count]


def ragged(prompts: Batch) -> Batch:
    """As many prompts of `SHORTEST` to `LONGEST` tokens, which the texts before each of them fill up; lengths grow by
    the same factor, and stand so that those of any neighbours differ."""
    bits = max(len(prompts) - 1, 1).bit_length()
    ragged_prompts = []
    for number, prompt in enumerate(prompts):
        share = int(f"{number:0{bits}b}"[::-1], 2) / (2**bits - 1)
        length = round(SHORTEST * (LONGEST / SHORTEST) ** share)
        text, before = prompt, number - 1
        while len(text) < length:
            text, before = prompts[before] + text, before - 1
        ragged_prompts.append(text[-length:])
    return ragged_prompts


class Contenders:
    """The ways to decode a batch, each made when it is first asked for.

    Args:
        num_rows: of the engine; None: as many as there are prompts.
    """

    def __init__(self, model: str, max_new_tokens: int, *, is_ragged: bool = False):
        self.num_rows: int | None = None
        self._is_ragged = is_ragged
        self._source = model
        self.int8, self.tokenizer, _ = load(model)
        specdec.prepare(self.int8.float(), weights="int8")
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=self.int8.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        self.reading_seconds = 0.0
        """Of the engine's last batch: spent on its prompts."""
        self._alone: dict[tuple[int, ...], list[int]] = {}
        self._stock: dict[torch.dtype, PreTrainedModel] = {}

    def encode(self, texts: Sequence[str]) -> Batch:
        return [encode_prompts(self.tokenizer, [text])["input_ids"][0].tolist() for text in texts]

    def alone(self, prompt: list[int]) -> list[int]:
        """What transformers' `generate` makes of a prompt on the int8 weights, if it is the only one."""
        key = tuple(prompt)
        if key not in self._alone:
            (self._alone[key],) = self._padded(self.int8, [prompt])
        return self._alone[key][: self._limit(prompt)]

    def _limit(self, prompt: list[int]) -> int:
        """Most new tokens."""
        most = self.config.max_new_tokens
        return most // 3 + len(prompt) % (most - most // 3 + 1) if self._is_ragged else most

    def decoder(self, name: str) -> Decode:
        ways: dict[str, Decode] = {
            AUTO: lambda batch: self._by_engine(name, Auto(), batch),
            PLAIN: lambda batch: self._by_engine(name, Plain(), batch),
            "transformers-float32": lambda batch: self._padded(self._model(torch.float32), batch),
            "transformers-bfloat16": lambda batch: self._padded(self._model(torch.bfloat16), batch),
            "transformers-int8": lambda batch: self._padded(self.int8, batch),
            "continuous-float32": lambda batch: self._continuously(self._model(torch.float32), batch),
        }
        return ways[name]

    def _by_engine(self, name: str, drafter: Drafter, batch: Batch) -> Batch:
        # a fresh one each time: nothing is known of the prompts, but what Auto has learned of the model stays
        engine = Engine(self.int8, drafter=drafter, max_rows=self.num_rows or len(batch))
        generations = []
        for prompt in batch:
            config = GenerationConfig(**{**self.config.to_dict(), "max_new_tokens": self._limit(prompt)})
            generations.append(engine.submit(Request(prompt=prompt, config=config)))
        engine.run()
        engine.close()
        self.reading_seconds = sum(generation.stats.prefill_seconds for generation in generations)
        return [generation.tokens for generation in generations]

    def _padded(self, model: PreTrainedModel, batch: Batch) -> Batch:
        width, pad = max(map(len, batch)), self.config.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        out = model.generate(input_ids, attention_mask=mask, generation_config=self.config)
        return [self._until_end(tokens) for tokens in out[:, width:].tolist()]

    def _continuously(self, model: PreTrainedModel, batch: Batch) -> Batch:
        out = model.generate_batch(batch, generation_config=self.config, progress_bar=False)
        by_prompt = {tuple(each.prompt_ids): each for each in out.values()}
        for each in out.values():
            if each.error:
                raise RuntimeError(f"generate_batch: {each.error}")
        return [self._until_end(list(by_prompt[tuple(prompt)].generated_tokens)) for prompt in batch]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        last = next((index for index, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        return tokens[: last + 1]

    def _model(self, dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in self._stock:
            self._stock[dtype] = load(self._source).model.to(dtype)
        return self._stock[dtype]


@dataclass(kw_only=True)
class Measured:
    """One contender at one size: seconds of each repetition and tokens, batch by batch."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    reading: dict[int, list[float]] = field(default_factory=dict)
    """Of these seconds, what the engine has read prompts in."""
    tokens: dict[int, int] = field(default_factory=dict)

    def rate(self, batches: Sequence[int]) -> float:
        """Tokens per second over some of the batches."""
        return sum(self.tokens[b] for b in batches) / sum(median(self.seconds[b]) for b in batches)

    def decoding_rate(self, batches: Sequence[int]) -> float:
        """The same without the time in which prompts were read, in rounds of others as well."""
        pairs = {b: zip(self.seconds[b], self.reading[b], strict=True) for b in batches}
        seconds = sum(median(whole - reading for whole, reading in pairs[b]) for b in batches)
        return sum(self.tokens[b] for b in batches) / seconds


def measure(
    contenders: Contenders, names: Sequence[str], batches: Sequence[Batch], args: argparse.Namespace
) -> tuple[dict[str, Measured], Counter[str]]:
    """Decode every batch by everyone, in changing order, and compare what comes out."""
    results = {name: Measured() for name in names}
    verdicts: Counter[str] = Counter()
    decoders = {name: contenders.decoder(name) for name in names}
    for name in names:
        decoders[name]([prompt[:8] for prompt in batches[0]])  # what happens once is not counted
    for turn in range(args.repetitions):
        for number, batch in enumerate(batches):
            shift = (turn + number) % len(names)
            for name in (*names[shift:], *names[:shift]):
                if name in PEERS and (number > 0 or turn >= args.peer_repetitions):
                    continue
                started = perf_counter()
                output = decoders[name](batch)
                results[name].seconds.setdefault(number, []).append(perf_counter() - started)
                results[name].tokens[number] = sum(map(len, output))
                if name in (AUTO, PLAIN):
                    results[name].reading.setdefault(number, []).append(contenders.reading_seconds)
                    verdicts.update(_verdicts(contenders, batch, output))
    return results, verdicts


def _verdicts(contenders: Contenders, batch: Batch, output: Batch) -> list[str]:
    settings: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    found = []
    for prompt, tokens in zip(batch, output, strict=True):
        comparison = compare(contenders.int8, torch.tensor(prompt), contenders.alone(prompt), tokens, settings)
        found.append(comparison.verdict.name.lower())
        if comparison.verdict is Verdict.DIFFERENT:
            log(f"different: {comparison}")
    return found


def as_row(results: dict[str, Measured], verdicts: Counter[str], num_batches: int) -> dict[str, Any]:
    """What is kept of a size: rates, and ratios over the batches that both sides have decoded."""
    row: dict[str, Any] = {"outputs": dict(verdicts), "tokens_per_second": {}, "auto_over": {}}
    for name, measured in results.items():
        own = sorted(measured.seconds)
        row["tokens_per_second"][name] = round(measured.rate(own), 1)
        if name != AUTO and AUTO in results:
            row["auto_over"][name] = round(results[AUTO].rate(own) / measured.rate(own), 2)
    if {AUTO, PLAIN} <= set(results):
        auto, plain = (results[name].decoding_rate(sorted(results[name].seconds)) for name in (AUTO, PLAIN))
        row["auto_over_plain_decoding"] = round(auto / plain, 2)
    row["num_batches"] = num_batches
    return row


def render(name: str, document: dict[str, Any]) -> str:
    sizes = document["sizes"]
    names = list(dict.fromkeys(name for row in sizes.values() for name in row["tokens_per_second"]))
    lines = [f"# {name}", "", *(f"    {command}" for command in document["commands"]), "", document["machine"], ""]
    for title, column in (("tokens per second", "tokens_per_second"), ("engine-auto over", "auto_over")):
        shown = [each for each in names if column == "tokens_per_second" or each != AUTO]
        rows = [[size, *(sizes[size][column].get(each, "") for each in shown)] for size in sorted(sizes, key=int)]
        lines += [pipe_table([f"{title}: batch", *shown], rows), ""]
    outputs = sum((Counter(row["outputs"]) for row in sizes.values()), Counter[str]())
    lines += [
        "transformers decodes the first batch of each size only (once, unless --peer-repetitions says otherwise), the "
        "engine all of them: where there are several batches, their rates are of other prompts. Ratios are over the "
        "batches that both have decoded. The engine is made anew for every batch, so that no prompt is known, and its "
        "making is timed with it.",
        "",
    ]
    lines.append(f"The engine's outputs beside those of model.generate() for each prompt alone: {dict(outputs)}.")
    return "\n".join(lines)


def write(name: str, rows: dict[str, Any], threads: int) -> None:
    path = RESULTS / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commands": [], "sizes": {}}
    document["machine"] = f"{threads} thread(s), torch {torch.__version__}, {specdec.kernels.native.describe()}."
    document["commands"] = list(dict.fromkeys([*document["commands"], command("throughput")]))
    for size, row in rows.items():
        kept = document["sizes"].get(size, {})
        document["sizes"][size] = {
            key: {**kept.get(key, {}), **value} if isinstance(value, dict) else value for key, value in row.items()
        }
    write_report(RESULTS / name, document, render(name, document))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    select_instructions(args.instructions)
    names = args.contenders.split(",")
    if args.ragged and not {AUTO, PLAIN} >= set(names):
        sys.exit(f"--ragged is for the engine: pass --contenders {AUTO},{PLAIN}")
    contenders = Contenders(args.model, args.max_new_tokens, is_ragged=args.ragged)
    prompts = contenders.encode(in_turn(load_suite(args.prompts), args.num_prompts))
    if args.ragged:
        prompts = ragged(prompts)
    rows: dict[str, Any] = {}
    failed = False
    for size in map(int, args.sizes.split(",")):
        contenders.num_rows = size
        count = min(2 * size, len(prompts)) if args.ragged else size
        batches = [prompts[start : start + count] for start in range(0, len(prompts) - count + 1, count)]
        results, verdicts = measure(contenders, names, batches, args)
        rows[str(size)] = as_row(results, verdicts, len(batches))
        failed = failed or bool(verdicts["different"])
        print(size, json.dumps(rows[str(size)]), flush=True)
    if failed:
        sys.exit("an output of the engine differs from that of its prompt alone by more than a numerical tie")
    if args.out:
        write(args.out, rows, args.threads)


if __name__ == "__main__":
    main()
