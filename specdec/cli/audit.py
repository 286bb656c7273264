"""`specdec audit`: does a server with speculation say what it would say without?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from specdec.cli.bench_options import whole_numbers
from specdec.cli.common import err_console, friendly_errors, heeds_sigterm, naming, starting, typed
from specdec.cli.grafting import grafted
from specdec.cli.options import LOADING, MODEL_OPTIONS, LoadingOptions

if TYPE_CHECKING:
    from specdec.audit import Case, Findings, Server
    from specdec.audit.answers import Reference
    from specdec.model_options import ModelOptions

_FOUND = 1
"""Exit status where answers differ, or there is none."""
_AUDIT_PANEL = "Audit"


def register(app: typer.Typer) -> None:
    app.command()(audit)


@friendly_errors
@heeds_sigterm
@grafted
def audit(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, as http://127.0.0.1:8000.")],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="URL|MODEL",
            help="The same server without speculation, or the model that it serves, to decode here. Without it, "
            "the server is asked not to speculate, if it can be (`specdec serve` can).",
            rich_help_panel=_AUDIT_PANEL,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="What the server calls the model; the first one if absent.", rich_help_panel=_AUDIT_PANEL
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="SPECDEC_API_KEY",
            help="Of the server.",
            show_default=False,
            rich_help_panel=_AUDIT_PANEL,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer and shorter answers, 1 and 4 at once.", rich_help_panel=_AUDIT_PANEL),
    ] = False,
    concurrency: Annotated[
        str,
        typer.Option(
            "--concurrency", metavar="N[,N...]", help="Requests at the same time.", rich_help_panel=_AUDIT_PANEL
        ),
    ] = "1,2,4,8",
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", min=16, help="Of a long answer.", rich_help_panel=_AUDIT_PANEL),
    ] = 96,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length",
            min=256,
            help="Tokens of the server's context, which is filled to the end; asked of the server if absent.",
            rich_help_panel=_AUDIT_PANEL,
        ),
    ] = None,
    tie_bound: Annotated[
        float | None,
        typer.Option(
            "--tie-bound",
            min=0,
            help="Differences where the reference prefers its token by less, in log-probability, are ties; four times "
            "its own noise, at least 0.001, if absent.",
            rich_help_panel=_AUDIT_PANEL,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds for an answer.", rich_help_panel=_AUDIT_PANEL)
    ] = 300.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Write the page too, as its ending says: .md, .html or .json.",
            rich_help_panel=_AUDIT_PANEL,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_AUDIT_PANEL)
    ] = False,
    loading: LoadingOptions = LOADING,
) -> None:
    """Prove that a server with speculative decoding says what it would say without: any engine's, by OpenAI's API.

    Prints a page to attach to a bug report. Exit status 0: all answers are the reference's, up to ties; 1: some are
    not.
    """
    is_model = reference is not None and not reference.startswith(("http://", "https://"))
    for option in typed(context) & MODEL_OPTIONS.keys():
        if not is_model:
            raise ValueError(
                f"--{option.replace('_', '-')} is of a model that is decoded here: give it with --reference"
            )
    numbers = (1, 4) if quick and "concurrency" not in typed(context) else whole_numbers("--concurrency", concurrency)
    write = _writer(output)

    from specdec.audit import Server, make_cases
    from specdec.audit import audit as run

    cases = make_cases(num_tokens=max_new_tokens, quick=quick)
    server = Server(url, model=name, api_key=api_key, timeout=timeout)
    findings = run(
        server,
        _reference(reference, server, cases[0], api_key, timeout, loading),
        cases,
        concurrency=numbers,
        tie_bound=tie_bound,
        context_length=context_length,
        on_phase=_tell,
    )
    write(findings)
    _print(findings, as_json=as_json)
    if not findings.is_clean:
        raise typer.Exit(_FOUND)


def _reference(
    name: str | None, server: Server, case: Case, api_key: str | None, timeout: float, loading: ModelOptions
) -> Reference:
    from specdec.audit import Server
    from specdec.audit.run import without_speculation

    if name is None:
        return without_speculation(server, case)
    if name.startswith(("http://", "https://")):
        return Server(name, api_key=api_key, timeout=timeout)
    with starting():
        from specdec.audit.local import LocalModel
        from specdec.models.pair import load_pair

    return LocalModel(load_pair(name, None, loading).target)


def _tell(findings: Findings, phase: str) -> None:
    from specdec.audit.run import tally

    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(tally(findings, phase).items()))
    err_console.print(Text(f"{phase}: {counts}", style="dim"), soft_wrap=True)


def _writer(path: Path | None) -> Callable[[Findings], None]:
    """What writes the page; raises `ValueError` for one that could not be written."""
    from specdec.audit import as_html, as_markdown

    writers: Mapping[str, Callable[[Findings], str]] = {".md": as_markdown, ".html": as_html, ".json": _document}
    if path is None:
        return lambda findings: None
    if path.suffix not in writers:
        raise ValueError(f"--output {path}: the ending says what is written; it may be {', '.join(writers)}")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")

    def write(findings: Findings) -> None:
        with naming(path):
            path.write_text(writers[path.suffix](findings), encoding="utf-8")

    return write


def _document(findings: Findings) -> str:
    from specdec.audit import as_document

    document: dict[str, Any] = as_document(findings)
    return json.dumps(document, indent=2) + "\n"


def _print(findings: Findings, *, as_json: bool) -> None:
    from specdec.audit import as_markdown

    print(_document(findings) if as_json else as_markdown(findings), end="")
