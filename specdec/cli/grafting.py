"""Commands whose options are the fields of dataclasses: declared once, however many commands have them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

R = TypeVar("R")
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT", list[str]: "TEXT", Path: "FILE"}
"""Short ones: descriptions need the room."""
FieldOptions = Mapping[str, OptionInfo]
"""field -> how it is given on a command line; what is not among them keeps its default."""


def grafted(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command an option for each field of the dataclasses that it takes.

    Such a parameter is `name: Annotated[Class, {field: typer.Option(...)}] = Class(...)`. Types come from the class,
    default values from the parameter's own. Raises what the class raises for a combination that it refuses.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: one for name, one in signature.parameters.items() if _field_options(one)}

    @functools.wraps(command)
    def wrapper(**given: Any) -> R:
        for name, group in groups.items():
            fields = {field: given.pop(field) for field in _field_options(group) if field in given}
            fields = {field: tuple(one) if isinstance(one, list) else one for field, one in fields.items()}
            given[name] = replace(group.default, **fields)
        return command(**given)

    parameters = [_short(one) for parameter in signature.parameters.values() for one in _options_of(parameter)]
    vars(wrapper)["__signature__"] = signature.replace(parameters=parameters)
    return wrapper


def _short(parameter: inspect.Parameter) -> inspect.Parameter:
    """With a short word in the help for what the option takes, unless it has one."""
    kind, *details = get_args(parameter.annotation) or (None,)
    options = [one for one in details if isinstance(one, OptionInfo)]
    kinds = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
    word = _METAVARS.get(kind) or (_METAVARS.get(kinds[0]) if len(kinds) == 1 else None)
    if not options or options[0].metavar is not None or word is None:
        return parameter
    option = copy.copy(options[0])
    option.metavar = word
    return parameter.replace(annotation=Annotated[kind, option])


def _field_options(parameter: inspect.Parameter) -> FieldOptions:
    _, *details = get_args(parameter.annotation) or (None,)
    return next((one for one in details if isinstance(one, Mapping)), {})


def _options_of(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    options = _field_options(parameter)
    if not options:
        yield parameter
        return
    types = get_type_hints(type(parameter.default))
    for field, option in options.items():
        kind, default = types[field], getattr(parameter.default, field)
        if get_origin(kind) is tuple:  # of any length: what is repeated is a list to typer
            kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
        yield parameter.replace(name=field, annotation=Annotated[kind, option], default=default)
