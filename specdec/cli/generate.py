"""`specdec generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from specdec.cli.common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    err_console,
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
    VerifyOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from specdec import DecodingStats


def register(app: typer.Typer) -> None:
    app.command()(generate)


@friendly_errors
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Read from stdin if absent.", show_default=False)] = None,
    model: ModelOption = "demo",
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    tree: Annotated[
        str | None,
        typer.Option(
            "--tree",
            metavar="SPEC",
            help="How drafts grow: chain:5, fixed:4x2x1, dyspec:32 (see `specdec bench`).",
        ),
    ] = None,
    verify: VerifyOption = "topdown",
    max_new_tokens: MaxNewTokensOption = 256,
    sample: SampleOption = False,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop after this text; may be given several times.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: text, tokens and statistics.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    weights: WeightsOption = "stock",
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Answer one prompt: the text streams to stdout, the statistics go to stderr."""
    from specdec.names.methods import choose_drafter, choose_tree

    sampling = Sampling(sample=sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    if verify != "topdown" and not sample:
        raise ValueError(f"--verify {verify} needs --sample: greedy output is verified in one way only")
    drafter_spec = choose_drafter(drafter, draft, tree)
    tree_spec = choose_tree(tree, drafter_spec)
    policy = None if tree_spec is None else tree_spec.build()
    if raw and system is not None:
        raise ValueError("--system is part of the chat template, which --raw leaves out: give only one of them")
    text = _read_stdin() if prompt is None else prompt
    if not text.strip():
        raise ValueError("the prompt is empty")

    from transformers import TextStreamer

    import specdec
    from specdec.loading import load_pair

    (target, tokenizer, _), draft_model = load_pair(
        model,
        draft,
        dtype=dtype,
        device=device,
        threads=threads,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    inputs = _encode(tokenizer, text, system=system, raw=raw).to(target.device)
    stopping = {"stop_strings": stop, "tokenizer": tokenizer} if stop else {}
    sampling.seed_torch()
    out = specdec.generate(
        target,
        **inputs,
        **sampling.generation_kwargs,
        **stopping,
        max_new_tokens=max_new_tokens,
        drafter=drafter_spec.build(draft_model),
        tree=policy,
        verify=verify,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
    )
    assert isinstance(out, specdec.SpeculativeOutput)
    if as_json:
        new_ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        answer = tokenizer.decode(new_ids, skip_special_tokens=True)
        print(json.dumps({"text": answer, "tokens": new_ids, "stats": _stats_document(out.stats)}, indent=2))
    else:
        err_console.print(Text(str(out.stats), style="dim"), soft_wrap=True)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise ValueError("there is no prompt: give one as an argument, or pipe one in")
    return sys.stdin.read().removesuffix("\n")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, system: str | None, raw: bool) -> BatchEncoding:
    from specdec.prompting import encode_chats, encode_texts, has_chat_template, user_turn

    if not raw and has_chat_template(tokenizer):
        return encode_chats(tokenizer, [user_turn(text, system)])
    if system is not None:
        raise ValueError("this model has no chat template, so --system has no place: write it into the prompt")
    return encode_texts(tokenizer, [text])


def _stats_document(stats: DecodingStats | None) -> dict[str, Any]:
    assert stats is not None
    counts = {field.name: getattr(stats, field.name) for field in fields(stats)}
    return counts | {
        name: getattr(stats, name) for name in ("tokens_per_round", "acceptance_rate", "tokens_per_second")
    }
