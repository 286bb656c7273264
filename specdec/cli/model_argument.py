"""A model is named by --model, or without it: `specdec chat demo`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

import typer

R = TypeVar("R")

_ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="'demo', a hub id, a local folder or a .gguf file; the same as --model.",
        show_default=False,
    ),
]


def takes_model(command: Callable[..., R]) -> Callable[..., R]:
    """Let the model be named without --model too: `specdec chat demo`. Raises `ValueError` for two models."""
    signature = inspect.signature(command, eval_str=True)
    default = signature.parameters["model"].default

    @functools.wraps(command)
    def wrapper(*, model_argument: str | None, model: str | None, **given: Any) -> R:
        if model_argument is not None and model is not None:
            raise ValueError(f"there are two models, {model_argument} and --model {model}: give one of them")
        chosen = model_argument or model or default
        if chosen is inspect.Parameter.empty:
            raise ValueError("there is no model: name one, a hub id, a local folder or a .gguf file")
        return command(model=chosen, **given)

    parameters = [
        inspect.Parameter("model_argument", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_ModelArgument)
    ]
    for one in signature.parameters.values():
        option = one.replace(default=None, annotation=_optional(one.annotation)) if one.name == "model" else one
        parameters.append(option.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    vars(wrapper)["__signature__"] = signature.replace(parameters=parameters)
    return wrapper


def _optional(annotation: Any) -> Any:
    kind, option = get_args(annotation)
    return Annotated[kind | None, option]
