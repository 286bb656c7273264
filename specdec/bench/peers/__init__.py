"""Who else decodes the same prompts: transformers' own modes and llama.cpp, by name.

`transformers` and `llama.cpp` stand for what each can do with the models at hand; a single mode with its parameters is
`transformers/early-exit:exit_layer=8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.specs import NUMBER, WHOLE, Value, check_known, parse_parameter

TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
ASSISTANT = "assistant"
EARLY_EXIT = "early-exit"
DRAFT = "draft"
PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    """What a peer can do. `is_usual`: meant by the peer's bare name, if there is the draft that it needs."""

    parameters: Mapping[str, Value] = field(default_factory=dict)
    needs_draft: bool = False
    is_usual: bool = False


_NUM_TOKENS = {"num_tokens": WHOLE}
_LLAMA_NGRAM = {"size_n": WHOLE, "size_m": WHOLE, "min_hits": WHOLE}

_MODES: dict[str, dict[str, _Mode]] = {
    TRANSFORMERS: {
        PLAIN: _Mode(is_usual=True),
        "prompt-lookup": _Mode(parameters=_NUM_TOKENS, is_usual=True),
        ASSISTANT: _Mode(parameters=_NUM_TOKENS, needs_draft=True, is_usual=True),
        EARLY_EXIT: _Mode(parameters={"exit_layer": WHOLE, **_NUM_TOKENS}),
    },
    LLAMA_CPP: {
        PLAIN: _Mode(is_usual=True),
        "ngram-simple": _Mode(parameters=_LLAMA_NGRAM, is_usual=True),
        DRAFT: _Mode(parameters={"n_max": WHOLE, "n_min": WHOLE, "p_min": NUMBER}, needs_draft=True, is_usual=True),
        "ngram-mod": _Mode(parameters={"n_match": WHOLE, "n_min": WHOLE, "n_max": WHOLE}),
        "ngram-map-k": _Mode(parameters=_LLAMA_NGRAM),
        "ngram-map-k4v": _Mode(parameters=_LLAMA_NGRAM),
        "ngram-cache": _Mode(),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """A peer's mode asked for by name and not built yet, so that a typo is found before a model is loaded."""

    family: str
    mode: str
    parameters: dict[str, Any]
    text: str
    """As asked for; the mode `plain` of transformers is the reference, which has the family's bare name."""

    @classmethod
    def parse(cls, text: str) -> PeerSpec:
        """`FAMILY/MODE` or `FAMILY/MODE:parameter=value:...`; raises `ValueError` that lists what is allowed."""
        name, *assignments = text.split(":")
        family, _, mode = name.partition("/")
        check_known("peer", family, tuple(_MODES))
        mode = mode or PLAIN
        check_known(f"mode of {family}", mode, tuple(_MODES[family]))
        parameters = dict(parse_parameter(name, one, _MODES[family][mode].parameters) for one in assignments)
        if mode == EARLY_EXIT and "exit_layer" not in parameters:
            raise ValueError(f"{name} needs the layer at which it exits: {name}:exit_layer=8")
        is_reference = (family, mode) == (TRANSFORMERS, PLAIN)
        return cls(family=family, mode=mode, parameters=parameters, text=TRANSFORMERS if is_reference else text)

    @property
    def needs_draft(self) -> bool:
        return _MODES[self.family][self.mode].needs_draft


def choose_peers(names: str | None, *, draft: str | None, draft_gguf: Path | None = None) -> dict[str, PeerSpec]:
    """What --peers means, by name of the row. A family's plain decoding always runs, and first.

    Raises:
        ValueError: an unknown name, or a mode that needs a draft where there is none.
    """
    specs: list[PeerSpec] = []
    for name in [] if names is None else [name.strip() for name in names.split(",")]:
        has_draft = draft is not None or (name == LLAMA_CPP and draft_gguf is not None)
        family = PeerSpec.parse(name).family
        specs.append(PeerSpec.parse(f"{family}/{PLAIN}"))
        specs += _usual(family, has_draft=has_draft) if name == family else [PeerSpec.parse(name)]
    for spec in specs:
        if spec.needs_draft and draft is None and (spec.family != LLAMA_CPP or draft_gguf is None):
            raise ValueError(f"{spec.text} drafts with a smaller model: give it with --draft")
    return {spec.text: spec for spec in specs}


def _usual(family: str, *, has_draft: bool) -> list[PeerSpec]:
    modes = {name: mode for name, mode in _MODES[family].items() if mode.is_usual}
    return [PeerSpec.parse(f"{family}/{name}") for name, mode in modes.items() if has_draft or not mode.needs_draft]
