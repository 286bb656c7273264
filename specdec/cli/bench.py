"""`specdec bench`: is it faster, and is it the same?"""

import json
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
    from specdec.bench.harness import BatchResult, Harness
    from specdec.bench.suite import Prompt

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
            help="Separated by commas: prompt-lookup, small-model, quantized-self, auto, plain; with parameters: "
            "prompt-lookup:num_tokens=8. Without it: prompt-lookup, and small-model if there is a --draft. "
            "plain and the --reference always run.",
        ),
    ] = None,
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

    specs = choose_methods(methods, reference=reference, draft=draft)
    suite = load_suite(prompts).select(category or (), limit)

    from specdec.bench.harness import Harness, Method, Settings
    from specdec.bench.report import LEGEND, mismatches, summarise, to_json, to_table
    from specdec.cli.loading import load_pair

    settings = Settings(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
        warmup=warmup,
        sample=sample,
        temperature=temperature,
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
    drafters = [Method(name, None if spec is None else spec.build(draft_model)) for name, spec in specs.items()]
    harness = Harness(target, tokenizer, drafters, settings)
    results, was_interrupted = _measure(harness, suite.prompts)
    if not results:
        raise SpecdecError("interrupted before the first prompt was measured")
    if as_json:
        document = to_json(results, model=target, model_name=model_name, suite_name=suite.name, settings=settings)
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        _print_table(to_table(summarise(results), title=f"{model_name} on {suite.name}"), LEGEND)
    _exit(list(mismatches(results)), was_interrupted)


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
