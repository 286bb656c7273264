"""`specdec train-router`: teach a router which steps are worth the target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.cli.common import err_console, friendly_errors, naming, starting
from specdec.cli.grafting import FieldOptions, grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import MODEL_OPTIONS
from specdec.cli.progress import Bars
from specdec.errors import UnsupportedOptionError
from specdec.model_options import ModelOptions

if TYPE_CHECKING:
    from routers.collecting import Collection
    from routers.measures import Report
    from routers.text_router import TextRouter
    from routers.training import LightRecipe
    from specdec.models.pair import LoadedPair
    from specdec.training.routers.collect import Problem

    Load = Callable[[], LoadedPair]

_LOADING: FieldOptions = {name: MODEL_OPTIONS[name] for name in ("weights", "dtype", "device", "threads")}
_INT8 = ModelOptions(weights="int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collecting:
    """How steps are collected."""

    prm: str | None = None
    hidden: bool = False
    batch_size: int = 8
    max_new_tokens: int = 320
    max_step: int = 256


_COLLECTING: FieldOptions = {
    "prm": typer.Option("--prm", help="A process-reward model, hub id or folder; if absent, the target's regret."),
    "hidden": typer.Option("--hidden", help="Let the router read the draft's hidden state at the end of a step too."),
    "batch_size": typer.Option("--batch-size", min=1, help="Problems at a time."),
    "max_new_tokens": typer.Option("--max-new-tokens", "-n", min=1),
    "max_step": typer.Option("--max-step", min=1, help="Tokens after which a step ends anyway."),
}
_USUAL = _Collecting()


@dataclass(frozen=True, slots=True, kw_only=True)
class _RollingOut:
    """How steps are judged by roll-outs, if they are."""

    rollouts: int | None = None
    rollout_by: str = "target"
    rollout_tokens: int = 320

    def __post_init__(self) -> None:
        if self.rollout_by not in ("target", "draft"):
            raise UnsupportedOptionError(f"--rollout-by {self.rollout_by}: it is target or draft")


_ROLLING_OUT: FieldOptions = {
    "rollouts": typer.Option(
        "--rollouts",
        metavar="K",
        min=1,
        help="Judge steps by K roll-outs to the end of the text: by their right final answers.",
    ),
    "rollout_by": typer.Option("--rollout-by", help="target or draft: who writes the roll-outs."),
    "rollout_tokens": typer.Option("--rollout-tokens", min=1, help="Tokens after which a roll-out is cut off."),
}
_WITHOUT = _RollingOut()


def register(app: typer.Typer) -> None:
    app.command("train-router")(train_router)


@friendly_errors
@takes_model
@grafted
def train_router(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", "--target", metavar="MODEL", help="The target: a hub id, a local folder or a .gguf file."
        ),
    ],
    draft: Annotated[
        str, typer.Option("--draft", "-d", metavar="MODEL", help="A smaller model with the same tokenizer.")
    ],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="JSON lines with a `question` (or `prompt`, or `turns`) each."),
    ],
    out: Annotated[Path, typer.Option("--output", "--out", metavar="DIR", help="The folder to write the router to.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N problems.")] = None,
    collecting: Annotated[_Collecting, _COLLECTING] = _USUAL,
    rolling_out: Annotated[_RollingOut, _ROLLING_OUT] = _WITHOUT,
    kind: Annotated[str, typer.Option("--kind", help="forest (gradient boosting) or linear.")] = "forest",
    text: Annotated[
        str | None,
        typer.Option("--text", help="Train a text classifier instead, from this encoder or small LM (id or folder)."),
    ] = None,
    harm_level: Annotated[
        float, typer.Option("--harm-level", help="Share of all steps that may be kept though the target does better.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split into training and test.")] = 0,
    loading: Annotated[ModelOptions, _LOADING] = _INT8,
) -> None:
    """Collect steps that both models write, and train a router on them: which steps does the target write better?

    Better is what the reward model says; without one, what the target would rather have written, where it finds the
    draft's step unlikely (three nats or more against its own choices); with --rollouts, what more often leads to the
    right answer (or, where FILE has none, to the answer that most roll-outs agree on). Stopped at any point, the same
    command goes on from there: what has been collected is in DIR/collected and DIR/rollouts.
    """
    with starting():
        from routers import TargetRegret
        from routers.training import LightRecipe, train_light
        from specdec.models.pair import load_pair
        from specdec.training.routers.collect import INSTRUCTION, read_problems

    prm, by_rollouts = collecting.prm, rolling_out.rollouts is not None
    if by_rollouts and prm is not None:
        raise UnsupportedOptionError("--rollouts and --prm both say what better means: leave one out")
    margin = TargetRegret.margin if prm is None and not by_rollouts else 0.0
    recipe = LightRecipe(kind=kind, hidden=collecting.hidden, margin=margin, harm_level=harm_level, seed=seed)
    _check_scikit_learn()
    problems = read_problems(data)[:limit]
    plan = {
        "target": model,
        "draft": draft,
        "data": data.name,
        "problems": len(problems),
        "reward": "regret" if prm is None else "prm",
        "weights": loading.weights,
        "instruction": INSTRUCTION,
        **asdict(collecting),
    }
    load = cache(lambda: load_pair(model, draft, loading))
    with naming(out):
        collection = _collect(out / "collected", problems, plan, load)
        if by_rollouts:
            collection = _roll_out(collection, problems, out / "rollouts", plan | asdict(rolling_out), load)
        router = train_light(collection.read(), recipe) if text is None else _train_text(text, collection, recipe)
        router.save(out)
    assert router.report is not None
    Console(markup=False).print(_table(router.report, f"held-out steps; router written to {out}"))


def _train_text(base: str, collection: "Collection", recipe: "LightRecipe") -> "TextRouter":
    from routers.text_router import TextRecipe, train_text

    with Bars(err_console) as bars:
        task = bars.add_task("training", total=None)

        def show(done: int, total: int, loss: float) -> None:
            bars.update(task, completed=done, total=total, note=f"loss {loss:.3f}")

        return train_text(
            collection.read(),
            base,
            TextRecipe(margin=recipe.margin, harm_level=recipe.harm_level, seed=recipe.seed),
            progress=show,
        )


def _check_scikit_learn() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UnsupportedOptionError("training needs scikit-learn: pip install 'specdec-runtime[train]'")


def _collect(folder: Path, problems: "Sequence[Problem]", plan: Mapping[str, Any], load: "Load") -> "Collection":
    from routers import RewardModel, Steps, TargetRegret
    from routers.collecting import Collection
    from specdec.training.routers.collect import collect

    collection = Collection(folder, plan)
    if all(collection.has(part) for part in range(-(-len(problems) // plan["batch_size"]))):
        return collection
    target, draft = load()
    assert draft is not None
    with Bars(err_console) as bars:
        task = bars.add_task("collecting", total=len(problems))
        for num_done in collect(
            target.model,
            draft.model,
            target.tokenizer,
            problems,
            TargetRegret() if plan["prm"] is None else RewardModel(plan["prm"], device=target.model.device),
            collection,
            batch_size=plan["batch_size"],
            max_new_tokens=plan["max_new_tokens"],
            keeps_hidden=plan["hidden"],
            steps=Steps(max_tokens=plan["max_step"]),
        ):
            bars.update(task, completed=num_done)
    return collection


def _roll_out(
    collected: "Collection", problems: "Sequence[Problem]", folder: Path, plan: Mapping[str, Any], load: "Load"
) -> "Collection":
    """The collection with rewards by roll-out. Says what that costs before it begins."""
    from routers.collecting import Collection
    from specdec.training.routers.rollouts import Rollouts, cost, label, tokens_per_second

    how = Rollouts(count=plan["rollouts"], max_new_tokens=plan["rollout_tokens"], batch_size=plan["batch_size"])
    labelled, tuples = Collection(folder, plan), collected.read()
    if all(labelled.has(item.problem) for item in tuples):
        return labelled
    target, draft = load()
    assert draft is not None
    model = (target if plan["rollout_by"] == "target" else draft).model
    left = cost(tuples, labelled, how, target.tokenizer.eos_token)
    err_console.print(Text(f"roll-outs by the {plan['rollout_by']}: {left}"))
    if left.num_rollouts:
        speed = tokens_per_second(model, target.tokenizer, tuples, how)
        hours = left.max_tokens / speed / 3600
        told = f"at {speed:.0f} tokens/s, as just measured: at most {hours:.1f} h; Ctrl-C keeps what is done"
        err_console.print(Text(told))
    with Bars(err_console) as bars:
        task = bars.add_task("rolling out", total=len({item.problem for item in tuples}))
        for num_done in label(model, target.tokenizer, tuples, problems, labelled, how):
            bars.update(task, completed=num_done)
    return labelled


def _table(report: "Report", title: str) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in asdict(report).items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
