"""`specdec calibrate-router`: the threshold of a router that needs no training."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from specdec.cli.common import ModelOption, err_console, friendly_errors, starting
from specdec.cli.grafting import FieldOptions, grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import MODEL_OPTIONS, DraftOption
from specdec.cli.progress import Bars
from specdec.model_options import ModelOptions

_LOADING: FieldOptions = {name: MODEL_OPTIONS[name] for name in ("weights", "dtype", "device", "threads")}
_FLOAT = ModelOptions(weights="float")


def register(app: typer.Typer) -> None:
    app.command("calibrate-router")(calibrate_router)


@friendly_errors
@takes_model
@grafted
def calibrate_router(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="FILE", help="JSON lines with a `question` (or `prompt`, or `turns`) each."),
    ],
    model: ModelOption = "demo",
    draft: DraftOption = None,
    router: Annotated[
        str, typer.Option("--router", metavar="NAME", help="self-confidence or first-token-entropy.")
    ] = "self-confidence",
    rate: Annotated[
        float | None, typer.Option("--rate", min=0, max=1, help="Share of steps that the target is to write.")
    ] = None,
    harm_level: Annotated[
        float,
        typer.Option(
            "--harm-level", min=0, max=1, help="Without --rate: share of steps that may be kept though they are worse."
        ),
    ] = 0.1,
    step_writer: Annotated[
        str | None,
        typer.Option("--step-writer", metavar="NAME", help="small-model or quantized-self:weights=int4."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use the first N problems.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Problems at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 320,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    loading: Annotated[ModelOptions, _LOADING] = _FLOAT,
) -> None:
    """Set the threshold of a router that needs no training, on steps of some problems of FILE.

    The draft writes every step, the target reads it, and says by how many nats it would rather have written another:
    more than three make a step that does harm. What is printed names the router as `specdec bench --router` takes it.
    """
    with starting():
        from specdec.bench.routed import choose_step_writer, scores_of
        from specdec.models.pair import load_pair
        from specdec.training.routers.calibrate import Calibrator, calibrate
        from specdec.training.routers.collect import read_problems

    calibrator = Calibrator(score=scores_of(router))
    writer, problems = choose_step_writer(step_writer, draft, model), read_problems(data)[:limit]
    pair = load_pair(model, draft, loading)
    with Bars(err_console) as bars:
        task = bars.add_task("calibrating", total=len(problems))
        for num_done in calibrate(
            pair.target.model,
            pair.build(writer),
            pair.target.tokenizer,
            problems,
            calibrator,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        ):
            bars.update(task, completed=num_done)
    threshold = calibrator.threshold_at_harm(harm_level) if rate is None else calibrator.threshold_at_rate(rate)
    report = calibrator.report(threshold)
    spec = f"{router}:threshold={threshold:.4g}"
    if as_json:
        print(json.dumps({"router": spec, "num_problems": len(problems), **report}))
        return
    table = Table(title=f"{spec}, on {len(problems)} problems", show_header=False)
    for name, value in report.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
