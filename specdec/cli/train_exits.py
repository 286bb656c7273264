"""`specdec train-exits`: teach a model to draft for itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.cli.common import ModelOption, err_console, friendly_errors, naming, starting
from specdec.cli.grafting import FieldOptions, grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import MODEL_OPTIONS
from specdec.model_options import ModelOptions

if TYPE_CHECKING:
    from specdec.models import LoadedModel
    from specdec.training.exits.report import Acceptance
    from specdec.training.exits.run import ExitTraining, FullTraining, Source

_LOADING: FieldOptions = {name: MODEL_OPTIONS[name] for name in ("device", "threads", "trust_remote_code")}
_FLOAT32 = ModelOptions(dtype="float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What only exits are trained by: --full has no use for it. None: the recipe's own."""

    exits: str | None = None
    vocabulary: int | None = None
    batch_rows: int | None = None
    learning_rate: float | None = None
    passes: int | None = None

    def given(self) -> dict[str, Any]:
        """By the names of `specdec.training.exits.training.Recipe`."""
        settings = {
            "layers": None if self.exits is None else _parse_layers(self.exits),
            "vocabulary": self.vocabulary,
            "batch_rows": self.batch_rows,
            "learning_rate": self.learning_rate,
            "num_passes": self.passes,
        }
        return {name: value for name, value in settings.items() if value is not None}


_RECIPE: FieldOptions = {
    "exits": typer.Option("--exits", help="Exit layers, separated by commas; 2 if absent; 0: after the embeddings."),
    "vocabulary": typer.Option("--vocabulary", min=2, help="Tokens that the exits can draft; 8192 if absent."),
    "batch_rows": typer.Option("--batch-rows", min=1, help="Conversations in a step of training; 4 if absent."),
    "learning_rate": typer.Option("--learning-rate", help="At the top of its rise and fall; 0.001 if absent."),
    "passes": typer.Option("--passes", min=1, help="Drafted tokens in a row to train for; 2 if absent."),
}
_USUAL = _Recipe()


def register(app: typer.Typer) -> None:
    app.command("train-exits")(train_exits)


@friendly_errors
@takes_model
@grafted
def train_exits(
    out: Annotated[Path, typer.Option("--output", "--out", metavar="FILE", help="The .safetensors file to write.")],
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
    recipe: Annotated[_Recipe, _RECIPE] = _USUAL,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Times that everything is trained on.")] = 2,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", min=1, help="Conversations that are written at once; 64 if absent. A GPU takes thousands."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", min=8, help="Tokens of a conversation, and how far exits look back.")
    ] = 256,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train the whole model to exit early instead, and write it to the folder --out."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is sampled, and of the order of training.")] = 0,
    loading: Annotated[ModelOptions, _LOADING] = _FLOAT32,
) -> None:
    """Train small exits with which a model drafts for itself, from its own answers.

    Stopped at any point, the same command goes on from there: what has been done is kept in FILE.work until the end.
    """
    if (self_generate is None) == (data is None):
        raise ValueError("give either --self-generate N or --data FILE")
    given = recipe.given()
    if full and given:
        raise ValueError(
            "--full trains the whole model: leave out --exits, --vocabulary, --batch-rows, --learning-rate and --passes"
        )

    with starting():
        from specdec.models.pair import load_target
        from specdec.training.exits.collect import NUM_ROWS

    target = load_target(model, loading)
    source = _source(target, self_generate, data)
    collecting = {"length": length, "num_rows": rows or NUM_ROWS}
    if full:
        _train_model(target, source, out, epochs=epochs, seed=seed, **collecting)
    else:
        _train_exits(target, source, out, {"epochs": epochs, "seed": seed, **given}, **collecting)


def _source(target: "LoadedModel", num_tokens: int | None, data: Path | None) -> "Source":
    from specdec.training.exits.collect import given_texts, self_generation
    from specdec.training.exits.run import Source

    if data is not None:
        return Source(str(data), *given_texts(target.tokenizer, data))
    assert num_tokens is not None
    return Source("self-generated", self_generation(target.tokenizer), num_tokens)


def _train_model(target: "LoadedModel", source: "Source", out: Path, **settings: int) -> None:
    from specdec.training.exits.run import FullTraining

    training = FullTraining(target.model, source, out, **settings)
    with naming(out):
        _show(training, ["loss {:.3f}", "of exits {:.3f}"])
        training.finish(target.tokenizer)


def _train_exits(
    target: "LoadedModel", source: "Source", out: Path, settings: dict[str, Any], **collecting: int
) -> None:
    from specdec.training.exits.run import ExitTraining
    from specdec.training.exits.training import Recipe

    recipe = Recipe(**settings)
    training = ExitTraining(target.model, source, recipe, out, **collecting)
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
