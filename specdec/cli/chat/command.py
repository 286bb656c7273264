"""The options of `specdec chat`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli.chat.settings import MAX_NEW_TOKENS, Settings
from specdec.cli.common import INTERRUPTED, ModelOption, friendly_errors, heeds_sigterm, starting, typed
from specdec.cli.grafting import grafted
from specdec.cli.model_argument import takes_model
from specdec.cli.options import (
    GREEDY,
    LOADING,
    MODEL_OPTIONS,
    SAMPLING_OPTIONS,
    DrafterOption,
    DraftOption,
    LoadingOptions,
    MaxNewTokensOption,
    PrefixCacheOption,
    SamplingOptions,
    prefix_bytes,
)
from specdec.model_options import ModelOptions
from specdec.specs import choose_drafter

if TYPE_CHECKING:
    from specdec.cli.chat.speakers import Speaker

_OF_THE_SERVER = ("draft", "drafter", "prefix_cache", *MODEL_OPTIONS)
_OF_THE_FILE = ("system", "max_new_tokens", "greedy", *SAMPLING_OPTIONS)


def register(app: typer.Typer) -> None:
    app.command()(chat)


@friendly_errors
@heeds_sigterm
@takes_model
@grafted
def chat(
    context: typer.Context,
    model: ModelOption = "demo",
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: MaxNewTokensOption = MAX_NEW_TOKENS,
    sampling: SamplingOptions = GREEDY,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Decode greedily where the model's generation config samples.",
            rich_help_panel="Sampling",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Talk to the model of a server (`specdec serve`) instead; --model is then one of its names.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="SPECDEC_API_KEY", help="Of the server at --url.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Reply to this and leave; - reads it from stdin.", show_default=False),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option("--load", metavar="FILE", help="Begin with a conversation that /save wrote.", show_default=False),
    ] = None,
    prefix_cache: PrefixCacheOption = None,
    loading: LoadingOptions = LOADING,
) -> None:
    """Talk with a model; /help lists what can be typed, Ctrl-C stops a reply, Ctrl-D leaves.

    Piped stdin is read line by line: a message each, or a command.
    """
    if greedy and sampling.sample:
        raise ValueError("--greedy and --sample exclude each other: give one of them")
    settings = Settings(max_new_tokens=max_new_tokens, sampling=sampling)
    given = typed(context)
    _check_together(url, given)
    message = None if prompt is None else _read_message(prompt)

    with starting():
        from specdec.cli.chat.commands import candidates, obey
        from specdec.cli.chat.reading import make_reader
        from specdec.cli.chat.rendering import reply_console
        from specdec.cli.chat.session import ChatSession
        from specdec.cli.chat.transcript import Transcript, transcript_path

    path = None if load is None else transcript_path(str(load))
    saved = None if path is None else Transcript.load(path)  # before a model is, which takes long
    if url is None:
        speaker = _local(model, drafter, draft, loading, prefix_bytes(prefix_cache))
    else:
        speaker = _remote(url, api_key, model if "model" in given else None)
    if speaker.samples and not greedy:
        settings = replace(settings, sampling=replace(sampling, sample=True))
    session = ChatSession(
        speaker,
        obey=obey,
        reader=make_reader(candidates),
        console=reply_console(),
        settings=settings,
        system=system,
    )
    if path is not None and saved is not None:
        session.resume(saved, path)
    if message is None:
        session.run()
    elif not session.reply_once(message):
        raise typer.Exit(INTERRUPTED)


def _local(
    model: str, drafter: str | None, draft: str | None, options: ModelOptions, max_prefix_bytes: int | None
) -> Speaker:
    drafter_spec = choose_drafter(drafter, draft)
    with starting():
        from specdec.cli.chat.speakers import LocalSpeaker

    return LocalSpeaker.load(model, options, drafter_spec, draft, max_prefix_bytes=max_prefix_bytes)


def _remote(url: str, api_key: str | None, model: str | None) -> Speaker:
    with starting():
        from specdec.cli.chat.remote import RemoteSpeaker, connect

    client = connect(url, api_key)
    try:
        return RemoteSpeaker.of(client, model)
    except OSError as error:
        raise ValueError(f"{error}; is `specdec serve` running there?") from error


def _check_together(url: str | None, given: set[str]) -> None:
    """Raise `ValueError` for options that would have no effect."""
    if "load" in given:
        for name in _OF_THE_FILE:
            if name in given:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is in the file that --load reads: change it with /set or /system, or there")
    if url is None:
        if "api_key" in given:
            raise ValueError("--api-key is for a server: give its --url too")
        return
    for name in _OF_THE_SERVER:
        if name in given:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is decided where the model is: give it to `specdec serve`, not with --url")


def _read_message(prompt: str) -> str:
    message = (sys.stdin.read() if prompt == "-" else prompt).strip()
    if not message:
        raise ValueError("the prompt is empty")
    return message
