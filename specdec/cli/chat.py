"""`specdec chat`: a conversation in the terminal."""

from typing import Annotated

import typer

from specdec.cli.common import (
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
    max_new_tokens: MaxNewTokensOption = 512,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    weights: WeightsOption = "stock",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Talk with a model; /help lists what can be typed, Ctrl-C stops a reply, Ctrl-D leaves."""
    from specdec.bench.methods import choose_drafter

    sampling = Sampling(sample=sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    drafter_spec = choose_drafter(drafter, draft)

    from specdec.cli.conversation import Conversation
    from specdec.cli.loading import load_pair

    (target, tokenizer, name), draft_model = load_pair(
        model,
        draft,
        dtype=dtype,
        device=device,
        threads=threads,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    conversation = Conversation(
        target,
        tokenizer,
        drafter=drafter_spec.build(draft_model),
        system=system,
        max_new_tokens=max_new_tokens,
        generation_kwargs=sampling.generation_kwargs,
    )
    sampling.seed_torch()
    conversation.run(greeting=f"{name}: /help for help, Ctrl-D to leave")
