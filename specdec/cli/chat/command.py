"""The options of `specdec chat`."""

import sys
from typing import Annotated

import typer

from specdec.cli.chat.settings import MAX_NEW_TOKENS, Settings
from specdec.cli.common import (
    INTERRUPTED,
    DeviceOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    friendly_errors,
)
from specdec.cli.options import (
    DrafterOption,
    DraftOption,
    MaxNewTokensOption,
    SampleOption,
    Sampling,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
)


def register(app: typer.Typer) -> None:
    app.command()(chat)


@friendly_errors
def chat(
    model: ModelOption = "demo",
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: MaxNewTokensOption = MAX_NEW_TOKENS,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Reply to this and leave; - reads it from stdin.", show_default=False),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    weights: WeightsOption = "stock",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Talk with a model; /help lists what can be typed, Ctrl-C stops a reply, Ctrl-D leaves.

    Piped stdin is read line by line: a message each, or a command.
    """
    from specdec.bench.methods import choose_drafter

    sampling = Sampling(sample=sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    settings = Settings(max_new_tokens=max_new_tokens, sampling=sampling)
    drafter_spec = choose_drafter(drafter, draft)
    message = None if prompt is None else _read_message(prompt)

    from specdec.cli.chat.commands import candidates
    from specdec.cli.chat.reading import make_reader
    from specdec.cli.chat.rendering import reply_console
    from specdec.cli.chat.session import ChatSession
    from specdec.cli.chat.speakers import SpeakerLoader

    loader = SpeakerLoader(
        dtype=dtype, device=device, threads=threads, weights=weights, trust_remote_code=trust_remote_code
    )
    session = ChatSession(
        loader.load(model, drafter_spec, draft),
        loader=loader,
        reader=make_reader(candidates),
        console=reply_console(),
        settings=settings,
        system=system,
    )
    if message is None:
        session.run()
    elif not session.reply_once(message):
        raise typer.Exit(INTERRUPTED)


def _read_message(prompt: str) -> str:
    message = (sys.stdin.read() if prompt == "-" else prompt).strip()
    if not message:
        raise ValueError("the prompt is empty")
    return message
