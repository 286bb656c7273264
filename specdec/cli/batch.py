"""`specdec batch`: a file of prompts, answered line by line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TaskProgressColumn
from rich.text import Text
from typer.core import TyperCommand

from specdec.cli.common import (
    INTERRUPTED,
    MODEL_PANEL,
    ModelOption,
    err_console,
    friendly_errors,
    heeds_sigterm,
    starting,
)
from specdec.cli.grafting import grafted
from specdec.cli.options import (
    GREEDY,
    LOADING,
    EngineDrafterOption,
    EngineDraftOption,
    LoadingOptions,
    MaxNewTokensOption,
    SamplingOptions,
    StopOption,
)
from specdec.cli.progress import Bars
from specdec.specs import choose_drafter

if TYPE_CHECKING:
    from specdec.batch import BatchProgress, Pool, Settings

_CLUSTER_PANEL = "Cluster"
_HERE = "here"
"""What --ray stands for without an address."""
_ADDRESS = re.compile(r"auto|ray://\S+|[\w.-]+:\d+")


_MaxRowsOption = Annotated[
    int | None,
    typer.Option(
        "--max-rows",
        min=1,
        help="Lines that are decoded at once; by what forwards cost on this machine if absent.",
        rich_help_panel=MODEL_PANEL,
    ),
]
_ReuseOption = Annotated[
    bool,
    typer.Option(
        "--reuse-replies",
        help="Draft from the answers to earlier lines too: quicker where answers are alike. They stay the same.",
        rich_help_panel=MODEL_PANEL,
    ),
]
_RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster: host:port, ray://host:port, auto (that of this machine), or without an "
        "address one that is started here. Needs the extra 'ray'.",
        rich_help_panel=_CLUSTER_PANEL,
    ),
]
_WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="With --ray: models on the cluster; one for each GPU, or without GPUs each node, if absent.",
        rich_help_panel=_CLUSTER_PANEL,
    ),
]


class _BatchCommand(TyperCommand):
    """Gives --ray a value where the next word is no address: Typer has no options with an optional one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        complete = list(args)
        for index in range(len(args) - 1, -1, -1):
            follows = args[index + 1] if index + 1 < len(args) else ""
            if args[index] == "--ray" and not _ADDRESS.fullmatch(follows):
                complete.insert(index + 1, _HERE)
        return super().parse_args(ctx, complete)


def register(app: typer.Typer) -> None:
    app.command(cls=_BatchCommand)(batch)


@friendly_errors
@heeds_sigterm
@grafted
def batch(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN.jsonl", help='Lines such as {"id": 7, "prompt": "..."} or {"messages": [...]}.'),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="Is appended to: a run resumes where it stopped.")
    ],
    model: ModelOption = "demo",
    draft: EngineDraftOption = None,
    drafter: EngineDrafterOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    sampling: SamplingOptions = GREEDY,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt of lines with a prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as they are, without the chat template.")
    ] = False,
    stop: StopOption = None,
    max_rows: _MaxRowsOption = None,
    reuse_replies: _ReuseOption = False,
    loading: LoadingOptions = LOADING,
    ray: _RayOption = None,
    workers: _WorkersOption = None,
) -> None:
    """Answer every line of a file of prompts. After Ctrl-C or a crash, the same command resumes."""
    if workers is not None and ray is None:
        raise ValueError("--workers needs --ray: without it, this process does the work")
    if raw and system is not None:
        raise ValueError("--system is part of the chat template, which --raw leaves out: give only one of them")

    with starting():
        from specdec.batch import Settings, SpecdecBatch  # noqa: F401

    choose_drafter(drafter, draft, for_engine=True)  # what is wrong with it is told before a model is loaded
    settings = Settings(
        max_new_tokens=max_new_tokens,
        seed=sampling.seed,
        raw=raw,
        system=system,
        stop=tuple(stop or ()),
        **sampling.generation_kwargs,
    )
    worker = {"model": model, "draft": draft, "drafter": drafter, "max_rows": max_rows, **asdict(loading)}
    worker["reuses_replies"] = reuse_replies
    made_with = (model, loading.weights, loading.dtype)
    done = _run(source, output, lambda: _pool(worker, ray, workers, settings), settings, made_with)
    _summarise(done, output)


def _run(
    source: Path, output: Path, make_pool: Callable[[], Pool], settings: Settings, made_with: tuple[str, ...]
) -> BatchProgress:
    """Answer the lines under a progress bar. Ctrl-C ends the command."""
    from specdec.batch import run_batch

    with Bars(err_console, TaskProgressColumn()) as bar:
        task = bar.add_task("answering", total=None)

        def show(progress: BatchProgress) -> None:
            note = f"{progress.tokens_per_second:.1f} tokens/s"
            bar.update(task, total=progress.num_bytes, completed=progress.end, note=note)

        try:
            return run_batch(source, output, make_pool, settings, made_with=made_with, on_progress=show)
        except KeyboardInterrupt:
            bar.stop()
            err_console.print("stopped; the same command resumes here", style="dim")
            raise typer.Exit(INTERRUPTED) from None


def _pool(worker: dict[str, Any], ray: str | None, workers: int | None, settings: Settings) -> Pool:
    if ray is None:
        from specdec.batch import SpecdecBatch

        return SpecdecBatch(**worker).worker
    from specdec.batch.cluster import ClusterPool

    address = None if ray == _HERE else ray
    return ClusterPool(address, num_workers=workers, cpus=worker["threads"] or 1, worker_options=worker)


def _summarise(done: BatchProgress, output: Path) -> None:
    counts = [f"{done.num_lines} lines answered"]
    if done.num_skipped:
        counts.append(f"{done.num_skipped} were done already")
    if done.num_errors:
        counts.append(f"{done.num_errors} could not be: see {output.name.removesuffix('.jsonl')}.errors.jsonl")
    speed = f"{done.num_tokens} tokens in {done.seconds:.1f} s ({done.tokens_per_second:.1f} tokens/s)"
    if done.num_rounds:
        speed += f", {done.num_tokens / done.num_rounds:.2f} tokens per row and round"
    err_console.print(Text(f"{'; '.join(counts)}. {speed}", style="dim"), soft_wrap=True)
