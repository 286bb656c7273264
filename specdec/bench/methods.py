"""Names for drafters, as typed on a command line: `prompt-lookup`, `small-model:num_tokens=8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.drafters import Drafter

TRANSFORMERS = "transformers"
"""The bench's name for the model's own `generate()`: the one method that is not a drafter."""
PLAIN = "plain"
AUTO = "auto"
PROMPT_LOOKUP = "prompt-lookup"
SMALL_MODEL = "small-model"
QUANTIZED_SELF = "quantized-self"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    class_name: str | None
    """In `specdec.drafters`; None: `specdec.generate` knows the name itself."""
    parameters: tuple[str, ...] = ()
    needs_draft: bool = False


_KINDS = {
    AUTO: _Kind(class_name=None),
    PLAIN: _Kind(class_name="Plain"),
    PROMPT_LOOKUP: _Kind(class_name="PromptLookup", parameters=("num_tokens", "min_match")),
    SMALL_MODEL: _Kind(class_name="SmallModel", parameters=("num_tokens",), needs_draft=True),
    QUANTIZED_SELF: _Kind(class_name="QuantizedSelf", parameters=("num_tokens",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """A drafter asked for by name and not built yet, so that a typo is found before a model is loaded."""

    text: str
    kind: str
    parameters: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """`NAME` or `NAME:parameter=value:...`; raises `ValueError` that lists what is allowed."""
        kind, *assignments = text.split(":")
        _check_known(kind, tuple(_KINDS))
        allowed = _KINDS[kind].parameters
        parameters = dict(_parse_parameter(kind, assignment, allowed) for assignment in assignments)
        return cls(text=text, kind=kind, parameters=parameters)

    @property
    def needs_draft(self) -> bool:
        return _KINDS[self.kind].needs_draft

    def build(self, draft: PreTrainedModel | None = None) -> Drafter | str:
        """What `specdec.generate` takes as `drafter`."""
        from specdec import drafters

        class_name = _KINDS[self.kind].class_name
        if class_name is None:
            return self.kind
        models = [draft] if self.needs_draft else []
        return getattr(drafters, class_name)(*models, **self.parameters)


def check_draft(specs: list[DrafterSpec], draft: str | None) -> None:
    """Raise `ValueError` if a drafter lacks its draft model, or if no drafter uses the one that was given."""
    needing = [spec.text for spec in specs if spec.needs_draft]
    if needing and draft is None:
        raise ValueError(f"{needing[0]} drafts with a smaller model: give it with --draft")
    if draft is not None and not needing:
        raise ValueError("--draft is for small-model, which was not asked for: add it, or leave --draft out")


def choose_drafter(name: str | None, draft: str | None) -> DrafterSpec:
    """What --drafter and --draft mean together."""
    spec = DrafterSpec.parse(name or (SMALL_MODEL if draft is not None else AUTO))
    check_draft([spec], draft)
    return spec


def choose_methods(names: str | None, *, reference: str, draft: str | None) -> dict[str, DrafterSpec | None]:
    """What `specdec bench` compares, in the order in which it runs; None is the model's own `generate()`.

    The reference and plain always run. Without names, every kind of drafter that there are models for.
    """
    asked = _default_methods(draft) if names is None else [name.strip() for name in names.split(",")]
    specs: dict[str, DrafterSpec | None] = {}
    for name in (reference, PLAIN, *asked):
        _check_known(name.partition(":")[0], (TRANSFORMERS, *_KINDS))
        specs[name] = None if name == TRANSFORMERS else DrafterSpec.parse(name)
    check_draft([spec for spec in specs.values() if spec is not None], draft)
    return specs


def _default_methods(draft: str | None) -> list[str]:
    return [PROMPT_LOOKUP] if draft is None else [PROMPT_LOOKUP, SMALL_MODEL]


def _check_known(name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise ValueError(f"unknown method {name!r}; choose from: {', '.join(allowed)}")


def _parse_parameter(kind: str, assignment: str, allowed: tuple[str, ...]) -> tuple[str, int]:
    name, _, value = assignment.partition("=")
    if name not in allowed:
        raise ValueError(f"{kind} has no parameter {name!r}; it takes: {', '.join(allowed) or 'none'}")
    try:
        return name, int(value)
    except ValueError:
        raise ValueError(f"{kind}: {name} must be a whole number, got {value!r}") from None
