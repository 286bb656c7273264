"""`specdec train-exits`: teach a model to draft for itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.cli.common import (
    DeviceOption,
    ModelOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    err_console,
    friendly_errors,
    naming,
)

if TYPE_CHECKING:
    from specdec.exits.report import Acceptance
    from specdec.exits.run import ExitTraining, FullTraining


def register(app: typer.Typer) -> None:
    app.command("train-exits")(train_exits)


@friendly_errors
def train_exits(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file to write.")],
    model: ModelOption = "demo",
    self_generate: Annotated[
        int | None,
        typer.Option(
            "--self-generate", metavar="N", min=1, help="Train on N tokens of conversations that the model makes up."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Train on a JSON-lines file: `text` as it is, or the model's answers to `prompt` or `turns`.",
        ),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option("--exits", help="Exit layers, separated by commas; 2 if absent; 0: after the embeddings."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Times that everything is trained on.")] = 2,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", min=2, help="Tokens that the exits can draft; 8192 if absent.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", min=1, help="Conversations that are written at once; 64 if absent. A GPU takes thousands."
        ),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option("--batch-rows", min=1, help="Conversations in a step of training; 4 if absent.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="At the top of its rise and fall; 0.001 if absent.")
    ] = None,
    passes: Annotated[
        int | None, typer.Option("--passes", min=1, help="Drafted tokens in a row to train for; 2 if absent.")
    ] = None,
    length: Annotated[
        int, typer.Option("--length", min=8, help="Tokens of a conversation, and how far exits look back.")
    ] = 256,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train the whole model to exit early instead, and write it to the folder --out."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is sampled, and of the order of training.")] = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Train small exits with which a model drafts for itself, from its own answers.

    Stopped at any point, the same command goes on from there: what has been done is kept in FILE.work until the end.
    """
    if (self_generate is None) == (data is None):
        raise ValueError("give either --self-generate N or --data FILE")
    settings: dict[str, Any] = {
        "layers": None if exits is None else _parse_layers(exits),
        "vocabulary": vocabulary,
        "batch_rows": batch_rows,
        "learning_rate": learning_rate,
        "num_passes": passes,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if full and given:
        raise ValueError(
            "--full trains the whole model: leave out --exits, --vocabulary, --batch-rows, --learning-rate and --passes"
        )

    from specdec import models
    from specdec.exits.collect import NUM_ROWS, given_texts, self_generation
    from specdec.exits.run import ExitTraining, FullTraining, Source
    from specdec.exits.training import Recipe

    target = models.load(model, dtype="float32", device=device, threads=threads, trust_remote_code=trust_remote_code)
    if data is None:
        assert self_generate is not None
        source = Source("self-generated", self_generation(target.tokenizer), self_generate)
    else:
        source = Source(str(data), *given_texts(target.tokenizer, data))
    if full:
        whole = FullTraining(
            target.model, source, out, epochs=epochs, seed=seed, length=length, num_rows=rows or NUM_ROWS
        )
        with naming(out):
            _show(whole, ["loss {:.3f}", "of exits {:.3f}"])
            whole.finish(target.tokenizer)
        return
    recipe = Recipe(epochs=epochs, seed=seed, **given)
    training = ExitTraining(target.model, source, recipe, out, length=length, num_rows=rows or NUM_ROWS)
    with naming(out):
        _show(training, [f"exit {layer}: {{:.1%}}" for layer in recipe.layers])
        report = training.finish()
    Console().print(_table(report, f"{target.name}: exits on held-out text, written to {out}"))


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--exits takes layer numbers separated by commas, such as 0,2; got {text!r}") from None


def _show(training: "ExitTraining | FullTraining", notes: list[str]) -> None:
    """Run the stages with a progress bar each, and running means of what training shows."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=err_console) as bars:
        task = bars.add_task("collecting", total=None, note="")
        for state in training.collect():
            bars.update(task, completed=state.done, total=state.total)
        task = bars.add_task("training", total=None, note="")
        means = [0.0] * len(notes)
        for num_shown, state in enumerate(training.train(), start=1):
            weight = max(0.02, 1 / num_shown)
            means = [old + weight * (new - old) for old, new in zip(means, state.shown, strict=True)]
            note = ", ".join(text.format(mean) for text, mean in zip(notes, means, strict=True))
            bars.update(task, completed=state.done, total=state.total, note=note)


def _table(reports: "list[Acceptance]", title: str) -> Table:
    table = Table(title=title, caption="acceptance by drafted token: of the k-th where those before it are right")
    columns = "exit", "in vocabulary", "top 1-4", "by drafted token", "draft", "tokens/round", "tokens/s", "speed-up"
    for column in columns:
        table.add_column(column, justify="right")
    for report in reports:
        table.add_row(
            str(report.layer),
            f"{report.coverage:.1%}",
            " ".join(f"{share:.0%}" for share in report.ranks),
            " ".join(f"{share:.0%}" for share in report.steps),
            f"{report.length} while p >= {report.threshold}",
            f"{report.tokens_per_round:.2f}",
            f"{report.tokens_per_second:.1f}",
            f"{report.speedup:.2f}x",
        )
    return table
