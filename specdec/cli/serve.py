"""`specdec serve`: OpenAI's API on one model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from specdec.cli.common import ModelOption, err_console, friendly_errors, starting
from specdec.cli.grafting import FieldOptions, grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import (
    LOADING,
    EngineDrafterOption,
    EngineDraftOption,
    LoadingOptions,
    PrefixCacheOption,
    prefix_bytes,
)
from specdec.server.options import ServerOptions
from specdec.specs import choose_drafter

_ACCESS = "Access"
_LIMITS = "Limits"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_SERVER_OPTIONS: FieldOptions = {
    "host": typer.Option("--host", help="The address to listen on.", rich_help_panel=_ACCESS),
    "port": typer.Option("--port", min=0, max=65535, help="0: any free one.", rich_help_panel=_ACCESS),
    "api_key": typer.Option(
        "--api-key",
        envvar="SPECDEC_API_KEY",
        help="Asked of every client. Other users of the machine can see an option, but not the variable.",
        rich_help_panel=_ACCESS,
    ),
    "allows_no_key": typer.Option(
        "--no-api-key",
        help="Let everyone in who can reach --host, also from other machines.",
        rich_help_panel=_ACCESS,
    ),
    "proxy": typer.Option(
        "--proxy",
        metavar="ADDRESS",
        help="A reverse proxy's; its X-Forwarded-For tells clients apart, who take turns.",
        rich_help_panel=_ACCESS,
    ),
    "cors": typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="Let pages of this origin use the server; may be given several times, '*' for all.",
        rich_help_panel=_ACCESS,
    ),
    "logs": typer.Option("--log/--no-log", help="One line a request, on stderr.", rich_help_panel=_ACCESS),
    "max_new_tokens": typer.Option("--max-new-tokens", "-n", min=1, help="Of a reply.", rich_help_panel=_LIMITS),
    "max_choices": typer.Option(
        "--max-choices", min=1, help="Of an answer: n for each prompt.", rich_help_panel=_LIMITS
    ),
    "max_body_bytes": typer.Option("--max-body", min=1, help="Bytes of a request.", rich_help_panel=_LIMITS),
    "timeout": typer.Option("--timeout", help="Seconds for an answer, then 504.", rich_help_panel=_LIMITS),
    "grace": typer.Option(
        "--grace", help="Seconds for answers to finish after SIGTERM or Ctrl-C.", rich_help_panel=_LIMITS
    ),
}
_SERVER = ServerOptions()


def register(app: typer.Typer) -> None:
    app.command()(serve)


@friendly_errors
@takes_model
@grafted
def serve(
    model: ModelOption = "demo",
    draft: EngineDraftOption = None,
    drafter: EngineDrafterOption = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model; MODEL, of a path its last part, if absent."),
    ] = None,
    server: Annotated[ServerOptions, _SERVER_OPTIONS] = _SERVER,
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
    prefix_cache: PrefixCacheOption = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--lora-modules",
            metavar="NAME=FOLDER",
            help="A LoRA adapter of the model, which clients name as a model; may be given several times. Needs peft, "
            "and --weights stock or float.",
        ),
    ] = None,
    loading: LoadingOptions = LOADING,
) -> None:
    """Serve a model by OpenAI's API (docs/server.md). Needs `pip install 'specdec-runtime\\[serve]'`."""
    drafter_spec = choose_drafter(drafter, draft, for_engine=True)
    _check_extra()
    if server.api_key is not None and server.allows_no_key:
        raise ValueError("--no-api-key lets everyone in, and there is an API key: give only one of them")
    folders = _adapter_folders(lora_modules or [], name or model, loading)
    if folders and prefix_cache is not None:
        raise ValueError("--prefix-cache is for what the files of one model say: leave it or --lora-modules out")

    with starting():
        from specdec.engine import Engine, LoraEngine, check_adapters, load_adapters
        from specdec.models.pair import load_pair
        from specdec.server import running

    check_adapters(folders)  # before a model is read
    pair = load_pair(model, draft, loading, translates=drafter_spec.translates)
    adapters = load_adapters(pair.target.model, folders)

    def make(slots: int | None) -> Engine:
        return Engine(
            pair.target.model,
            drafter=pair.build(drafter_spec),
            tokenizer=pair.target.tokenizer,
            max_rows=max_rows,
            max_waiting=max_waiting,
            max_cached_tokens=slots,
            max_prefix_bytes=prefix_bytes(prefix_cache),
        )

    engine = LoraEngine(pair.target.model, adapters, make, max_cached_tokens) if adapters else make(max_cached_tokens)
    if server.logs:
        _log_to_stderr()
    loaded = pair.target._replace(name=name or served_name(model, pair.target.name))
    running.serve(loaded, engine, server, announce=lambda url: _announce(loaded.name, url))


def _adapter_folders(modules: Sequence[str], model: str, loading: LoadingOptions) -> dict[str, Path]:
    """Where each adapter lies, by name.

    Raises:
        ValueError: something is wrong with the option.
    """
    folders: dict[str, Path] = {}
    for each in modules:
        name, sign, folder = each.partition("=")
        if not name or not sign or not folder:
            raise ValueError(
                f"--lora-modules {each!r}: give a name and a folder, as in --lora-modules pirate=adapters/pirate"
            )
        if name in folders or name in (model, Path(model).name):
            raise ValueError(f"--lora-modules {each!r}: {name!r} is the name of something else that is served")
        folders[name] = Path(folder)
    if folders and loading.weights not in ("stock", "float"):
        raise ValueError(
            f"--weights {loading.weights} and --lora-modules: adapters go into float weights; pass --weights float"
        )
    return folders


def _announce(name: str, url: str) -> None:
    err_console.print(Text(f"{name} at {url}"))
    err_console.print(Text(f"a chat for the browser: {url.removesuffix('v1')}"))


def served_name(model: str, loaded_name: str) -> str:
    """What a model is called that was asked for as `model`: the same, but clients are not told where files lie."""
    return loaded_name if Path(model).exists() else model


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("specdec.server.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _check_extra() -> None:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'specdec-runtime[serve]'")
