"""What every command shares: the model options, the console for people, and errors as one line."""

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from specdec.errors import SpecdecError

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR = 2
INTERRUPTED = 130
"""What shells report of a program that Ctrl-C has ended."""

MODEL_PANEL = "Model and machine"
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="'demo', a hub id, a local folder or a .gguf file.", rich_help_panel=MODEL_PANEL
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16 or float16; auto: float32 on CPU, the checkpoint's own on GPU.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MODEL_PANEL)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads for torch; torch's own choice if absent.", rich_help_panel=MODEL_PANEL
    ),
]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with the model.", rich_help_panel=MODEL_PANEL
    ),
]

err_console = Console(stderr=True)
"""Progress, logs and errors: stdout belongs to the command's result."""


def friendly_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an error that the user can act on into one red line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (SpecdecError, ValueError) as error:
            message = " ".join(str(error).split())
            err_console.print(Text(f"error: {message}", style="red"), soft_wrap=True)
            raise typer.Exit(USER_ERROR) from None

    return wrapper
