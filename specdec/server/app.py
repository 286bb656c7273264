"""The routes, and errors as answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from specdec import __version__
from specdec.server.access import AccessMiddleware, client_of
from specdec.server.answers import Form, event_stream, whole_answer
from specdec.server.errors import ApiError, ErrorBody, from_conversation, from_validation
from specdec.server.forms import CompletionForm
from specdec.server.jobs import Job
from specdec.server.logs import JOB, log_request
from specdec.server.pages import add_pages
from specdec.server.protocol.answers import ChatCompletion, Health, ModelCard, ModelList, TextCompletion
from specdec.server.protocol.requests import ChatRequest, CompletionRequest
from specdec.server.protocol.responses import ResponsesRequest
from specdec.server.responses import Response as ResponseDocument
from specdec.server.service import Service

_T = TypeVar("_T")

_CLIENT_CLOSED = 499
"""What nginx calls an answer that nobody was there to read."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The request is wrong; the message says what is allowed.",
        401: "The API key is missing or wrong.",
        403: "The Host header names another machine, and there is no API key.",
        404: "There is no such model or path.",
        405: "The path takes another method.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The queue is full: come again after Retry-After seconds.",
        500: "An error of the server, or of the model's chat template.",
        503: "The server is shutting down, or overloaded.",
        504: "The answer was not finished in time.",
    }.items()
}


def create_app(service: Service, *, on_stop: Callable[[], None] = lambda: None) -> FastAPI:
    """The application.

    Args:
        on_stop: called when the server has stopped.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        yield
        await asyncio.to_thread(on_stop)
        await service.release()

    app = FastAPI(
        title="specdec",
        summary="OpenAI's API on a speculative decoding engine.",
        version=__version__,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=_ERRORS,
    )
    add_pages(app)
    _add_routes(app, service)
    _add_errors(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        AccessMiddleware,
        options=service.options,
        record=lambda path, status: service.metrics.record_answer(path if path in paths else "other", status),
        log=log_request if service.options.logs else lambda *_: None,
    )
    if service.options.cors:  # the outermost: a browser asks before it sends the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    stream: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {}}, "description": "The answer, or a stream of its parts."}
    }

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**_ERRORS, **stream})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation."""
        return await _answer(request, service, body, lambda job: service.chat_form(body, job))

    @app.post("/v1/responses", response_model=ResponseDocument, responses={**_ERRORS, **stream})
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Reply to a conversation, as a list of items. Nothing is stored."""
        try:
            chat = body.as_chat()
        except ValidationError as error:
            raise from_conversation(error.errors()) from error
        return await _answer(request, service, chat, lambda job: service.responses_form(body, chat, job))

    @app.post("/v1/completions", response_model=TextCompletion, responses={**_ERRORS, **stream})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        form = CompletionForm(body.model, service.decoder, includes_usage=body.includes_usage)
        return await _answer(request, service, body, lambda _: form)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served, and its LoRA adapters."""
        return ModelList(data=list(service.cards.values()))

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """Whether a model is served."""
        service.check_model(model, None)
        return service.cards[model]

    @app.get("/health")
    async def health() -> Health:
        """Whether requests are taken."""
        return Health(status="closing" if service.is_closing else "ok", model=service.model_name)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _answer(
    request: Request,
    service: Service,
    body: ChatRequest | CompletionRequest,
    make_form: Callable[[Job], Form],
) -> Response:
    num_choices = body.n or 1
    job = await _unless_client_leaves(request, service.start(body, client_of(request.scope)))
    if job is None:
        return Response(status_code=_CLIENT_CLOSED)
    request.scope[JOB] = job
    if body.stream:
        return _EventStream(job, event_stream(job, make_form(job), num_choices))
    try:
        answer = await _unless_client_leaves(request, whole_answer(job, make_form(job), num_choices))
        if answer is None:
            return Response(status_code=_CLIENT_CLOSED)
        return Response(answer.model_dump_json(), media_type="application/json")
    finally:
        job.close()


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What comes of it; None if it was cancelled because nobody waits for it any more."""
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        doing.cancel()
        leaving.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events; closes its job when the client has them all, or has left."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, _http_message(request, error), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def our_error(_: Request, error: Exception) -> Response:
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of ours; the server's log has it").response()


def _http_message(request: Request, error: HTTPException) -> str:
    """What the framework says in two words, in a sentence."""
    if error.status_code == HTTPStatus.NOT_FOUND:
        return "there is nothing at this path: /openapi.json lists those that there are"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"this path takes {allowed}, not {request.method[:20]}"
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return "the body is no JSON: it is not UTF-8, too deeply nested, or has a number of thousands of digits"
    return str(error.detail)
