"""LoRA adapters of one base, each a model of its own to clients: `specdec serve --lora-modules NAME=FOLDER`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "peft"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

from typer.testing import CliRunner

from specdec.cli.app import app
from specdec.engine import load_adapters
from tests.support.serving import NAME, Running, chat_prompt, plain_ids, running, served_model, text_of
from tests.support.wrapped import add_lora

NUM_NEW = 12
SAID: dict[str, str] = {}
"""What each model says, alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pirate")
    add_lora(served_model(), "default", seed=3).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    model = served_model()
    adapters = load_adapters(model, {"pirate": folder})
    SAID[NAME] = text_of(plain_ids(model, chat_prompt("hello"), NUM_NEW))
    model.enable_adapters()
    model.set_adapter(adapters["pirate"])
    SAID["pirate"] = text_of(plain_ids(model, chat_prompt("hello"), NUM_NEW))
    model.disable_adapters()
    with running(model, adapters=adapters) as server:
        yield server


def test_the_model_field_chooses(served: Running) -> None:
    def ask(name: str) -> dict[str, Any]:
        return served.chat(model=name, max_tokens=NUM_NEW, temperature=0).json()

    names = [NAME, "pirate"] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, names))
    assert SAID[NAME] != SAID["pirate"]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == [SAID[name] for name in names]
    assert [answer["model"] for answer in answers] == names


@pytest.mark.parametrize("path", ["completions", "responses"])
def test_other_paths_choose_as_well(served: Running, path: str) -> None:
    text = {"input": "hello", "max_output_tokens": 4} if path == "responses" else {"prompt": "hello", "max_tokens": 4}
    texts = []
    for name in (NAME, "pirate"):
        answer = served.http.post(f"/v1/{path}", json={"model": name, "temperature": 0, **text}).json()
        assert answer["model"] == name
        texts.append(answer["choices"][0]["text"] if path == "completions" else answer["output"])
    assert texts[0] != texts[1]


def test_models_lists_them(served: Running) -> None:
    cards = served.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [(NAME, None), ("pirate", NAME)]
    assert served.http.get("/v1/models/pirate").json() == cards[1]
    refused = served.http.post("/v1/completions", json={"model": "parrot", "prompt": "hello"})
    assert refused.status_code == 404
    assert "'pirate'" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("modules", "weights", "message"),
    [
        (["pirate"], "float", "give a name and a folder"),
        (["=folder"], "float", "give a name and a folder"),
        (["a=b", "a=c"], "float", "the name of something else"),
        (["demo=b"], "float", "the name of something else"),
        (["a=b"], "int8", "adapters go into float weights"),
        (["a=nowhere"], "float", "nowhere has no adapter_config.json"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(
    modules: list[str], weights: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.models.pair.load_pair", lambda *_, **__: pytest.fail("a model is loaded"))
    words = [word for each in modules for word in ("--lora-modules", each)]
    result = CliRunner().invoke(app, ["serve", "demo", "--weights", weights, *words])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
