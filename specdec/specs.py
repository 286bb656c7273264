"""Drafters and trees by name, as typed on a command line: `small-model:num_tokens=8`, `dyspec:32`.

One table of each says what can be named. The parameters of a name are those of the constructor whose annotations can be
read from a text; what is offered in help texts is made of the tables too.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.drafters import Drafter
    from trees import GrowthPolicy

    Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]

TRANSFORMERS = "transformers"
"""The bench's name for the model's own `generate()`: the one method that is not a drafter."""
PLAIN = "plain"
AUTO = "auto"
PROMPT_LOOKUP = "prompt-lookup"
SMALL_MODEL = "small-model"
QUANTIZED_SELF = "quantized-self"
SPARSE_SELF = "sparse-self"
FOREIGN_MODEL = "foreign-model"
DRAFT_HEAD = "draft-head"
CHAIN = "chain"
SEQUOIA = "sequoia"
DYSPEC = "dyspec"


# Values, by annotation


class Value(NamedTuple):
    """What a parameter takes, in words and as the function that reads it."""

    meaning: str
    read: Callable[[str], Any]


WHOLE = Value("a whole number", int)
NUMBER = Value("a number", float)
TEXT = Value("a text", str)
FLAG = Value("true or false", {"true": True, "false": False}.__getitem__)
_UNIONS = (Union, types.UnionType)
_NONE = Value("none", {"none": None}.__getitem__)
_WIDTHS = Value("whole numbers joined by x (4x2x1)", lambda text: tuple(map(int, text.split("x"))))
_VALUES: dict[Any, Value] = {
    int: WHOLE,
    float: NUMBER,
    str: TEXT,
    bool: FLAG,
    types.NoneType: _NONE,
    tuple[int, ...]: _WIDTHS,
}


def value_of(annotation: Any) -> Value | None:
    """How a parameter of that annotation is read; None if a text cannot say it."""
    if get_origin(annotation) is Literal:
        words = {word: word for word in get_args(annotation)}
        return Value(" or ".join(words), words.__getitem__)
    if get_origin(annotation) not in _UNIONS:
        return _VALUES.get(annotation)
    known = [value for value in map(value_of, get_args(annotation)) if value is not None]
    if known in ([], [_NONE]):
        return None
    known.sort(key=lambda value: value is TEXT)  # any text is a text
    return Value(" or ".join(value.meaning for value in known), lambda text: _read_any(known, text))


def _read_any(values: Iterable[Value], text: str) -> Any:
    for value in values:
        try:
            return value.read(text)
        except (ValueError, KeyError):
            continue
    raise ValueError(text)


def check_known(what: str, name: str, allowed: Sequence[str]) -> None:
    """Raise `ValueError` that lists what is allowed."""
    if name not in allowed:
        raise ValueError(f"unknown {what} {name!r}; choose from: {', '.join(allowed)}")


def parse_parameter(kind: str, assignment: str, allowed: Mapping[str, Value]) -> tuple[str, Any]:
    """`NAME=VALUE`; raises `ValueError` that says what `kind` takes."""
    name, _, text = assignment.partition("=")
    if name not in allowed:
        raise ValueError(f"{kind} has no parameter {name!r}; it takes: {', '.join(allowed) or 'none'}")
    try:
        return name, allowed[name].read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{kind}: {name} must be {allowed[name].meaning}, got {text!r}") from None


# The tables


def parse_parameters(name: str, constructor: Callable[..., Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Arguments of a constructor; raises `ValueError` that says what is allowed, or what is missing."""
    signature = inspect.signature(constructor, eval_str=True).parameters
    typed = (one for one, parameter in signature.items() if not _is_given(parameter))
    values = {one: value for one in typed if (value := value_of(signature[one].annotation)) is not None}
    given = dict(parse_parameter(name, assignment, values) for assignment in assignments)
    for one, value in values.items():
        if one not in given and signature[one].default is inspect.Parameter.empty:
            raise ValueError(f"{name} needs its {one}, {value.meaning}: {name}:{one}=...")
    return given


def _is_given(parameter: inspect.Parameter) -> bool:
    """Whether it is what a constructor is made of (`_Drafter.made_of`): it has no default, and may be no text."""
    if parameter.default is not inspect.Parameter.empty or get_origin(parameter.annotation) not in _UNIONS:
        return False
    return any(value_of(kind) is None for kind in get_args(parameter.annotation))


class _Tree(NamedTuple):
    class_name: str
    unnamed: str
    """The parameter whose value may stand without its name."""
    examples: str

    @property
    def constructor(self) -> Any:
        return getattr(import_module("trees"), self.class_name)


_TREES = {
    CHAIN: _Tree("Chain", "length", "chain:5"),
    "fixed": _Tree("Fixed", "branching", "fixed:4x2x1"),
    SEQUOIA: _Tree("Sequoia", "budget", "sequoia:32"),
    DYSPEC: _Tree("DySpec", "budget", "dyspec:32, dyspec:budget=32,max_depth=8,shared=true"),
    "dyspec-threshold": _Tree("DySpecThreshold", "max_nodes", "dyspec-threshold:32"),
}


class _Drafter(NamedTuple):
    class_name: str
    trees: Sequence[str] = ()
    """Those that it takes."""
    uses_draft: Literal["never", "maybe", "always"] = "never"
    """Whether it drafts with a draft model; "maybe": if there is one."""
    made_of: Callable[[Any, Any], Sequence[Any]] = lambda draft, tokenizers: ()
    """What the constructor takes first, from the draft model and the tokenizers of both."""
    is_joined: bool = True
    """Whether rows can join a batch that it drafts for, as an engine's do."""

    @property
    def constructor(self) -> Any:
        return getattr(import_module("specdec.drafters"), self.class_name)


_ALL = tuple(_TREES)
_DRAFTERS = {
    AUTO: _Drafter("Auto", uses_draft="maybe", made_of=lambda draft, _: [_built(_drafting(draft), draft)]),
    PLAIN: _Drafter("Plain"),
    PROMPT_LOOKUP: _Drafter("PromptLookup", trees=(CHAIN, DYSPEC)),
    SMALL_MODEL: _Drafter("SmallModel", trees=_ALL, uses_draft="always", made_of=lambda draft, _: [draft]),
    DRAFT_HEAD: _Drafter("DraftHead", trees=_ALL, uses_draft="always", made_of=lambda draft, _: [draft]),
    QUANTIZED_SELF: _Drafter("QuantizedSelf", trees=_ALL),
    SPARSE_SELF: _Drafter("SparseSelf", trees=_ALL),
    "early-exit": _Drafter("EarlyExit", trees=_ALL, is_joined=False),
    FOREIGN_MODEL: _Drafter(
        "ForeignModel",
        trees=_ALL,
        uses_draft="always",
        made_of=lambda draft, tokenizers: [draft, *(tokenizers or (None, None))],
        is_joined=False,
    ),
    "mixed": _Drafter(
        "Mixed",
        trees=(CHAIN, DYSPEC),
        uses_draft="always",
        made_of=lambda draft, _: [[_built(PROMPT_LOOKUP), _built(_drafting(draft), draft)]],
        is_joined=False,
    ),
    "cascade": _Drafter("Cascade", trees=(CHAIN,), made_of=lambda *_: [_built(PROMPT_LOOKUP)]),
}


# What help texts offer

DRAFTERS = tuple(_DRAFTERS)
DRAFTERS_OF_A_MODEL = tuple(name for name, drafter in _DRAFTERS.items() if drafter.uses_draft == "always")
DRAFTERS_OF_AN_ENGINE = tuple(name for name, drafter in _DRAFTERS.items() if drafter.is_joined)
TREE_EXAMPLES = {name: tree.examples for name, tree in _TREES.items()}
TREES_OF_DRAFTERS = {name: drafter.trees for name, drafter in _DRAFTERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What was asked for by name and is not built yet, so that a typo is found before a model is loaded."""

    text: str
    kind: str
    parameters: dict[str, Any]


class DrafterSpec(Spec):
    """A drafter asked for by name."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """`NAME` or `NAME:parameter=value:...`; raises `ValueError` that lists what is allowed."""
        kind, *assignments = text.split(":")
        check_known("method", kind, DRAFTERS)
        # a bare name is known without torch
        parameters = parse_parameters(kind, _DRAFTERS[kind].constructor, assignments) if assignments else {}
        return cls(text=text, kind=kind, parameters=parameters)

    @property
    def may_use_draft(self) -> bool:
        return _DRAFTERS[self.kind].uses_draft != "never"

    @property
    def needs_draft(self) -> bool:
        return self.kind in DRAFTERS_OF_A_MODEL

    @property
    def translates(self) -> bool:
        """Whether its draft model may have another tokenizer than the target."""
        return self.kind == FOREIGN_MODEL

    def takes(self, tree: TreeSpec) -> bool:
        return tree.kind in TREES_OF_DRAFTERS[self.kind]

    def build(self, draft: PreTrainedModel | None = None, *, tokenizers: Tokenizers | None = None) -> Drafter | str:
        """What `specdec.generate` takes as `drafter`.

        Args:
            draft: a draft model, or a draft head.
            tokenizers: the draft's and the target's, for `foreign-model`.

        Raises:
            ValueError: it needs a draft model and is given a head, or the other way round.
        """
        if self.kind == AUTO and draft is None:
            return AUTO
        if self.kind in (SMALL_MODEL, FOREIGN_MODEL, DRAFT_HEAD):
            _check_kind(self.kind, draft)
        drafter = _DRAFTERS[self.kind]
        built: Drafter = drafter.constructor(*drafter.made_of(draft, tokenizers), **self.parameters)
        return built


def _drafting(draft: PreTrainedModel | None) -> str:
    """The drafter that drafts with this."""
    head: type = import_module("specdec.drafters.head.network").HeadNetwork
    return DRAFT_HEAD if isinstance(draft, head) else SMALL_MODEL


def _check_kind(kind: str, draft: PreTrainedModel | None) -> None:
    is_head = _drafting(draft) == DRAFT_HEAD
    if is_head != (kind == DRAFT_HEAD):
        given, fitting = ("a draft head", DRAFT_HEAD) if is_head else ("a model and no draft head", SMALL_MODEL)
        raise ValueError(f"{kind} cannot draft with what --draft names, which is {given}: use {fitting} or {AUTO}")


def drafter_of(draft: str, model: str) -> str:
    """The drafter that drafts for a model with what --draft names: its files say whether it is a head or a model."""
    is_head: bool = import_module("specdec.drafters.head.loading").drafts_as_head(draft, model)
    return DRAFT_HEAD if is_head else SMALL_MODEL


def _built(name: str, draft: PreTrainedModel | None = None) -> Drafter | str:
    return DrafterSpec.parse(name).build(draft)


class TreeSpec(Spec):
    """A growth policy asked for by name."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> TreeSpec:
        """`NAME`, `NAME:value` or `NAME:parameter=value,...`; raises `ValueError` that lists what is allowed."""
        kind, _, rest = text.partition(":")
        check_known("tree", kind, tuple(_TREES))
        tree, (first, *others) = _TREES[kind], rest.split(",")
        assignments = [first if "=" in first else f"{tree.unnamed}={first}", *others] if rest else []
        return cls(text=text, kind=kind, parameters=parse_parameters(kind, tree.constructor, assignments))

    def build(self, **measured: Any) -> GrowthPolicy:
        """What `specdec.generate` takes as `tree`.

        Args:
            measured: arguments of the policy that nobody types: the `acceptance` of a Sequoia tree.
        """
        policy: GrowthPolicy = _TREES[self.kind].constructor(**self.parameters, **measured)
        return policy


def check_draft(specs: Sequence[DrafterSpec], draft: str | None) -> None:
    """Raise `ValueError` if a drafter lacks its draft model, or if no drafter uses the one that was given."""
    needing = [spec for spec in specs if spec.needs_draft]
    if needing and draft is None:
        what = "the head in a folder" if needing[0].kind == DRAFT_HEAD else "a smaller model"
        raise ValueError(f"{needing[0].text} drafts with {what}: give it with --draft")
    if draft is not None and not any(spec.may_use_draft for spec in specs):
        users = ", ".join((AUTO, *DRAFTERS_OF_A_MODEL))
        raise ValueError(f"--draft is for {users}, of which none was asked for: add one, or leave --draft out")


def choose_drafter(
    name: str | None, draft: str | None, tree: str | None = None, *, model: str = "", for_engine: bool = False
) -> DrafterSpec:
    """What --drafter, --draft and --tree mean together: a tree is grown by a drafter that takes one.

    Args:
        model: that it drafts for.
        for_engine: whether rows are to join the batch that it drafts for.

    Raises:
        ValueError: an unknown name, a drafter that cannot do that, or that lacks or cannot use its draft model.
    """
    spec = DrafterSpec.parse(name or (AUTO if draft is None or tree is None else drafter_of(draft, model)))
    if for_engine and spec.kind not in DRAFTERS_OF_AN_ENGINE:
        raise ValueError(
            f"{spec.kind} cannot draft for rows that join a batch: use {' or '.join(DRAFTERS_OF_AN_ENGINE)}"
        )
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
        raise ValueError(f"{drafter.kind} does not take the tree {text}: use {takers(tree)}")
    return tree


def takers(tree: TreeSpec) -> str:
    """The drafters that take a tree."""
    return " or ".join(name for name, trees in TREES_OF_DRAFTERS.items() if tree.kind in trees)
