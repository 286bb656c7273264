"""`specdec serve`: OpenAI's API on one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import (
    DeviceOption,
    DtypeOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    err_console,
    friendly_errors,
)
from specdec.cli.options import DrafterOption, DraftOption, WeightsOption

_ACCESS = "Access"
_LIMITS = "Limits"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def register(app: typer.Typer) -> None:
    app.command()(serve)


@friendly_errors
def serve(
    model: Annotated[str, typer.Argument(help="'demo', a hub id, a local folder or a .gguf file.")] = "demo",
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model; MODEL, of a path its last part, if absent."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on.", rich_help_panel=_ACCESS)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any free one.", rich_help_panel=_ACCESS)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="SPECDEC_API_KEY",
            help="Asked of every client. Other users of the machine can see an option, but not the variable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    no_api_key: Annotated[
        bool,
        typer.Option(
            "--no-api-key",
            help="Let everyone in who can reach --host, also from other machines.",
            rich_help_panel=_ACCESS,
        ),
    ] = False,
    proxy: Annotated[
        str | None,
        typer.Option(
            "--proxy",
            metavar="ADDRESS",
            help="A reverse proxy's; its X-Forwarded-For tells clients apart, who take turns.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Requests decoded at once.", rich_help_panel=_LIMITS)
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option("--max-waiting", min=1, help="Requests that may wait; more get 429.", rich_help_panel=_LIMITS),
    ] = 256,
    max_cached_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-cached-tokens",
            min=1,
            help="Tokens of key/value memory for all requests; half of the free memory if absent.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a reply.", rich_help_panel=_LIMITS)
    ] = 4096,
    max_choices: Annotated[
        int,
        typer.Option("--max-choices", min=1, help="Of an answer: n for each prompt.", rich_help_panel=_LIMITS),
    ] = 8,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request.", rich_help_panel=_LIMITS)] = 1
    << 20,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds for an answer, then 504.", rich_help_panel=_LIMITS)
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option("--grace", help="Seconds for answers to finish after SIGTERM or Ctrl-C.", rich_help_panel=_LIMITS),
    ] = 10.0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    weights: WeightsOption = "stock",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Serve a model by OpenAI's API (docs/server.md). Needs `pip install specdec-runtime[serve]`."""
    from specdec.names.methods import choose_drafter

    drafter_spec = choose_drafter(drafter, draft)
    _check_extra()
    from specdec.server.options import ServerOptions

    if api_key is not None and no_api_key:
        raise ValueError("--no-api-key lets everyone in, and there is an API key: give only one of them")
    options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        allows_no_key=no_api_key,
        proxy=proxy,
        max_body_bytes=max_body,
        max_new_tokens=max_new_tokens,
        max_choices=max_choices,
        timeout=timeout,
        grace=grace,
    )

    from specdec.engine import Engine
    from specdec.loading import load_pair
    from specdec.server import running

    loaded, small = load_pair(
        model,
        draft,
        dtype=dtype,
        device=device,
        threads=threads,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    engine = Engine(
        loaded.model,
        drafter=drafter_spec.build(small),
        tokenizer=loaded.tokenizer,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_cached_tokens=max_cached_tokens,
    )
    loaded = loaded._replace(name=name or served_name(model, loaded.name))
    running.serve(loaded, engine, options, announce=lambda url: err_console.print(f"{loaded.name} at {url}"))


def served_name(model: str, loaded_name: str) -> str:
    """What a model is called that was asked for as `model`: the same, but clients are not told where files lie."""
    return loaded_name if Path(model).exists() else model


def _check_extra() -> None:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install specdec-runtime[serve]")
