"""The README and the docs are true: their Python runs, their commands exist and parse, and the quick ones run.

A command that may take long (anything but `doctor`, `generate` and `bench --limit 1`) is parsed only. Models are
replaced by tiny ones.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import routers
import specdec
import trees
from specdec.cli.app import app
from specdec.cli.chat.commands import COMMANDS as CHAT_COMMANDS
from specdec.drafters import Plain
from specdec.testing import ByteTokenizer, random_prompts, tiny_model
from tests.support.audited_server import AuditedServer
from tests.support.completions_server import Completions, Spoken
from tests.support.references import with_noise
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.network
@pytest.mark.usefixtures("demo_folder")
def test_the_first_screen(capsys: pytest.CaptureFixture[str]):
    program, shown = blocks("README.md", "python")[0], blocks("README.md", "text")[0]
    known: dict[str, Any] = {}
    exec(program, known)
    assert capsys.readouterr().out.strip() == shown.strip()
    stats = specdec.last_stats(known["model"])
    assert stats is not None
    assert stats.num_new_tokens == 48


def test_enable_and_disable():
    model = tiny_model("llama")
    exec(blocks("README.md", "python")[1], {"specdec": specdec, "model": model})
    assert "generate" not in vars(model)


def test_a_drafter_in_twenty_lines():
    (program,) = blocks("docs/structures.md", "python")
    assert len(program.splitlines()) <= 22
    names: dict = {}
    exec(program, names)
    model, prompts = tiny_model("llama"), random_prompts([6, 3])
    expected = model.generate(**prompts, max_new_tokens=16, do_sample=False)
    out = specdec.generate(model, **prompts, max_new_tokens=16, do_sample=False, drafter=names["RepeatLast"]())
    assert torch.equal(out, expected)


def test_a_streamer_that_is_told_of_rounds(capsys: pytest.CaptureFixture[str]):
    (program,) = blocks("docs/chat.md", "python")
    names: dict = {}
    exec(program, names)
    options = {"max_new_tokens": 4, "do_sample": False, "drafter": Plain(), "streamer": names["Rounds"]()}
    specdec.generate(tiny_model("llama"), **random_prompts([6]), **options)
    assert capsys.readouterr().out == "1 tokens, of these drafted: 0\n" * 4 + "end\n"


def test_the_commands_of_the_chat():
    """The page lists those that there are, as the help does."""
    table = re.findall(r"^\| `(/\w+)", (ROOT / "docs/chat.md").read_text(), re.MULTILINE)
    assert table == list(CHAT_COMMANDS)


# pages


def names() -> dict[str, Any]:
    """What the snippets of the docs take for granted."""
    model, tokenizer = tiny_model("llama", bos_token_id=258), ByteTokenizer()
    small = with_noise(model)
    inputs = tokenizer("a rose is a rose is a", return_tensors="pt", return_token_type_ids=False)
    made = {"model": model, "tokenizer": tokenizer, "small": small, "draft": small, "inputs": inputs}
    return {**made, "prompts": random_prompts([9, 4]), "specdec": specdec, "trees": trees, "routers": routers}


def test_the_client_of_a_server(monkeypatch: pytest.MonkeyPatch):
    """What the page about the server does with one that runs elsewhere."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install -e .[dev]")
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install -e .[serve]")
    from tests.support.serving import running, served_model

    with running(served_model(max_position_embeddings=2048), name="demo") as served:
        elsewhere = functools.partial(openai.OpenAI, max_retries=0)
        monkeypatch.setattr(openai, "OpenAI", lambda **options: elsewhere(**options | {"base_url": f"{served.url}/v1"}))
        known: dict[str, Any] = {}
        for program in blocks("docs/server.md", "python"):
            exec(program, known)
    assert json.loads(known["reply"].choices[0].message.content)["colour"] in ("red", "green", "blue")


@pytest.mark.parametrize("title", ["openai", "LangChain", "LiteLLM"])
def test_an_integration(title: str):
    """Those whose package is installed."""
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install -e .[serve]")
    from tests.support.serving import running, served_model

    page = (ROOT / "docs/integrations.md").read_text()
    (program,) = re.findall(rf"^## {title}\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    pytest.importorskip(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE)[0])
    with running(served_model(), name="demo") as served:
        exec(program.replace("http://127.0.0.1:8000", served.url), {})


def test_a_pipeline_is_accelerated(capsys: pytest.CaptureFixture[str]):
    program = blocks("docs/integrations.md", "python")[-1]
    known = names()
    exec(program, known)
    assert capsys.readouterr().out.startswith("a rose is a rose is")
    assert "generate" not in vars(known["model"])


def test_the_audit_from_python(capsys: pytest.CaptureFixture[str]):
    (program,) = blocks("docs/audit.md", "python")
    with AuditedServer().running() as server, AuditedServer(speculates=False).running() as reference:
        program = program.replace("http://localhost:8000", server.url).replace("http://localhost:8001", reference.url)
        exec(program, {})
    assert "PASS" in capsys.readouterr().out


WITH_SERVERS = ("docs/server.md", "docs/audit.md", "docs/integrations.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page not in WITH_SERVERS])
def test_the_python_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs, known = blocks(page, "python"), names()
    if any("exits.safetensors" in program for program in programs):
        from specdec.exits.module import save_exits
        from tests.support.early_exits import random_exit

        save_exits(tmp_path / "exits.safetensors", [random_exit(known["model"], 1)], known["model"], {})
    if any("head_folder" in program for program in programs):
        from tests.support.heads import TinyHead, save_speculators

        known["head_folder"] = str(
            save_speculators(tmp_path / "head", TinyHead(vocab_size=259, drafts=None, layers=(1, 2)))
        )
    if any("from_pretrained(folder" in program for program in programs):
        known |= {name: save_tiny_model(tmp_path / name) for name in ("folder", "small_folder")}
    monkeypatch.chdir(tmp_path)
    spoken = Spoken(known["small"])
    with Completions(spoken.answer, spoken.score).running() as server:
        for program in programs:
            exec(re.sub(r"http://localhost:\d+/v1", server.url, program), known)


def test_a_drafter_and_a_tree_policy_in_twenty_lines():
    programs = [program for program in blocks("docs/write-your-own.md", "python") if "class " in program]
    assert [len(program[program.index("class ") :].strip().splitlines()) <= 20 for program in programs] == [True, True]


def test_names_of_the_glossary_are_in_the_code():
    code = " ".join(
        path.read_text() for folder in ("trees", "routers", "specdec") for path in (ROOT / folder).rglob("*.py")
    )
    names = re.findall(r"`(\w+)(?:\.(\w+))?`", (ROOT / "docs/glossary.md").read_text())
    assert not {name for pair in names for name in pair if name} - set(re.findall(r"\w+", code))


def test_every_page_is_in_the_navigation():
    """And links between pages lead somewhere; `mkdocs build --strict` checks the rest."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in navigation, path.name
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


# commands


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command(
    page: str, command: str, tiny: str, tiny_draft: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program, *args = shlex.split(command.rpartition(" | ")[2], comments=True)  # what is piped into it is text
    if program == "specdec":
        check_specdec(args, {"demo": tiny, "BIG": tiny, "SMALL": tiny_draft}, tmp_path, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {arg for arg in args if "=" not in arg} <= set(targets)
    elif program == "python" and args[0] == "-m":
        check_module(args)
    elif program == "python":
        assert (ROOT / args[0]).is_file()
    else:
        assert program in ("pip", "cd", "git", "mkdocs", "docker", "lm_eval"), f"who checks {program}?"


def check_specdec(args: list[str], models: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *options = args
    group = get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    group.commands[verb].make_context(verb, list(options))
    if verb not in ("doctor", "generate") and "--limit 1 " not in f"{' '.join(options)} ":
        return
    (folder / "spec_bench.jsonl").write_text('{"turns": ["a rose is a rose"], "category": "qa"}\n')
    monkeypatch.chdir(folder)
    if verb == "generate":
        options += ["--max-new-tokens", "4"]
    if verb == "bench" and "--prompts" not in options:  # the built-in ones are longer than tiny models take
        options += ["--prompts", "spec_bench.jsonl"]
    result = CliRunner().invoke(app, [verb, *(models.get(option, option) for option in options)])
    assert result.exit_code == 0, result.output


def check_module(args: list[str]) -> None:
    """That the module is there and knows the options."""
    spec = importlib.util.find_spec(args[1])
    assert spec is not None
    files = (
        [Path(spec.origin)] if spec.origin else [*Path(next(iter(spec.submodule_search_locations or ()))).glob("*.py")]
    )
    assert spec.origin or any(path.name == "__main__.py" for path in files)
    source = "".join(path.read_text() for path in files)
    for option in (arg for arg in args[2:] if arg.startswith("--")):
        assert f'"{option}"' in source or 'f"--{' in source, f"{args[1]} {option}"
