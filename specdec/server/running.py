"""A server from its start to its end: the socket, the engine's thread, signals."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

import uvicorn

from specdec.engine import Engine, EngineThread, LoraEngine
from specdec.server.app import create_app
from specdec.server.connection import Connection
from specdec.server.forms import TokenDecoder
from specdec.server.grammar import Grammars
from specdec.server.options import ServerOptions
from specdec.server.planning import ModelFacts, Planner
from specdec.server.replies.format import ReplyFormat
from specdec.server.service import Service
from specdec.tree_model.compatibility import position_limit, rotation_limit

if TYPE_CHECKING:
    from specdec.models import LoadedModel

_BACKLOG = 2048
_MAX_HEADER_BYTES = 1 << 15
_BACKSTOP_SECONDS = 5
"""After the grace period everything has been cancelled; uvicorn waits that much longer for it to be said."""


def make_service(
    loaded: LoadedModel, engine: Engine | LoraEngine, runner: EngineThread, options: ServerOptions
) -> Service:
    """A model and its engine behind the API."""
    facts = _facts(loaded, engine)
    grammars = None
    with suppress(ValueError):  # everything but replies in JSON works without
        grammars = Grammars(facts.tokenizer, facts.eos_ids)
    planner = Planner(facts, grammars, max_new_tokens=options.max_new_tokens, max_choices=options.max_choices)
    adapters = engine.adapters if isinstance(engine, LoraEngine) else []
    return Service(facts, planner, TokenDecoder(facts.tokenizer, grammars), runner, engine, options, adapters)


def _facts(loaded: LoadedModel, engine: Engine | LoraEngine) -> ModelFacts:
    config = loaded.model.generation_config
    eos = config.eos_token_id if config.eos_token_id is not None else loaded.tokenizer.eos_token_id
    return ModelFacts(
        name=loaded.name,
        tokenizer=loaded.tokenizer,
        config=config,
        eos_ids=() if eos is None else tuple([eos] if isinstance(eos, int) else eos),
        form=ReplyFormat.of(loaded.tokenizer),
        vocab_size=loaded.model.config.get_text_config(decoder=True).vocab_size,
        context_length=min(
            position_limit(loaded.model), rotation_limit(loaded.model) or sys.maxsize, engine.max_cached_tokens
        ),
    )


class Server(uvicorn.Server):
    """Takes nothing more once it is told to stop; what is under way gets a grace period and is then cancelled."""

    def __init__(self, service: Service, *, on_stop: Callable[[], None]):
        self._service = service
        options = service.options
        super().__init__(
            uvicorn.Config(
                create_app(service, on_stop=on_stop),
                host=options.host,
                port=options.port,
                http=cast("type[asyncio.Protocol]", partial(Connection, options=options)),
                proxy_headers=options.proxy is not None,  # others could name any address, and gain turns
                forwarded_allow_ips=options.proxy or [],
                ws="none",
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                timeout_graceful_shutdown=int(options.grace) + _BACKSTOP_SECONDS,
                access_log=False,
                server_header=False,
                log_level="warning",
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.close()
        ending = asyncio.get_running_loop().call_later(self._service.options.grace, self._service.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def serve(
    loaded: LoadedModel, engine: Engine | LoraEngine, options: ServerOptions, *, announce: Callable[[str], None]
) -> None:
    """Listen until SIGTERM or SIGINT; return once everything has ended.

    Args:
        announce: told where the server listens, once it does.

    Raises:
        ValueError: the address cannot be used.
    """
    listener = _listen(options.host, options.port)
    runner = EngineThread(engine)
    try:
        server = Server(make_service(loaded, engine, runner, options), on_stop=lambda: runner.close(timeout=0))
        host, port = listener.getsockname()[:2]
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again, once it has obeyed it
            server.run([listener])
    finally:
        runner.close(timeout=0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}; --port 0 takes any free one") from error
