"""The options of `specdec bench`, by the panel of `--help` in which they stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec.cli.bench_output import BenchOutput
from specdec.specs import AUTO, DRAFTERS, TREE_EXAMPLES, TREES_OF_DRAFTERS
from specdec.suites import Suite, load_suite, of_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COMPARED = "What is compared"
_PROMPTS = "Prompts and lengths (1,4 measures one after the other)"
_MEASURING = "Measuring"
_RESULTS = "Results"
PROMPTS_OF_A_LENGTH = 2


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """`1,4,16`: positive whole numbers, each once; nothing gives none. Raises `ValueError` that names the option."""
    try:
        values = () if text is None else tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise ValueError(f"{option} takes a whole number or several, separated by commas: got {text!r}") from None
    if any(value < 1 for value in values):
        raise ValueError(f"{option} must be at least 1, got {text}")
    return values


MethodsOption = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help=f"Separated by commas: {', '.join(DRAFTERS)}; with parameters: prompt-lookup:num_tokens=8. Without it: "
        "prompt-lookup, auto, and small-model if there is a --draft. plain and the --reference always run.",
        rich_help_panel=_COMPARED,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Rows that are lossy."""

    router: list[str] | None = None
    step_writer: str | None = None

    def __post_init__(self) -> None:
        if self.step_writer is not None and not self.router:
            raise ValueError("--step-writer writes steps for a router: give --router too, or leave it out")


RoutedOptions = Annotated[
    Routed,
    {
        "router": typer.Option(
            "--router",
            metavar="SPEC",
            help="LOSSY: a draft writes whole steps, and the target those that the router gives to it: "
            "self-confidence:threshold=0.6, first-token-entropy:escalation_rate=0.3, random:escalation_rate=0.3, "
            "likelihood, regret, self-score, arbitrage:router=DIR:...; any of them with lookahead=N, "
            "shares_cache=true; may be given several times.",
            rich_help_panel=_COMPARED,
        ),
        "step_writer": typer.Option(
            "--step-writer",
            metavar="NAME",
            help="Who writes the steps that a --router keeps: small-model (the --draft), or the target's own copy, "
            "quantized-self:weights=int4, which it is without a --draft.",
            rich_help_panel=_COMPARED,
        ),
    },
]
LOSSLESS = Routed()
"""The default values of `RoutedOptions`."""
_LIMITED = "; ".join(
    f"{drafter} takes {' and '.join(trees)}"
    for drafter, trees in TREES_OF_DRAFTERS.items()
    if 0 < len(trees) < len(TREE_EXAMPLES)
)
TreesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tree",
        metavar="SPEC",
        help="Drafted by every method that takes it, in a row of its own: "
        f"{', '.join(TREE_EXAMPLES.values())}; may be given several times. {_LIMITED}. "
        "What Sequoia needs to know is measured on one prompt a category.",
        rich_help_panel=_COMPARED,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Who else decodes, and the files that llama.cpp reads."""

    peers: str | None = None
    gguf: Path | None = None
    draft_gguf: Path | None = None


PeerOptions = Annotated[
    Peers,
    {
        "peers": typer.Option(
            "--peers",
            help="Separated by commas: transformers (prompt lookup, and its assisted generation if there is a "
            "--draft), llama.cpp (plain, ngram-simple, and draft if there is one; needs the extra `peers`); or single "
            "modes: transformers/early-exit:exit_layer=8, llama.cpp/draft:n_max=8.",
            rich_help_panel=_COMPARED,
        ),
        "gguf": typer.Option(
            "--gguf",
            metavar="FILE",
            help="What llama.cpp reads; without it the --model itself or the .gguf file of the same name beside it.",
            rich_help_panel=_COMPARED,
        ),
        "draft_gguf": typer.Option(
            "--draft-gguf", metavar="FILE", help="What llama.cpp drafts with.", rich_help_panel=_COMPARED
        ),
    },
]
NO_PEERS = Peers()
"""The default values of `PeerOptions`."""

ReferenceOption = Annotated[
    Literal["transformers", "plain"],
    typer.Option(
        "--reference",
        metavar="NAME",
        help="Whose greedy output the others must equal; transformers is the model's own generate().",
        rich_help_panel=_COMPARED,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Which prompts of which suite. Raises `ValueError` for lengths that are none."""

    prompts: Path | None = None
    category: list[str] | None = None
    limit: int | None = None
    input_len: str | None = None

    def __post_init__(self) -> None:
        whole_numbers("--input-len", self.input_len)

    def suite(self) -> Suite:
        """The suite, whole where prompts of other lengths are cut from it."""
        return load_suite(self.prompts).select(self.category or (), None if self.input_len else self.limit)

    def cut(self, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> Suite:
        """The suite, or prompts of the lengths that were asked for."""
        lengths = whole_numbers("--input-len", self.input_len)
        return of_lengths(suite, lengths, tokenizer, count=self.limit or PROMPTS_OF_A_LENGTH) if lengths else suite


PromptOptions = Annotated[
    Prompts,
    {
        "prompts": typer.Option(
            "--prompts",
            metavar="FILE",
            help="JSON lines with 'prompt' and 'category', or Spec-Bench's 'turns' (the first turn is used); "
            "the built-in suite if absent.",
            rich_help_panel=_PROMPTS,
        ),
        "category": typer.Option(
            "--category", help="Only this category; may be given several times.", rich_help_panel=_PROMPTS
        ),
        "limit": typer.Option(
            "--limit",
            min=1,
            help="Prompts of each category, or of each --input-len (there 2 if absent).",
            rich_help_panel=_PROMPTS,
        ),
        "input_len": typer.Option(
            "--input-len",
            metavar="N,...",
            help="Prompts of exactly so many tokens, cut from the text of the suite, without a chat template.",
            rich_help_panel=_PROMPTS,
        ),
    },
]
ALL_PROMPTS = Prompts()
"""The default values of `PromptOptions`."""
QuickOption = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="A minute: auto on one prompt each of three categories, once. What else is given holds.",
        rich_help_panel=_MEASURING,
    ),
]
_QUICK = {"methods": AUTO, "max_new_tokens": "48", "repetitions": 1}
_QUICK_CATEGORIES = 3


def quick_values(given: set[str], asked: Prompts) -> dict[str, Any]:
    """What --quick means for the parameters that were not given."""
    values: dict[str, Any] = {name: value for name, value in _QUICK.items() if name not in given}
    is_whole = asked.category is not None or asked.input_len is not None
    category = asked.category if is_whole else _few(asked.suite().categories)
    return values | {"asked": replace(asked, limit=asked.limit or 1, category=category)}


def _few(categories: list[str]) -> list[str]:
    """Some that repeat their input and some that do not: evenly from the first to the last."""
    step = max(1, -(-len(categories) // _QUICK_CATEGORIES))
    return categories[::step]


OutputLengthsOption = Annotated[
    str,
    typer.Option("--max-new-tokens", "--output-len", "-n", metavar="N,...", help="At most.", rich_help_panel=_PROMPTS),
]
BatchSizesOption = Annotated[
    str,
    typer.Option("--batch-size", "-b", metavar="N,...", help="Prompts of a call.", rich_help_panel=_PROMPTS),
]

RepetitionsOption = Annotated[
    int,
    typer.Option(
        "--repetitions",
        "-r",
        min=1,
        help="Timed calls of each method on each batch, in turns.",
        rich_help_panel=_MEASURING,
    ),
]
WarmupOption = Annotated[
    int,
    typer.Option("--warmup", min=0, help="Calls of each method before anything is timed.", rich_help_panel=_MEASURING),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Of every call, with --sample.", rich_help_panel="Sampling")
]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Short for -o json: one document, see schema.json.", rich_help_panel=_RESULTS)
]
OutputOptions = Annotated[
    BenchOutput,
    {
        "format": typer.Option(
            "-o",
            "--format",
            metavar="FORMAT",
            help="What is printed: table, md, csv, json or jsonl.",
            rich_help_panel=_RESULTS,
        ),
        "output": typer.Option(
            "--output",
            metavar="FILE",
            help="Written too, as its ending says: .json, .jsonl, .csv, .md or .txt (the table).",
            rich_help_panel=_RESULTS,
        ),
        "plot": typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw speed-up by category, acceptance and one generation (.png, .svg, .pdf; needs the extra "
            "`bench`).",
            rich_help_panel=_RESULTS,
        ),
        "explain": typer.Option(
            "--explain",
            help="Say for each category what auto drafted with, and which tokens per second it predicted and made.",
            rich_help_panel=_RESULTS,
        ),
        "trace": typer.Option(
            "--trace",
            metavar="FILE",
            help="Write what adaptive drafters chose in every round, as JSON lines.",
            rich_help_panel=_RESULTS,
        ),
    },
]
TABLE_ONLY = BenchOutput()
"""The default values of `OutputOptions`."""
