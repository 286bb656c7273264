"""`specdec train-head`: teach a small network, or the model itself, to draft for a model."""

import functools
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specdec.cli.common import ModelOption, err_console, friendly_errors, naming, starting
from specdec.cli.grafting import FieldOptions, grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import MODEL_OPTIONS
from specdec.cli.progress import Bars
from specdec.model_options import ModelOptions
from specdec.stages import stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specdec.models import LoadedModel
    from specdec.training.heads.head_report import HeadReport
    from specdec.training.heads.report import Acceptance
    from specdec.training.heads.run import ExitTraining, FullTraining, HeadTraining, Source

_LOADING: FieldOptions = {name: MODEL_OPTIONS[name] for name in ("device", "threads", "trust_remote_code")}
_FLOAT32 = ModelOptions(dtype="float32")
_REPORTING = "drafting on held-out text"


class Kind(StrEnum):
    """What is trained."""

    DSPARK = "dspark"
    EAGLE3 = "eagle3"
    MTP = "mtp"
    JUMP = "jump"
    EXIT = "exit"
    LAYERSKIP = "layerskip"


_OF_MOST = ("vocabulary", "batch_rows", "learning_rate")
_OF_KIND = {
    Kind.DSPARK: (*_OF_MOST, "head_layers", "block", "anchors", "markov_rank"),
    Kind.EAGLE3: (*_OF_MOST, "head_layers", "steps"),
    Kind.JUMP: (*_OF_MOST, "head_layers", "steps"),
    Kind.MTP: ("batch_rows", "learning_rate", "steps"),
    Kind.EXIT: (*_OF_MOST, "exits", "passes"),
    Kind.LAYERSKIP: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """Of which every kind takes some. None: the recipe's own."""

    vocabulary: int | None = None
    batch_rows: int | None = None
    learning_rate: float | None = None
    head_layers: int | None = None
    block: int | None = None
    anchors: int | None = None
    markov_rank: int | None = None
    steps: int | None = None
    exits: str | None = None
    passes: int | None = None

    def given(self, kind: Kind) -> dict[str, Any]:
        """By the names of the recipes in `specdec.training.heads`.

        Raises:
            ValueError: something that the kind does not take.
        """
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        values: dict[str, Any] = {name: value for name, value in every.items() if value is not None}
        if strange := values.keys() - set(_OF_KIND[kind]):
            options = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(strange))
            raise ValueError(f"--kind {kind} has no use for {options}: leave it out")
        if "exits" in values:
            values["exits"] = _parse_layers(values["exits"])
        names = {
            "head_layers": "num_layers",
            "block": "reach",
            "steps": "reach",
            "exits": "layers",
            "passes": "num_passes",
        }
        return {names.get(name, name): value for name, value in values.items()}


_RECIPE: FieldOptions = {
    "vocabulary": typer.Option("--vocabulary", min=2, help="Tokens that can be drafted; 8192 if absent."),
    "batch_rows": typer.Option("--batch-rows", min=1, help="Conversations in a step of training; 4 if absent."),
    "learning_rate": typer.Option("--learning-rate", help="At the top of its rise and fall; 0.001 if absent."),
    "head_layers": typer.Option(
        "--head-layers", min=1, max=16, help="Layers of the head; 2 if absent for dspark, else 1."
    ),
    "block": typer.Option("--block", min=2, help="dspark: tokens that are drafted at once; 5 if absent."),
    "anchors": typer.Option("--anchors", min=1, help="dspark: blocks of a conversation in a step; 24 if absent."),
    "markov_rank": typer.Option("--markov-rank", min=0, help="dspark: of the Markov head; 64 if absent, 0: none."),
    "steps": typer.Option("--steps", min=1, help="Tokens in a row to train for; 5 if absent, for mtp 3."),
    "exits": typer.Option(
        "--exits", help="exit: exit layers, separated by commas; 2 if absent; 0: after the embeddings."
    ),
    "passes": typer.Option("--passes", min=1, help="exit: drafted tokens in a row to train for; 2 if absent."),
}
_USUAL = _Recipe()


def register(app: typer.Typer) -> None:
    app.command("train-head")(train_head)


@friendly_errors
@takes_model
@grafted
def train_head(
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            help="dspark: a network that drafts a block of tokens; eagle3, mtp, jump: one that drafts a token "
            "after the other; exit: exits after a few layers; layerskip: the whole model, to exit early.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "--out", metavar="PATH", help="The folder to write; of exits the .safetensors.")
    ],
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
        int, typer.Option("--length", min=8, help="Tokens of a conversation, and how far heads look back.")
    ] = 256,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="dspark, eagle3, jump: write layers in 8 bits, which only specdec reads.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is sampled, and of the order of training.")] = 0,
    loading: Annotated[ModelOptions, _LOADING] = _FLOAT32,
) -> None:
    """Train what drafts for a model, on the model's own answers.

    Stopped at any point, the same command goes on from there: what has been done is kept in PATH.work until the end.
    """
    if (self_generate is None) == (data is None):
        raise ValueError("give either --self-generate N or --data FILE")
    if quantize and kind in (Kind.EXIT, Kind.LAYERSKIP, Kind.MTP):
        raise ValueError(f"--kind {kind} has no use for --quantize: leave it out")
    settings = {"epochs": epochs, "seed": seed, **recipe.given(kind)}

    with starting():
        from specdec.models.pair import load_target
        from specdec.training.heads.collect import NUM_ROWS

    target = load_target(model, loading)
    source = _source(target, self_generate, data)
    collecting = {"length": length, "num_rows": rows or NUM_ROWS}
    others = {Kind.EXIT: _train_exits, Kind.LAYERSKIP: _train_model}
    train = others.get(kind) or functools.partial(_train_network, kind, quantize)
    train(target, source, out, settings, **collecting)


def _source(target: "LoadedModel", num_tokens: int | None, data: Path | None) -> "Source":
    from specdec.training.heads.collect import given_texts, self_generation
    from specdec.training.heads.run import Source

    if data is not None:
        return Source(str(data), *given_texts(target.tokenizer, data))
    assert num_tokens is not None
    return Source("self-generated", self_generation(target.tokenizer), num_tokens)


def _train_model(
    target: "LoadedModel", source: "Source", out: Path, settings: dict[str, Any], **collecting: int
) -> None:
    from specdec.training.heads.run import FullTraining

    training = FullTraining(target.model, source, out, **settings, **collecting)
    with naming(out):
        _show(training, ["loss {:.3f}", "of exits {:.3f}"])
        with stage("writing the model"):
            training.finish(target.tokenizer)


def _train_network(
    kind: Kind,
    quantize: bool,
    target: "LoadedModel",
    source: "Source",
    out: Path,
    settings: dict[str, Any],
    **collecting: int,
) -> None:
    from specdec.training.heads.recipes import BlockRecipe, EagleRecipe, JumpRecipe, MtpRecipe
    from specdec.training.heads.run import HeadTraining

    recipes = {Kind.DSPARK: BlockRecipe, Kind.EAGLE3: EagleRecipe, Kind.MTP: MtpRecipe, Kind.JUMP: JumpRecipe}
    training = HeadTraining(
        target.model, target.name, source, recipes[kind](**settings), out, quantize=quantize, **collecting
    )
    with naming(out):
        _show(training, ["accepted {:.2f}"])
        with stage(_REPORTING):
            report = training.finish()
    console = Console(markup=False)
    console.print(_head_table(report, f"{target.name}: the head on held-out text, written to {out}"))
    console.print(_curve_table(training.curve))


def _train_exits(
    target: "LoadedModel", source: "Source", out: Path, settings: dict[str, Any], **collecting: int
) -> None:
    from specdec.training.heads.exits import ExitRecipe
    from specdec.training.heads.run import ExitTraining

    recipe = ExitRecipe(**settings)
    training = ExitTraining(target.model, source, recipe, out, **collecting)
    with naming(out):
        _show(training, [f"exit {layer}: {{:.1%}}" for layer in recipe.layers])
        with stage(_REPORTING):
            report = training.finish()
    Console(markup=False).print(_table(report, f"{target.name}: exits on held-out text, written to {out}"))


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"--exits takes layer numbers separated by commas, such as 0,2; got {text!r}") from None


def _show(training: "ExitTraining | HeadTraining | FullTraining", notes: list[str]) -> None:
    """Run the stages with a progress bar each, and running means of what training shows."""
    with Bars(err_console) as bars:
        task = bars.add_task("collecting", total=None)
        for state in training.collect():
            bars.update(task, completed=state.done, total=state.total)
        task = bars.add_task("training", total=None)
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


def _curve_table(curve: "Mapping[int, float]") -> Table:
    table = Table(title="learning curve", caption="accepted of all that is drafted, on held-out text")
    table.add_column("tokens trained on", justify="right")
    table.add_column("accepted", justify="right")
    for tokens, accepted in curve.items():
        table.add_row(f"{tokens:,}", f"{accepted:.2f}")
    return table


def _head_table(report: "HeadReport", title: str) -> Table:
    table = Table(title=title, caption="acceptance by drafted token: of the k-th where those before it are right")
    columns = "in vocabulary", "by drafted token", "accepted of all", "draft", "tokens/round", "speed-up"
    for column in columns:
        table.add_column(column, justify="right")
    table.add_row(
        f"{report.coverage:.1%}",
        " ".join(f"{share:.0%}" for share in report.steps),
        f"{report.accepted:.2f}",
        str(report.length),
        f"{report.tokens_per_round:.2f}",
        f"{report.speedup:.2f}x",
    )
    return table
