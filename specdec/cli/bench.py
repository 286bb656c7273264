"""`specdec bench`: is it faster, and is it the same?"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specdec.cli.common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    err_console,
    friendly_errors,
)
from specdec.cli.options import DraftOption, MaxNewTokensOption, SampleOption, TemperatureOption, WeightsOption
from specdec.errors import SpecdecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.bench.harness import BatchResult, Harness, Method
    from specdec.bench.methods import MethodSpec
    from specdec.bench.suite import Prompt
    from specdec.drafters import Drafter

NOT_IDENTICAL = 1
INTERRUPTED = 130
TABLE_WIDTH = 110
"""Where stdout is not a terminal."""


def register(app: typer.Typer) -> None:
    app.command()(bench)


@friendly_errors
def bench(
    model: ModelOption = "demo",
    draft: DraftOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Separated by commas: prompt-lookup, small-model, quantized-self, early-exit, auto, plain; with "
            "parameters: prompt-lookup:num_tokens=8. Without it: prompt-lookup, and small-model if there is a --draft. "
            "plain and the --reference always run.",
        ),
    ] = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(
            "--tree",
            metavar="SPEC",
            help="Drafted by every method that takes it, in a row of its own: chain:5, fixed:4x2x1, sequoia:32, "
            "dyspec:32, dyspec:budget=32,max_depth=8,shared=true, dyspec-threshold:32; may be given several times. "
            "prompt-lookup takes chain and dyspec. What Sequoia needs to know is measured on one prompt a category.",
        ),
    ] = None,
    verify: Annotated[
        Literal["topdown", "traversal"],
        typer.Option("--verify", help="With --sample: how a drawn tree is verified; both are exact."),
    ] = "topdown",
    reference: Annotated[
        Literal["transformers", "plain"],
        typer.Option(
            "--reference",
            help="Whose greedy output the others must equal; transformers is the model's own generate().",
        ),
    ] = "transformers",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="JSON lines with 'prompt' and 'category', or Spec-Bench's 'turns' (the first turn is used); "
            "the built-in suite if absent.",
        ),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help="Only this category; may be given several times.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Prompts of each category.")] = None,
    max_new_tokens: MaxNewTokensOption = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 1,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Timed calls of each method on each batch.")
    ] = 3,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Calls of each method before anything is timed.")] = 1,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every call, with --sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write what adaptive drafters chose in every round, as JSON lines."
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    weights: WeightsOption = "stock",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Time drafters against plain decoding and check that they say the same.

    Exit code 1: a greedy output differs from the reference by more than a numerical tie.
    """
    from specdec.bench.methods import choose_methods
    from specdec.bench.suite import load_suite

    specs = choose_methods(methods, reference=reference, draft=draft, trees=tree or ())
    suite = load_suite(prompts).select(category or (), limit)

    from specdec.bench.harness import Harness, Settings
    from specdec.bench.ranks import measure_ranks
    from specdec.bench.report import legend, mismatches, summarise, to_json, to_table, trace
    from specdec.cli.loading import load_pair

    settings = Settings(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
        warmup=warmup,
        sample=sample,
        temperature=temperature,
        verify=verify,
        seed=seed,
    )
    (target, tokenizer, model_name), draft_model = load_pair(
        model,
        draft,
        dtype=dtype,
        device=device,
        threads=threads,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    few = suite.select(limit=1).prompts
    built = _build(specs, draft_model, lambda drafter: measure_ranks(target, tokenizer, drafter, few, settings))
    harness = Harness(target, tokenizer, built, settings)
    results, was_interrupted = _measure(harness, suite.prompts)
    if not results:
        raise SpecdecError("interrupted before the first prompt was measured")
    if trace_file is not None:
        trace_file.write_text("".join(f"{json.dumps(choice)}\n" for choice in trace(results)))
    if as_json:
        document = to_json(
            results, model=target, model_name=model_name, suite_name=suite.name, methods=built, settings=settings
        )
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        reports = summarise(results)
        _print_table(to_table(reports, title=f"{model_name} on {suite.name}"), legend(reports))
    _exit(list(mismatches(results)), was_interrupted)


def _build(
    specs: "dict[str, MethodSpec]",
    draft_model: "PreTrainedModel | None",
    measure_acceptance: "Callable[[Drafter | str], tuple[float, ...]]",
) -> "list[Method]":
    """One instance of each drafter, with its trees; Sequoia's acceptance is measured once for each drafter."""
    from specdec.bench.harness import Method
    from specdec.bench.methods import SEQUOIA, DrafterSpec

    @cache
    def drafter_of(text: str) -> "Drafter | str":
        return DrafterSpec.parse(text).build(draft_model)

    @cache
    def acceptance_of(text: str) -> tuple[float, ...]:
        return measure_acceptance(drafter_of(text))

    methods = []
    for name, spec in specs.items():
        drafter = None if spec.drafter is None else drafter_of(spec.drafter.text)
        measured = {}
        if spec.drafter is not None and spec.tree is not None and spec.tree.kind == SEQUOIA:
            measured["acceptance"] = acceptance_of(spec.drafter.text)
        methods.append(Method(name, drafter, None if spec.tree is None else spec.tree.build(**measured)))
    return methods


def _measure(harness: "Harness", prompts: "list[Prompt]") -> "tuple[list[BatchResult], bool]":
    """The results, and whether Ctrl-C cut them short."""
    results: list[BatchResult] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err_console, transient=True, refresh_per_second=1) as progress:
        task = progress.add_task("calls", total=harness.num_calls(prompts))
        try:
            for result in harness.run(prompts, on_call=lambda: progress.advance(task)):
                results.append(result)
        except KeyboardInterrupt:
            return results, True
    return results, False


def _print_table(table: Table, legend: str) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    console.print(table)
    console.print(legend, style="dim", highlight=False)


def _exit(differences: list[str], was_interrupted: bool) -> None:
    for difference in differences:
        err_console.print(Text(difference, style="red"), soft_wrap=True)
    if differences:
        raise typer.Exit(NOT_IDENTICAL)
    if was_interrupted:
        err_console.print("interrupted: only the prompts measured until then are reported")
        raise typer.Exit(INTERRUPTED)
