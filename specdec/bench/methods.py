"""What `specdec bench` compares: a row of its table for each drafter and tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specdec.specs import (
    AUTO,
    DRAFTERS,
    PLAIN,
    PROMPT_LOOKUP,
    TRANSFORMERS,
    DrafterSpec,
    TreeSpec,
    check_draft,
    check_known,
    drafter_of,
    takers,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A row of the bench: a drafter (None: the model's own `generate()`) and its tree (None: the drafter's own)."""

    drafter: DrafterSpec | None
    tree: TreeSpec | None = None


def choose_methods(
    names: str | None,
    *,
    reference: str,
    draft: str | None,
    model: str = "",
    trees: Sequence[str] = (),
    peers_use_draft: bool = False,
) -> dict[str, MethodSpec]:
    """The rows, in the order in which they run.

    The reference and plain always run. Without names, every usual drafter that there are models for. A drafter that
    takes some of the trees runs once with each of these, another one runs as it is.
    """
    asked = _default_methods(draft, model) if names is None else [name.strip() for name in names.split(",")]
    drafters: dict[str, DrafterSpec | None] = {}
    for name in (reference, PLAIN, *asked):
        check_known("method", name.partition(":")[0], (TRANSFORMERS, *DRAFTERS))
        drafters[name] = None if name == TRANSFORMERS else DrafterSpec.parse(name)
    specs = [drafter for drafter in drafters.values() if drafter is not None]
    check_draft(specs, None if peers_use_draft and not any(spec.needs_draft for spec in specs) else draft)
    return _with_trees(drafters, [TreeSpec.parse(tree) for tree in dict.fromkeys(trees)])


def _with_trees(drafters: Mapping[str, DrafterSpec | None], trees: Sequence[TreeSpec]) -> dict[str, MethodSpec]:
    methods: dict[str, MethodSpec] = {}
    for name, drafter in drafters.items():
        taken = [tree for tree in trees if drafter is not None and drafter.takes(tree)]
        methods |= {f"{name} {tree.text}": MethodSpec(drafter=drafter, tree=tree) for tree in taken}
        if not taken:
            methods[name] = MethodSpec(drafter=drafter)
    for tree in trees:
        if not any(method.tree == tree for method in methods.values()):
            raise ValueError(f"no method takes the tree {tree.text}: ask for {takers(tree)} too")
    return methods


def _default_methods(draft: str | None, model: str) -> list[str]:
    return [PROMPT_LOOKUP, AUTO] if draft is None else [PROMPT_LOOKUP, drafter_of(draft, model), AUTO]
