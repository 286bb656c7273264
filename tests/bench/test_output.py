"""What `specdec bench` prints, writes and draws."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import trees
from specdec import drafters
from specdec.bench.building import Models, build_peers
from specdec.bench.document import Document, make_document, schema, to_csv, to_json, to_jsonl
from specdec.bench.harness import BatchResult, Harness, Method, Settings
from specdec.bench.peers import choose_peers
from specdec.bench.tables import (
    Grid,
    draft_grid,
    progress_grid,
    rich_parts,
    speed_grid,
    to_markdown,
    to_text,
    verdict,
)
from specdec.suites import Prompt
from tests.support.references import with_noise

PROMPTS = [
    Prompt(text="to be or not to be or not to", category="repeat"),
    Prompt(text="one", category="repeat"),
    Prompt(text="1 + 1 =", category="math"),
]
METHODS = ["transformers", "plain", "prompt-lookup", "tree", "transformers/prompt-lookup"]


@pytest.fixture(scope="module")
def measured(tiny: str) -> tuple[Document, list[BatchResult]]:
    """Two batch sizes: transformers' prompt lookup takes part in one of them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    relative = drafters.SmallModel(with_noise(model))
    methods = [
        Method("transformers"),
        Method("plain", drafters.Plain()),
        Method("prompt-lookup", drafters.PromptLookup(min_match=1)),
        Method("tree", relative, trees.DySpec(8)),
    ]
    peers = [spec for name, spec in choose_peers("transformers", draft=None).items() if name != "transformers"]
    methods += build_peers(peers, Models(target=model, tokenizer=tokenizer), PROMPTS, 12)
    settings = [Settings(max_new_tokens=12, batch_size=size, repetitions=2, warmup=0) for size in (1, 2)]
    harnesses = [Harness(model, tokenizer, methods, one) for one in settings]
    results = [result for harness in harnesses for result in harness.run(PROMPTS)]
    document = make_document(
        results,
        model=model,
        model_name="tiny",
        suite_name="three",
        methods=methods,
        settings=settings,
        not_available=[one for harness in harnesses for one in harness.missing],
        further={"weights": "stock"},
    )
    return document, results


def validate(document: Any) -> None:
    jsonschema.Draft202012Validator(schema()).validate(document)


def test_the_document_is_what_the_schema_says(measured: tuple[Document, list[BatchResult]]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    document = json.loads(to_json(measured[0]))
    validate(document)
    rows = [(row["batch_size"], row["category"], row["name"]) for row in document["methods"]]
    expected = [(1, category, name) for category in ("repeat", "math", "all") for name in METHODS]
    assert rows == expected + [(2, category, name) for _, category, name in expected if name != METHODS[-1]]
    (missing,) = document["not_available"]
    assert (missing["name"], missing["batch_size"]) == (METHODS[-1], 2)
    settings = document["environment"]["settings"]
    assert (settings["batch_size"], settings["max_new_tokens"]) == ([1, 2], 12)
    assert (settings["reference"], settings["tie_bound"]) == ("transformers", 1e-3)
    assert settings["trees"] == {"tree": repr(trees.DySpec(8))}
    assert all(row["identical_to_plain"] for row in document["methods"])


def test_the_schema_has_every_field_and_no_other(measured: tuple[Document, list[BatchResult]]) -> None:
    document = json.loads(to_json(measured[0]))
    row = schema()["properties"]["methods"]["items"]
    assert list(row["properties"]) == row["required"] == list(document["methods"][0])
    environment = schema()["properties"]["environment"]["properties"]
    assert set(document["environment"]) <= set(environment)
    assert list(document["environment"]["settings"]) == list(environment["settings"]["properties"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.pop("suite"),
        lambda document: document["methods"][0].pop("ttft_ms"),
        lambda document: document["methods"][0].update(tokens_per_second=0),
        lambda document: document["methods"][0].update(tok_s=3),
        lambda document: document["methods"][0].update(speedup_interval=[1.0]),
        lambda document: document["environment"]["settings"].update(batch_size=[]),
    ],
)
def test_the_schema_refuses_other_documents(measured: tuple[Document, list[BatchResult]], spoil: Any) -> None:
    document = json.loads(to_json(measured[0]))
    spoil(document)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_every_line_of_jsonl_is_a_document_of_one_row(measured: tuple[Document, list[BatchResult]]) -> None:
    whole = json.loads(to_json(measured[0]))
    lines = [json.loads(line) for line in to_jsonl(measured[0]).splitlines()]
    assert len(lines) == len(whole["methods"])
    for line, row in zip(lines, whole["methods"], strict=True):
        shared = {name: line.pop(name) for name in ("schema_version", "environment", "model", "suite")}
        assert line == row
        validate(shared | {"methods": [line], "not_available": []})


def test_csv_has_a_line_for_every_row(measured: tuple[Document, list[BatchResult]]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(measured[0]))))
    whole = json.loads(to_json(measured[0]))
    assert [row["name"] for row in rows] == [row["name"] for row in whole["methods"]]
    for row, expected in zip(rows, whole["methods"], strict=True):
        assert float(row["tokens_per_second"]) == expected["tokens_per_second"]
        assert float(row["ms_per_token.p90"]) == expected["ms_per_token"]["p90"]
        assert [float(one) for one in row["speedup_interval"].split()] == (expected["speedup_interval"] or [])
        assert row["environment.settings.batch_size"] == "1 2"
        assert None not in row


def test_markdown_has_tables_of_even_width(measured: tuple[Document, list[BatchResult]]) -> None:
    lines = [line for line in to_markdown(measured[0]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[: 2 + len(measured[0].methods)]}) == 1
    assert lines[0].startswith("| batch | category | method | tok/s | speed-up | interval | tok/round | identical |")
    assert set(lines[1]) <= set("|-: ")


def test_tables_say_what_they_mean(measured: tuple[Document, list[BatchResult]]) -> None:
    text = to_text(measured[0], width=120)
    for part in (
        "tok/round counts the bonus token",
        "interval: 95%, by bootstrap",
        "identical: greedy output equals that of transformers",
        "not available: transformers/prompt-lookup at batch 2: transformers' assisted modes decode one prompt",
        "greedy, new tokens: 12, batch: 1/2, repetitions: 2 after 0",
    ):
        assert part in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("width", [80, 97, 120])
def test_tables_fit_the_terminal(measured: tuple[Document, list[BatchResult]], width: int) -> None:
    """Numbers are whole, and so are labels: at 80 columns other columns go, which a line says."""
    document = measured[0]
    text = to_text(document, width)
    assert max(map(len, text.splitlines())) <= width
    for row in document.methods:
        assert f"{row.tokens_per_second_mean:.1f}" in text
        assert re.search(rf"\b{re.escape(row.category)} +{row.name[:10]}|^ *{row.name[:10]}", text, re.MULTILINE)
    assert ("left out in" in text) == (width < 120)
    assert "prompt-lookup" in text


@pytest.mark.parametrize("num_digits", range(7, 16))
def test_no_column_is_cut(num_digits: int) -> None:
    """One is left out as soon as the table is a character too wide, and not before."""
    rows = [["code", "transformers", "17.1", "0.92", "9" * num_digits]]
    headings = ["category", "method", "tok/s", "speed-up", "ms"]
    grid = Grid(title="", headings=headings, num_labels=2, sections=[rows], spare=("tok/s",))
    for width, is_whole in ((41 + num_digits, True), (40 + num_digits, False)):
        console = Console(width=width, no_color=True)
        with console.capture() as capture:
            console.print(*rich_parts(grid, width))
        assert "9" * num_digits in capture.get()
        assert ("17.1" in capture.get()) == is_whole


def test_long_names_are_folded_and_no_number_is(measured: tuple[Document, list[BatchResult]]) -> None:
    document = measured[0]
    long = "small-model dyspec:budget=32,max_depth=8,shared=true"
    methods = [replace(row, name=long if row.name == "tree" else row.name) for row in document.methods]
    text = to_text(replace(document, methods=methods), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "small-model" in text
    for row in methods:
        assert f"{row.tokens_per_second_mean:.1f}" in text


def test_the_last_line_says_what_it_comes_to(measured: tuple[Document, list[BatchResult]]) -> None:
    document = measured[0]
    assert verdict(document) == []  # of two batch sizes there is no one result
    one = replace(document, methods=[row for row in document.methods if row.batch_size == 1])
    lookup, tree = verdict(one)
    assert re.fullmatch(r"prompt-lookup: \d+\.\d\d x transformers, \d+\.\d\d x plain; identical on .*", lookup)
    assert tree.startswith("tree: ")
    tied = [replace(row, ties=1, num_identical=2) if row.name == "tree" else row for row in one.methods]
    assert verdict(replace(one, methods=tied))[1].endswith(
        "identical on 2 of 3 prompts, equal up to a numerical tie on 1"
    )
    assert to_text(one, 80).endswith(verdict(one)[-1])


def test_rows_are_known_before_all_is_measured(measured: tuple[Document, list[BatchResult]]) -> None:
    grid = progress_grid(measured[0].methods)
    assert grid.headings == ["batch", "category", "method", "tok/s", "speed-up", "identical"]
    assert len(grid.sections) == 4


def test_tables_leave_out_what_says_nothing(measured: tuple[Document, list[BatchResult]]) -> None:
    """One batch size: no column for it. One category: its rows are the total already."""
    document, _ = measured
    few = [row for row in document.methods if row.batch_size == 1 and row.category != "math"]
    small = Document(environment=document.environment, model="tiny", suite="one", methods=few, not_available=[])
    grid = speed_grid(small)
    assert grid.headings[:2] == ["category", "method"]
    assert [row[0] for section in grid.sections for row in section] == ["repeat"] + [""] * (len(METHODS) - 1)
    (section,) = draft_grid(small).sections
    assert [row[0] for row in section] == METHODS


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figures_are_drawn(measured: tuple[Document, list[BatchResult]], tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    from specdec.bench.plots import draw

    path = tmp_path / f"figure.{ending}"
    draw(*measured, path)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        ElementTree.parse(path)


def test_figures_show_every_method_and_category(
    measured: tuple[Document, list[BatchResult]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from specdec.bench.plots import draw

    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    draw(*measured, tmp_path / "figure.png")
    alone, pairs = drawn[0].subfigs
    assert [text.get_text() for text in alone.legends[0].get_texts()] == METHODS
    assert [text.get_text() for text in pairs.legends[0].get_texts()] == METHODS[:-1]
    speed, accepted, time = alone.axes
    assert [tick.get_text() for tick in speed.get_xticklabels()] == ["repeat", "math", "all"]
    assert accepted.get_ylabel() == "share of rounds"
    for line in time.lines[::2]:
        assert list(line.get_ydata()) == list(range(13))
