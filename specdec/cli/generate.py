"""`specdec generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from specdec.cli.common import ModelOption, err_console, friendly_errors, heeds_sigterm, starting
from specdec.cli.grafting import grafted
from specdec.cli.options import (
    GREEDY,
    LOADING,
    DrafterOption,
    DraftOption,
    ExactOption,
    LoadingOptions,
    MaxNewTokensOption,
    SamplingOptions,
    StopOption,
    VerifyOption,
)
from specdec.cli.status import await_output, make_way
from specdec.specs import DRAFT_HEAD, SEQUOIA, SMALL_MODEL, TREE_EXAMPLES, choose_drafter, choose_tree

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from specdec import DecodingStats
    from specdec.cli.chat.reply import Piece
    from specdec.models import LoadedModel

_EXAMPLES = ", ".join(examples for name, examples in TREE_EXAMPLES.items() if name != SEQUOIA)
_TreeOption = Annotated[
    str | None,
    typer.Option(
        "--tree",
        metavar="SPEC",
        help=f"How drafts grow: {_EXAMPLES} (see `specdec bench`). With a --draft and no --drafter, {SMALL_MODEL} "
        f"(or {DRAFT_HEAD}) grows it.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(generate)


@friendly_errors
@heeds_sigterm
@grafted
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Read from stdin if absent.", show_default=False)] = None,
    model: ModelOption = "demo",
    draft: DraftOption = None,
    drafter: DrafterOption = None,
    tree: _TreeOption = None,
    verify: VerifyOption = "topdown",
    exact: ExactOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    sampling: SamplingOptions = GREEDY,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    stop: StopOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: text, tokens and statistics.")
    ] = False,
    loading: LoadingOptions = LOADING,
) -> None:
    """Answer one prompt: the text streams to stdout, the statistics go to stderr."""
    if verify != "topdown" and not sampling.sample:
        raise ValueError(f"--verify {verify} needs --sample: greedy output is verified in one way only")
    drafter_spec = choose_drafter(drafter, draft, tree, model=model)
    tree_spec = choose_tree(tree, drafter_spec)
    speculation = {"tree": None if tree_spec is None else tree_spec.build(), "verify": verify, "exact": exact}
    if raw and system is not None:
        raise ValueError("--system is part of the chat template, which --raw leaves out: give only one of them")
    text = _read_prompt(prompt)

    with starting():
        from specdec import generation  # noqa: F401
        from specdec.models.pair import load_pair

    pair = load_pair(model, draft, loading, translates=drafter_spec.translates)
    inputs = _encode(pair.target.tokenizer, text, system=system, raw=raw).to(pair.target.model.device)
    stopping = {"stop_strings": stop, "tokenizer": pair.target.tokenizer} if stop else {}
    sampling.seed_torch()
    _answer(
        pair.target,
        inputs,
        as_json=as_json,
        max_new_tokens=max_new_tokens,
        drafter=pair.build(drafter_spec),
        **sampling.generation_kwargs,
        **stopping,
        **speculation,
    )


def _answer(target: LoadedModel, inputs: BatchEncoding, *, as_json: bool, **options: Any) -> None:
    """Print what `specdec.generate` says: as it comes, or in the end as a document."""
    import specdec
    from specdec.cli.chat.streamer import ReplyStreamer

    streamer = None if as_json else ReplyStreamer(target.tokenizer, _write)
    await_output("generating" if as_json else "reading the prompt")
    out = specdec.generate(target.model, **inputs, **options, streamer=streamer, return_dict_in_generate=True)
    assert isinstance(out, specdec.SpeculativeOutput)
    make_way()
    if as_json:
        new_ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        answer = target.tokenizer.decode(new_ids, skip_special_tokens=True)
        print(json.dumps({"text": answer, "tokens": new_ids, "stats": _stats_document(out.stats)}, indent=2))
    else:
        print(flush=True)
        err_console.print(Text(str(out.stats), style="dim"), soft_wrap=True)


def _write(pieces: Sequence[Piece]) -> None:
    make_way()
    print("".join(piece.text for piece in pieces), end="", flush=True)


def _read_prompt(prompt: str | None) -> str:
    text = _read_stdin() if prompt is None else prompt
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise ValueError("there is no prompt: give one as an argument, or pipe one in")
    return sys.stdin.read().removesuffix("\n")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, system: str | None, raw: bool) -> BatchEncoding:
    from specdec.text.prompting import encode_chats, encode_texts, has_chat_template, user_turn

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
