"""`specdec train-router`: teach a router which steps are worth the target."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.cli.common import DeviceOption, DtypeOption, ThreadsOption, err_console, friendly_errors
from specdec.cli.options import MaxNewTokensOption, WeightsOption
from specdec.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from routers.collecting import Collection
    from routers.measures import Report
    from routers.text_router import TextRouter
    from routers.training import LightRecipe
    from specdec.routing.collect import Problem

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def register(app: typer.Typer) -> None:
    app.command("train-router")(train_router)


@friendly_errors
def train_router(
    target: Annotated[str, typer.Option("--target", "-m", help="A hub id, a local folder or a .gguf file.")],
    draft: Annotated[str, typer.Option("--draft", "-d", help="A smaller model with the same tokenizer.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="JSON lines with a `question` (or `prompt`, or `turns`) each."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write the router to.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N problems.")] = None,
    prm: Annotated[
        str | None,
        typer.Option("--prm", help="A process-reward model, hub id or folder; if absent, the target's likelihood."),
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="forest (gradient boosting) or linear.")] = "forest",
    text: Annotated[
        str | None,
        typer.Option("--text", help="Train a text classifier instead, from this encoder or small LM (id or folder)."),
    ] = None,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Let the router read the draft's hidden state at the end of a step too.")
    ] = False,
    harm_level: Annotated[
        float, typer.Option("--harm-level", help="Share of all steps that may be kept though the target does better.")
    ] = 0.1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Problems at a time.")] = 8,
    max_new_tokens: MaxNewTokensOption = 320,
    max_step: Annotated[int, typer.Option("--max-step", min=1, help="Tokens after which a step ends anyway.")] = 256,
    weights: WeightsOption = "int8",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split into training and test.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Collect steps that both models write, and train a router on them: which steps does the target write better?

    Better is what the reward model says, or without one what the target finds likelier. Stopped at any point of the
    collection, the same command goes on from there: what has been collected is in DIR/collected.
    """
    from routers.collecting import Collection
    from routers.training import LightRecipe, train_light
    from specdec.routing.collect import INSTRUCTION, read_problems

    recipe = LightRecipe(kind=kind, hidden=hidden, harm_level=harm_level, seed=seed)
    _check_scikit_learn()
    problems = read_problems(data)[:limit]
    plan = {
        "target": target,
        "draft": draft,
        "data": data.name,
        "problems": len(problems),
        "prm": prm,
        "weights": weights,
        "max_new_tokens": max_new_tokens,
        "max_step": max_step,
        "batch_size": batch_size,
        "hidden": hidden,
        "instruction": INSTRUCTION,
    }
    collection = Collection(out / "collected", plan)
    num_parts = -(-len(problems) // batch_size)
    if not all(collection.has(part) for part in range(num_parts)):
        _collect(collection, problems, plan, dtype=dtype, device=device, threads=threads)
    router = train_light(collection.read(), recipe) if text is None else _train_text(text, collection, recipe)
    router.save(out)
    assert router.report is not None
    Console().print(_table(router.report, f"held-out steps; router written to {out}"))


def _train_text(base: str, collection: "Collection", recipe: "LightRecipe") -> "TextRouter":
    from routers.text_router import TextRecipe, train_text

    with Progress(*_COLUMNS, TextColumn("{task.fields[note]}"), console=err_console) as bars:
        task = bars.add_task("training", total=None, note="")

        def show(done: int, total: int, loss: float) -> None:
            bars.update(task, completed=done, total=total, note=f"loss {loss:.3f}")

        return train_text(
            collection.read(), base, TextRecipe(harm_level=recipe.harm_level, seed=recipe.seed), progress=show
        )


def _check_scikit_learn() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UnsupportedOptionError("training needs scikit-learn: pip install 'specdec-runtime[train]'")


def _collect(
    collection: "Collection",
    problems: "Sequence[Problem]",
    plan: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
    threads: int | None,
) -> None:
    from routers import RewardModel, Steps, TargetLikelihood
    from specdec.cli.loading import load_pair
    from specdec.routing.collect import collect

    target, draft = load_pair(
        plan["target"],
        plan["draft"],
        dtype=dtype,
        device=device,
        threads=threads,
        weights=plan["weights"],
        trust_remote_code=False,
    )
    assert draft is not None
    with Progress(*_COLUMNS, console=err_console) as bars:
        task = bars.add_task("collecting", total=len(problems))
        for num_done in collect(
            target.model,
            draft,
            target.tokenizer,
            problems,
            TargetLikelihood() if plan["prm"] is None else RewardModel(plan["prm"], device=target.model.device),
            collection,
            batch_size=plan["batch_size"],
            max_new_tokens=plan["max_new_tokens"],
            keeps_hidden=plan["hidden"],
            steps=Steps(max_tokens=plan["max_step"]),
        ):
            bars.update(task, completed=num_done)


def _table(report: "Report", title: str) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in asdict(report).items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
