"""What every command shares: the model's name, the console for people, and errors as one line."""

import atexit
import contextlib
import functools
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec, TextIO, TypeVar, cast

import typer
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from specdec.cli.status import shown_stages
from specdec.errors import SpecdecError
from specdec.stages import stage

P = ParamSpec("P")
R = TypeVar("R")

USER_ERROR = 2
INTERRUPTED = 130
"""What shells report of a program that Ctrl-C has ended."""
TERMINATED = 143
"""What shells report of a program that `kill` has ended."""
BROKEN_PIPE = 141
"""What shells report of a program whose reader has gone."""
_STDOUT = "the standard output"

MODEL_PANEL = "Model and machine"
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="'demo' (the default), a hub id, a local folder or a .gguf file.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]


class _ErrConsole(Console):
    """A console that falls silent where nobody reads it, or its disk is full: the work is no worse for that."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except OSError:
            self.quiet = True
            _silence(sys.stderr)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would close stdout and exit


err_console = _ErrConsole(stderr=True)
"""Progress, logs and errors: stdout belongs to the command's result."""


def friendly_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an error that the user can act on into one red line on stderr and exit code 2.

    If it is that nobody reads stdout any more (`| head -1`), the command ends without a word, as other programs do.
    While it loads, packs or measures, a status line says so.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _named_stdout(), shown_stages(err_console):
                return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            err_console.print("stopped", style="dim")
            raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich has met it, and closed stdout
                raise typer.Exit(BROKEN_PIPE) from None
            raise
        except Exception as error:
            if (code := _tell(error)) is None:
                raise
            raise typer.Exit(code) from None

    return wrapper


def typed(context: typer.Context) -> set[str]:
    """The parameters that were given on the command line: neither left out nor taken from the environment."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {
        name.removesuffix("_argument")
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """A stage for the imports of a command, which take seconds: less if nobody looks for garbage in what they make.

    Nor does anybody afterwards: modules stay, and each look through their objects takes a tenth of a second or more.
    """
    was_enabled, num_before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with stage("importing torch and transformers"):
            yield
    finally:
        if len(sys.modules) > num_before:  # a caller who has imported all of it may hold garbage that is to go
            gc.freeze()
            atexit.register(_unfreeze)
        if was_enabled:
            gc.enable()


def _unfreeze() -> None:
    """Triton's bindings report as leaks what nobody has looked through when the process ends."""
    if "triton" in sys.modules:
        gc.unfreeze()


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C is, but for conversations, which end."""


def heeds_sigterm(command: Callable[P, R]) -> Callable[P, R]:
    """Let SIGTERM end a command as Ctrl-C does: with a report of what was done."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is not threading.main_thread():
            return command(*args, **kwargs)
        before = signal.signal(signal.SIGTERM, stop)
        try:
            return command(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapper


@contextlib.contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Name the file that an error is about, where it does not itself: of a full disk only the reason is known.

    Raises:
        OSError: with a `filename`.
        SpecdecError: the library that writes tensors has failed.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise
    except SafetensorError as error:
        raise SpecdecError(f"cannot write {file}: {error}") from error


class _NamedStdout:
    """`sys.stdout`, whose errors say that they are its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with naming(_STDOUT):
            return self._stream.write(text)

    def flush(self) -> None:
        with naming(_STDOUT):
            self._stream.flush()


@contextlib.contextmanager
def _named_stdout() -> Iterator[None]:
    """Name stdout in errors; and write all of it before the interpreter ends, where a failure is no longer told."""
    if sys.stdout is None:
        yield
        return
    stdout = cast(TextIO, _NamedStdout(sys.stdout))
    with contextlib.redirect_stdout(stdout):
        try:
            yield
        finally:
            stdout.flush()


def _silence(stream: TextIO) -> None:
    """Let what is left in a stream's buffer go nowhere: the interpreter would try again to write it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(error: Exception) -> int | None:
    """Say what an error means, unless nobody is there to read it; returns the exit code, None for a bug."""
    if isinstance(error, OSError) and error.filename == _STDOUT:
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
    message = _message(error)
    if message is None:
        return None
    err_console.print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)
    return USER_ERROR


def _message(error: Exception) -> str | None:
    """What to tell of an error; None if it is a bug, of which the traceback is to be seen."""
    if isinstance(error, (SpecdecError, ValueError)):
        return str(error)
    if isinstance(error, OSError):
        where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    if _is_out_of_memory(error):
        reason = f" ({error})" if str(error) else ""
        return f"out of memory{reason}: fewer rows, a shorter prompt, a smaller model or --weights int8 take less"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or as torch tells it of a CPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
