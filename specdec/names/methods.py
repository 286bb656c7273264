"""Names for drafters and trees, as typed on a command line: `small-model:num_tokens=8`, `dyspec:32`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.names.parameters import FLAG, SHARE, TEXT, WHOLE, Value, check_known, parse_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.drafters import Drafter
    from trees import GrowthPolicy

TRANSFORMERS = "transformers"
"""The bench's name for the model's own `generate()`: the one method that is not a drafter."""
PLAIN = "plain"
AUTO = "auto"
PROMPT_LOOKUP = "prompt-lookup"
SMALL_MODEL = "small-model"
QUANTIZED_SELF = "quantized-self"
EARLY_EXIT = "early-exit"
MIXED = "mixed"
CASCADE = "cascade"
SEQUOIA = "sequoia"


def _read_widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split("x"))


_EXIT = Value("a number of layers or adaptive", lambda text: text if text == "adaptive" else int(text))
_EXITS = Value("a file, shipped or none", lambda text: None if text == "none" else text)
_WIDTHS = Value("whole numbers joined by x (4x2x1)", _read_widths)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TreeKind:
    class_name: str
    """In `trees`."""
    parameters: Mapping[str, Value]
    """The value of the first one may stand without its name."""
    is_complete: bool = True
    """Whether every parameter has a default value."""


_TREE_KINDS = {
    "chain": _TreeKind(class_name="Chain", parameters={"length": WHOLE}),
    "fixed": _TreeKind(class_name="Fixed", parameters={"branching": _WIDTHS}, is_complete=False),
    SEQUOIA: _TreeKind(class_name="Sequoia", parameters={"budget": WHOLE}, is_complete=False),
    "dyspec": _TreeKind(class_name="DySpec", parameters={"budget": WHOLE, "max_depth": WHOLE, "shared": FLAG}),
    "dyspec-threshold": _TreeKind(
        class_name="DySpecThreshold", parameters={"max_nodes": WHOLE, "threshold": SHARE, "max_depth": WHOLE}
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    class_name: str | None
    """In `specdec.drafters`; None: `specdec.generate` knows the name itself."""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    needs_draft: bool = False
    may_use_draft: bool = False
    """Whether it drafts with a draft model if there is one."""
    trees: tuple[str, ...] = ()
    """The trees that it takes."""
    sources: tuple[str, ...] = ()
    """The drafters that it is made of, if it is."""
    before: str | None = None
    """The drafter that goes before its model, if one does."""


_KINDS = {
    AUTO: _Kind(class_name=None, may_use_draft=True),
    PLAIN: _Kind(class_name="Plain"),
    PROMPT_LOOKUP: _Kind(
        class_name="PromptLookup",
        parameters={"num_tokens": WHOLE, "min_match": WHOLE, "tokens_per_match": WHOLE},
        trees=("chain", "dyspec"),
    ),
    SMALL_MODEL: _Kind(
        class_name="SmallModel", parameters={"num_tokens": WHOLE}, needs_draft=True, trees=tuple(_TREE_KINDS)
    ),
    QUANTIZED_SELF: _Kind(class_name="QuantizedSelf", parameters={"num_tokens": WHOLE}, trees=tuple(_TREE_KINDS)),
    EARLY_EXIT: _Kind(
        class_name="EarlyExit",
        parameters={
            "exit_layer": _EXIT,
            "exits": _EXITS,
            "num_tokens": WHOLE,
            "objective": TEXT,
            "shadow_share": SHARE,
        },
        trees=tuple(_TREE_KINDS),
    ),
    MIXED: _Kind(
        class_name="Mixed",
        parameters={"budget": WHOLE},
        needs_draft=True,
        trees=("chain", "dyspec"),
        sources=(PROMPT_LOOKUP, SMALL_MODEL),
    ),
    CASCADE: _Kind(
        class_name="Cascade",
        parameters={"num_tokens": WHOLE, "min_tokens": WHOLE},
        trees=("chain",),
        before=PROMPT_LOOKUP,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """A drafter asked for by name and not built yet, so that a typo is found before a model is loaded."""

    text: str
    kind: str
    parameters: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """`NAME` or `NAME:parameter=value:...`; raises `ValueError` that lists what is allowed."""
        kind, *assignments = text.split(":")
        check_known("method", kind, tuple(_KINDS))
        allowed = _KINDS[kind].parameters
        parameters = dict(parse_parameter(kind, assignment, allowed) for assignment in assignments)
        return cls(text=text, kind=kind, parameters=parameters)

    @property
    def may_use_draft(self) -> bool:
        return self.needs_draft or _KINDS[self.kind].may_use_draft

    @property
    def needs_draft(self) -> bool:
        return _KINDS[self.kind].needs_draft

    def takes(self, tree: TreeSpec) -> bool:
        return tree.kind in _KINDS[self.kind].trees

    def build(self, draft: PreTrainedModel | None = None) -> Drafter | str:
        """What `specdec.generate` takes as `drafter`."""
        from specdec import drafters

        kind = _KINDS[self.kind]
        if kind.class_name is None:
            return self.kind if draft is None else drafters.Auto(drafters.SmallModel(draft))
        made_of: list[Any] = [draft] if kind.needs_draft else []
        if kind.sources:
            made_of = [[DrafterSpec.parse(source).build(draft) for source in kind.sources]]
        if kind.before:
            made_of.insert(0, DrafterSpec.parse(kind.before).build())
        return getattr(drafters, kind.class_name)(*made_of, **self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSpec:
    """A growth policy asked for by name."""

    text: str
    kind: str
    parameters: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> TreeSpec:
        """`NAME`, `NAME:value` or `NAME:parameter=value,...`; raises `ValueError` that lists what is allowed."""
        kind, _, rest = text.partition(":")
        check_known("tree", kind, tuple(_TREE_KINDS))
        allowed = _TREE_KINDS[kind].parameters
        first, *others = rest.split(",")
        assignments = [first if "=" in first else f"{next(iter(allowed))}={first}", *others] if rest else []
        parameters = dict(parse_parameter(kind, assignment, allowed) for assignment in assignments)
        if not _TREE_KINDS[kind].is_complete and not parameters:
            name, value = next(iter(allowed.items()))
            raise ValueError(f"{kind} needs its {name}, {value.meaning}: {kind}:{name}=...")
        return cls(text=text, kind=kind, parameters=parameters)

    def build(self, **measured: Any) -> GrowthPolicy:
        """What `specdec.generate` takes as `tree`.

        Args:
            measured: arguments of the policy that nobody types: the `acceptance` of a Sequoia tree.
        """
        import trees

        return getattr(trees, _TREE_KINDS[self.kind].class_name)(**self.parameters, **measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A row of the bench: a drafter (None: the model's own `generate()`) and its tree (None: the drafter's own)."""

    drafter: DrafterSpec | None
    tree: TreeSpec | None = None


def check_draft(specs: list[DrafterSpec], draft: str | None) -> None:
    """Raise `ValueError` if a drafter lacks its draft model, or if no drafter uses the one that was given."""
    needing = [spec.text for spec in specs if spec.needs_draft]
    if needing and draft is None:
        raise ValueError(f"{needing[0]} drafts with a smaller model: give it with --draft")
    if draft is not None and not any(spec.may_use_draft for spec in specs):
        users = ", ".join(name for name, kind in _KINDS.items() if kind.needs_draft or kind.may_use_draft)
        raise ValueError(f"--draft is for {users}, of which none was asked for: add one, or leave --draft out")


def choose_drafter(name: str | None, draft: str | None, tree: str | None = None) -> DrafterSpec:
    """What --drafter, --draft and --tree mean together: a tree is grown by a drafter that takes one."""
    spec = DrafterSpec.parse(name or (AUTO if draft is None or tree is None else SMALL_MODEL))
    check_draft([spec], draft)
    return spec


def choose_tree(text: str | None, drafter: DrafterSpec) -> TreeSpec | None:
    """What --tree means where nothing is measured beforehand."""
    if text is None:
        return None
    tree = TreeSpec.parse(text)
    if tree.kind == SEQUOIA:
        raise ValueError(f"{text} needs an acceptance that is measured on many prompts: `specdec bench --tree {text}`")
    if not drafter.takes(tree):
        raise ValueError(f"{drafter.kind} does not take the tree {text}: use {_takers(tree)}")
    return tree


def choose_methods(
    names: str | None,
    *,
    reference: str,
    draft: str | None,
    trees: Sequence[str] = (),
    peers_use_draft: bool = False,
) -> dict[str, MethodSpec]:
    """What `specdec bench` compares, in the order in which it runs.

    The reference and plain always run. Without names, every kind of drafter that there are models for. A drafter that
    takes some of the trees runs once with each of these, another one runs as it is.
    """
    asked = _default_methods(draft) if names is None else [name.strip() for name in names.split(",")]
    drafters: dict[str, DrafterSpec | None] = {}
    for name in (reference, PLAIN, *asked):
        check_known("method", name.partition(":")[0], (TRANSFORMERS, *_KINDS))
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
            raise ValueError(f"no method takes the tree {tree.text}: ask for {_takers(tree)} too")
    return methods


def _takers(tree: TreeSpec) -> str:
    return " or ".join(name for name, kind in _KINDS.items() if tree.kind in kind.trees)


def _default_methods(draft: str | None) -> list[str]:
    return [PROMPT_LOOKUP, AUTO] if draft is None else [PROMPT_LOOKUP, SMALL_MODEL, AUTO]
