"""Errors in OpenAI's shape: every one says what was wrong and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from specdec.server.protocol.common import NO_EFFECT, UNSUPPORTED


class ErrorDetail(BaseModel):
    """What went wrong.

    Args:
        param: the path of the parameter that is at fault, if one is.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error.

    Args:
        param: the parameter at fault.
        code: for programs to tell errors of one status apart.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        message = message.encode("utf-8", "replace").decode()  # it may tell names that are no text
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(error=ErrorDetail(message=message, type=_type(status), param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, headers=self.headers)


_MAX_NAME = 100
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def _type(status: int) -> str:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    return _TYPES.get(status, "invalid_request_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: a parameter that is wrong in itself."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def queue_full(message: str) -> ApiError:
    """429: too many requests wait."""
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="queue_full", headers={"Retry-After": "1"})


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 of what pydantic says about a body."""
    first = errors[0]
    path = _path(first["loc"])
    if first["type"] == "json_invalid":
        return invalid(f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}", code="no_json")
    if first["type"] == "extra_forbidden":
        return _unknown(_path(first["loc"][:-1]), str(first["loc"][-1])[:_MAX_NAME])
    if not path and first["type"] == "missing":
        return invalid("the body is empty: send a JSON object", code="no_json")
    if not path and first["type"] == "value_error":  # of parameters that do not go together
        return invalid(_plain(first["msg"]), code="invalid_value")
    if not path:
        return invalid(f"the body is no JSON object sent as application/json: {first['msg']}", code="no_json")
    # the alternatives of one parameter are told together
    meant = [error["msg"] for error in errors if _path(error["loc"]).split(".")[0] == path.split(".")[0]]
    reasons = "; or: ".join(dict.fromkeys(_plain(message) for message in meant))
    if isinstance(first["input"], bool | int | float):
        reasons += f", got {first['input']!r:.40}"
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    return invalid(f"{path}: {reasons}", path, code)


def from_conversation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 of what pydantic says about the conversation that a body stands for."""
    return invalid(_plain(errors[0]["msg"]), code="invalid_value")


def _unknown(parent: str, name: str) -> ApiError:
    path = f"{parent}.{name}" if parent else name
    if name in UNSUPPORTED:
        idle = " or ".join(json.dumps(value) for value in NO_EFFECT.get(name, ()))
        advice = f"leave it out, or say {idle}" if idle else "leave it out"
        return invalid(f"{path} is not supported by this server: {advice}", path, "unsupported_parameter")
    return invalid(f"{path} is no parameter of this request: check its spelling", path, "unknown_parameter")


def _plain(message: str) -> str:
    """Without what pydantic puts before the message of a check of ours."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content` of ("body", "messages", 0, "content", "str"): branches of unions are left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _BRANCHES or not part.isidentifier():
            break
        else:
            path += f".{part}" if path else part
    return path


_BRANCHES = {
    *("str", "int", "float", "bool", "list", "dict", "TextPart", "NamedTool", "SpeculationOptions"),
    *("InputMessage", "FunctionCall", "FunctionCallOutput", "ReasoningItem", "ContentPart", "NamedResponseTool"),
}
