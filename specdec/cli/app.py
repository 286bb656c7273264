"""The table of commands."""

from typing import Annotated

import typer

from specdec import __version__
from specdec.cli import (
    audit,
    batch,
    bench,
    calibrate_router,
    chat,
    doctor,
    generate,
    pull,
    serve,
    train_head,
    train_router,
)

app = typer.Typer(
    name="specdec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (pull, generate, chat, serve, batch, bench, audit, doctor, train_head, train_router, calibrate_router):
    command.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Lossless speculative decoding for Hugging Face language models: the same tokens, faster."""


def main() -> None:
    app()
