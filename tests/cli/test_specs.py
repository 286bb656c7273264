"""Drafters and trees by name: one table, from which parameters, help texts and what is built all follow."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import specdec
import trees
from specdec import drafters
from specdec.cli.app import app
from specdec.cli.chat.commands import COMMANDS
from specdec.cli.grafting import grafted
from specdec.cli.options import MODEL_OPTIONS
from specdec.drafters.head.loading import load_head
from specdec.engine import Engine
from specdec.errors import DraftError
from specdec.kernels import prepared
from specdec.model_options import ModelOptions
from specdec.models import load
from specdec.models.pair import LoadedPair, load_pair
from specdec.specs import (
    DRAFTERS,
    DRAFTERS_OF_A_MODEL,
    DRAFTERS_OF_AN_ENGINE,
    TREE_EXAMPLES,
    TREES_OF_DRAFTERS,
    DrafterSpec,
    TreeSpec,
    choose_drafter,
    value_of,
)
from specdec.testing import BYTE_VOCAB_SIZE, ByteTokenizer, tiny_model
from tests.support.commands import PROMPT, error_of, plain_text, specdec_command
from tests.support.heads import TinyHead, save_speculators
from tests.support.tiny_models import save_tiny_model, save_word_model

MODEL, TOKENIZERS = tiny_model("llama"), (ByteTokenizer(), ByteTokenizer())
HEAD = TinyHead(vocab_size=BYTE_VOCAB_SIZE, drafts=range(0, BYTE_VOCAB_SIZE, 3), layers=(1, 2))


def built(text: str) -> Any:
    spec = DrafterSpec.parse(text)
    return spec.build(draft_for(spec.kind) if spec.may_use_draft else None, tokenizers=TOKENIZERS)


@cache
def draft_for(name: str) -> Any:
    if name != "draft-head":
        return MODEL
    with TemporaryDirectory() as folder:
        return load_head(save_speculators(Path(folder), HEAD))


# The table


def test_every_drafter_can_be_named() -> None:
    """`foreign-model` could not be, and `mixed` and `cascade` stood in no help text."""
    ours = {value for name in drafters.__all__ if inspect.isclass(value := getattr(drafters, name))}
    concrete = {value for value in ours if issubclass(value, drafters.Drafter) and value is not drafters.Drafter}
    assert {type(built(name)) for name in DRAFTERS} == concrete


@pytest.mark.parametrize("examples", TREE_EXAMPLES.values(), ids=TREE_EXAMPLES)
def test_the_examples_of_trees_can_be_built(examples: str) -> None:
    for example in examples.split(", "):
        spec = TreeSpec.parse(example)
        measured = {"acceptance": (0.5,)} if spec.kind == "sequoia" else {}
        assert isinstance(spec.build(**measured), trees.GrowthPolicy)


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "serve", "batch"])
def test_help_offers_what_can_be_named(command: str) -> None:
    parameters = {one.name: one for one in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    help_text = parameters.get("drafter", parameters.get("methods")).help  # type: ignore[union-attr]
    offered = help_text.removeprefix("Separated by commas: ").partition(";")[0].split(", ")
    assert tuple(offered) == (DRAFTERS_OF_AN_ENGINE if command in ("serve", "batch") else DRAFTERS)


def test_the_help_of_trees_says_who_takes_which() -> None:
    parameters = {one.name: one for one in get_command(app).commands["bench"].params}  # type: ignore[attr-defined]
    help_text = parameters["tree"].help
    assert all(examples in help_text for examples in TREE_EXAMPLES.values())
    assert "prompt-lookup takes chain and dyspec; mixed takes chain and dyspec; cascade takes chain" in help_text


def test_chat_offers_the_same() -> None:
    assert tuple(COMMANDS["/draft"].choices()) == DRAFTERS


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_takes_the_trees_that_the_table_says(tiny: str, name: str) -> None:
    """What it does not take, it refuses when it is called."""
    target = load(tiny)
    draft = {"draft": load(tiny)._replace(model=draft_for(name))} if name in DRAFTERS_OF_A_MODEL else {}
    drafter = LoadedPair(target, **draft).build(DrafterSpec.parse(name))
    for kind, examples in TREE_EXAMPLES.items():
        spec = TreeSpec.parse(examples.split(", ")[0])
        tree = spec.build(**({"acceptance": (0.5,)} if kind == "sequoia" else {}))
        inputs = target.tokenizer("abcabcabc", return_tensors="pt")["input_ids"]
        if kind in TREES_OF_DRAFTERS[name]:
            specdec.generate(target.model, inputs, max_new_tokens=3, drafter=drafter, tree=tree)
        elif name not in (
            "auto",
            "plain",
        ):  # which decode without it: lookup drafts in place of one, nothing of the other
            with pytest.raises(ValueError, match="tree"):
                specdec.generate(target.model, inputs, max_new_tokens=3, drafter=drafter, tree=tree)


@pytest.mark.parametrize("name", DRAFTERS)
def test_an_engine_takes_the_drafters_that_the_table_says(name: str) -> None:
    """Engines refused some only after the models had been loaded."""
    draft = "some/model" if name in DRAFTERS_OF_A_MODEL else None
    if name in DRAFTERS_OF_AN_ENGINE:
        assert choose_drafter(name, draft, for_engine=True).kind == name
        engine = Engine(MODEL, drafter=built(name))
        engine.step()
        engine.close()
    else:
        with pytest.raises(ValueError, match=f"{name} cannot draft for rows that join a batch: use auto or plain"):
            choose_drafter(name, draft, for_engine=True)
        with pytest.raises(DraftError, match="cannot take rows"):
            Engine(MODEL, drafter=built(name)).step()


@pytest.mark.parametrize("options", [(), ("--drafter", "draft-head:num_tokens=2"), ("--tree", "fixed:2x2")])
def test_a_draft_may_be_a_head(options: tuple[str, ...], tiny: str, tmp_path: Path) -> None:
    """Its config.json tells it from a model."""
    folder = save_speculators(tmp_path, HEAD)
    plain = specdec_command("generate", PROMPT, "--model", tiny, "-n", "8", "--drafter", "plain")
    out = specdec_command("generate", PROMPT, "--model", tiny, "-n", "8", "--draft", str(folder), *options)
    assert out.exit_code == 0, out.output
    assert out.stdout == plain.stdout


def test_heads_and_models_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(ValueError, match=r"small-model cannot .* a draft head: use draft-head or auto"):
        DrafterSpec.parse("small-model").build(draft_for("draft-head"))
    with pytest.raises(ValueError, match=r"draft-head cannot .* no draft head: use small-model or auto"):
        DrafterSpec.parse("draft-head").build(MODEL)
    assert isinstance(DrafterSpec.parse("auto").build(draft_for("draft-head")).drafters[0], drafters.DraftHead)


# Parameters


def test_parameters_follow_the_signature() -> None:
    lookup = built("prompt-lookup:num_tokens=8:tokens_per_match=none")
    assert (lookup.num_tokens, lookup.tokens_per_match) == (8, None)
    exit_ = built("early-exit:exit_layer=1:exits=none:objective=tokens-per-layer:shadow_share=0.5")
    assert (exit_.exit_layer, exit_.objective, exit_.shadow_share) == (1, "tokens-per-layer", 0.5)
    assert built("early-exit:exit_layer=adaptive").exit_layer == "adaptive"
    assert built("foreign-model:num_tokens=3").policy == trees.Chain(3)
    assert DrafterSpec.parse("quantized-self:weights=int4").parameters == {"weights": "int4"}
    assert DrafterSpec.parse("small-model:weights=none").parameters == {"weights": None}
    assert built("mixed:budget=none").budget is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt-lookup:corpus=x", "no parameter 'corpus'; it takes: num_tokens, min_match, tokens_per_match"),
        ("small-model:model=x", "no parameter 'model'; it takes: weights, num_tokens"),
        ("foreign-model:tokenizer=x", "no parameter 'tokenizer'; it takes: num_tokens"),
        ("auto:drafters=x", "no parameter 'drafters'; it takes: none"),
        ("early-exit:exit_layer=late", "exit_layer must be a whole number or adaptive, got 'late'"),
        ("small-model:weights=int3", "weights must be int8 or int4 or none, got 'int3'"),
        ("quantized-self:weights=none", "weights must be int8 or int4, got 'none'"),
        ("early-exit:objective=speed", "must be tokens-per-second or tokens-per-layer, got 'speed'"),
        ("prompt-lookup:tokens_per_match=x", "must be a whole number or none, got 'x'"),
    ],
)
def test_what_a_text_cannot_say_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DrafterSpec.parse(text)


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "8", 8),
        (float, "0.5", 0.5),
        (bool, "true", True),
        (str, "none", "none"),
        (str | None, "none", None),
        (str | None, "x", "x"),
        (int | Literal["adaptive"], "adaptive", "adaptive"),
        (tuple[int, ...], "4x2", (4, 2)),
    ],
)
def test_values_are_read_by_annotation(annotation: Any, text: str, value: Any) -> None:
    reader = value_of(annotation)
    assert reader is not None
    assert reader.read(text) == value


@pytest.mark.parametrize("annotation", [dict, trees.Calibration | None, list[int], tuple[float, ...], inspect._empty])
def test_other_annotations_cannot_be_typed(annotation: Any) -> None:
    assert value_of(annotation) is None


def test_a_bare_name_waits_for_no_torch() -> None:
    program = (
        "import sys; from specdec.specs import DrafterSpec; DrafterSpec.parse('mixed'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# A draft model of another tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_word_model(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with another tokenizer: two letters have changed their ids."""
    folder = tmp_path_factory.mktemp("swapped")
    save_tiny_model(folder)
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    ids = {letter: re.search(rf'"{letter}": (\d+)', text)[1] for letter in "ab"}  # type: ignore[index]
    for letter, other in ("ab", "ba"):
        text = re.sub(rf'"{letter}": \d+', f'"{letter}": {ids[other]}', text, count=1)
    file.write_text(text, encoding="utf-8")
    return str(folder)


def test_a_foreign_model_drafts_from_the_command_line(tiny: str, swapped: str) -> None:
    options = ("-n", "16", "--draft", swapped)
    result = specdec_command("generate", PROMPT, "-m", tiny, "--drafter", "foreign-model:num_tokens=3", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain_text(tiny, PROMPT) + "\n"
    refused = specdec_command("generate", PROMPT, "-m", tiny, "--drafter", "small-model", *options)
    assert "or the drafter foreign-model, which translates" in error_of(refused)


def test_chat_keeps_a_foreign_draft_for_those_who_can_use_it(tiny: str, swapped: str) -> None:
    lines = ("hello", "/draft small-model", "/draft auto", "/regen", f"/draft foreign-model {swapped}", "/draft mixed")
    options = ("-n", "8", "--draft", swapped, "--drafter", "foreign-model")
    result = specdec_command("chat", "-m", tiny, *options, stdin="".join(f"{line}\n" for line in lines))
    assert result.stderr.count("error: small-model drafts with a smaller model: give it with --draft") == 1
    assert result.stderr.count("error: mixed drafts with a smaller model: give it with --draft") == 1
    assert "drafter auto" in result.stderr
    assert "drafter foreign-model" in result.stderr


# How models are loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is unknown; give 'auto' or one of 'float32', 'bfloat16', 'float16'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"weights": "int3"}, "weights 'int3' is unknown; give one of stock, float, int8, int4"),
    ],
)
def test_wrong_model_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelOptions(**options)


def test_every_model_option_is_an_option_of_commands() -> None:
    assert list(MODEL_OPTIONS) == [field.name for field in fields(ModelOptions)]


def test_a_pair_is_loaded_as_the_options_say(tiny: str, words: str) -> None:
    pair = load_pair(tiny, tiny, ModelOptions(dtype="bfloat16", device="cpu"))
    assert pair.draft is not None
    assert {str(model.dtype) for model in (pair.target.model, pair.draft.model)} == {"torch.bfloat16"}
    assert isinstance(pair.build(DrafterSpec.parse("small-model")), drafters.SmallModel)
    pair = load_pair(tiny, None, ModelOptions())
    assert pair.draft is None
    assert prepared(pair.target.model) is not None, "prepared float weights are the default"
    assert prepared(load_pair(tiny, None, ModelOptions(weights="stock")).target.model) is None
    assert load_pair(tiny, words, ModelOptions(), translates=True).draft is not None


# Options of commands that are fields of dataclasses


FIELDS = {"threads": typer.Option("--threads", min=1), "weights": typer.Option("--weights")}
INT8 = ModelOptions(dtype="float16", weights="int8")
small_app = typer.Typer()


@small_app.command()
@grafted
def show(name: str, loading: Annotated[ModelOptions, FIELDS] = INT8) -> None:
    print(name, loading.dtype, loading.threads, loading.weights)


@pytest.mark.parametrize(
    ("words_typed", "printed"),
    [
        (["a"], "a float16 None int8"),
        (["a", "--threads", "2", "--weights", "float"], "a float16 2 float"),
    ],
)
def test_grafted_options(words_typed: list[str], printed: str) -> None:
    """Types come from the class, default values from the command; what is not offered keeps its default."""
    result = CliRunner().invoke(small_app, words_typed)
    assert result.stdout.strip() == printed


@pytest.mark.parametrize(
    "words_typed", [["a", "--dtype", "float32"], ["a", "--weights", "int3"], ["a", "--threads", "0"]]
)
def test_grafted_options_are_checked(words_typed: list[str]) -> None:
    assert CliRunner().invoke(small_app, words_typed).exit_code == 2


def test_the_commands_share_the_model_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in ("generate", "chat", "serve", "batch", "bench"):
        given = {one.name: one.default for one in commands[name].params}
        assert given | {field.name: field.default for field in fields(ModelOptions)} == given, name
    assert {one.name: one.default for one in commands["train-router"].params}["weights"] == "int8"
    assert "dtype" not in {one.name for one in commands["train-head"].params}
