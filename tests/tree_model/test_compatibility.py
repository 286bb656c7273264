"""docs/compatibility.md says what the families' tests know.

`python -m tests.tree_model.test_compatibility` writes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import PreTrainedModel

from specdec.errors import SpecdecError
from specdec.kernels import quantized_copy
from specdec.testing import FAMILIES, tiny_model
from specdec.tree_model.compatibility import check_layers, check_model
from specdec.tree_model.layer_kinds import layer_kinds
from tests.support.families import REFUSED, UNLISTED
from tests.support.images import SETTINGS as SEEING
from tests.support.recurrent_models import RECURRENT
from tests.support.wrapped import EXACT, WRAPPED, Wrapped

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"

_HEAD = """\
# Compatibility

Written by `python -m tests.tree_model.test_compatibility`, from what the tests of the families find out on tiny
models; a test compares.

## Families whose output is tested

Greedy equality with `model.generate()` for every drafter of `tests/generation/test_families.py`, alone and in a ragged
batch.

| `model_type` | attention | sdpa | eager | `EarlyExit` | `QuantizedSelf`, int8 |
|---|---|---|---|---|---|
"""
_UNLISTED = """
## Other families

A family that is not listed is tried once, by `enable()` or at the first call: it decodes a short text by trees and as
`model.generate()` does, in a ragged batch that reaches past its windows, chunks and top-k of up to 256 tokens, and the
logits must agree. Tested to pass:
{passing}.

Models that also read images (Gemma 3, Qwen 2.5 VL, SmolVLM, ...) take them as `model.generate()` does: it encodes the
images and reads the prompt, and what follows is decoded by tree. Tested with pixels, in batches of different pictures:
{seeing}. A router and an engine (`specdec serve`) take text alone.
Models that share keys and values between layers, that select what they attend to by an indexer (DeepSeek-V3.2, GLM-5)
or that attend in chunks (Llama 4, up to about 8,000 tokens) are decoded by tree like any other.

Models whose layers keep states (Mamba, gated delta nets, KDA, short convolutions, and hybrids of these with attention)
are stepped token by token, along chains and trees, by their own code for decoding. Tested:
{recurrent}.
They take every drafter but early exits and models with another tokenizer, and no router. An engine reads each of their
prompts from its beginning, and so does a chat: of a text that begins alike there is no state to go on from.

## Refused

| `model_type` | what the message says |
|---|---|
"""


_WRAPPED = """
## What is wrapped around a model

Of a Llama, tried by `tests/generation/test_wrapped.py`: greedy equality, or the words of the refusal. A copy is made
again when adapters have been put in, switched or merged between two calls.

| wrapped | `specdec.generate` | with an int8 copy (`QuantizedSelf`) |
|---|---|---|
"""
_UNTRIED = """
Not tried here, because they do not run on this project's machines: bitsandbytes, GPTQ, AWQ. Any model with packed
weights decodes the short text above first, whatever its family, and is refused if the logits do not agree.
"""


def _of_copy(wrapped: Wrapped) -> str:
    return wrapped.copy_says if wrapped.says == EXACT else ""


def _row(family: str) -> str:
    model = tiny_model(family, attn_implementation="eager")
    check_model(model)
    attention = {True: "full", False: "sliding window"}
    kinds = " and ".join(sorted({attention[kind.reach is None] for kind in layer_kinds(model.config)}))
    has_sdpa = "yes" if model._supports_sdpa else "no"
    cells = [f"`{family}`", kinds, has_sdpa, "yes", _works(check_layers, model), _works(quantized_copy, model)]
    return f"| {' | '.join(cells)} |\n"


def _works(check: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> str:
    try:
        check(model)
    except SpecdecError:
        return "no"
    return "yes"


def _refusal(family: str) -> str:
    settings, _ = REFUSED[family]
    try:
        check_model(tiny_model(family, **settings))
    except SpecdecError as error:
        return f"| `{family}` | {error} |\n"
    raise AssertionError(f"{family} is not refused")


def _names(families: Iterable[str]) -> str:
    return ", ".join(f"`{family}`" for family in families)


def page() -> str:
    return (
        _HEAD
        + "".join(map(_row, FAMILIES))
        + _UNLISTED.format(passing=_names(UNLISTED), seeing=_names(SEEING), recurrent=_names(RECURRENT))
        + "".join(map(_refusal, REFUSED))
        + "\nAlso refused: flash and flex attention (load with `attn_implementation='sdpa'`), encoder-decoders.\n"
        + _WRAPPED
        + "".join(f"| {name} | {each.says} | {_of_copy(each)} |\n" for name, each in WRAPPED.items())
        + _UNTRIED
    )


def test_the_page_says_what_the_tests_know() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
