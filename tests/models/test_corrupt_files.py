"""Readers of files that are damaged anywhere: one clear error or a result, never another exception, never a hang."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec import SpecdecError
from specdec.exits.module import load_exits, save_exits
from specdec.models import load
from specdec.suites import load_suite
from specdec.testing import ByteTokenizer, tiny_model
from specdec.training.heads.collect import _texts
from tests.support.early_exits import random_exit
from tests.support.tiny_gguf import write_tiny_gguf

_HEAD = 600
"""Bytes at the beginning that say what follows: damage there is the most telling."""
_PATIENCE_S = 120


@contextmanager
def limited() -> Iterator[None]:
    """A reader that does not come back fails instead of holding up the suite."""

    def give_up(*args: Any) -> None:
        raise TimeoutError(f"still reading after {_PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut off, overwritten, or lengthened."""
    kind = draw(st.sampled_from(["cut", "bytes", "number", "insert"]))
    where = draw(st.integers(0, 2**20))
    filling = draw(st.sampled_from([b"\x00", b"\xff", b"\xff" * 8, b"\x00" * 8, b"\x01" * 4, b"{", b'"', b"9" * 8]))

    def damage(content: bytes) -> bytes:
        place = where % (_HEAD if where % 3 else len(content)) % len(content)
        if kind == "cut":
            return content[:place]
        if kind == "insert":
            return content[:place] + filling + content[place:]
        size = len(filling) if kind == "bytes" else 1
        new = filling if kind == "bytes" else bytes([where % 251])
        return content[:place] + new + content[place + size :]

    return damage


def fuzz(path: Path, read: Callable[[], Any], allowed: tuple[type[Exception], ...], num_examples: int) -> None:
    content = path.read_bytes()
    read()

    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(content))
        with limited(), suppress(*allowed):
            read()

    check()


@pytest.mark.filterwarnings("ignore")
def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf")
    fuzz(tmp_path / "tiny.gguf", lambda: load(tmp_path / "tiny.gguf"), (SpecdecError,), 30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_folder(folder: Path, name: str) -> None:
    fuzz(folder / name, lambda: load(folder), (SpecdecError,), 30)


def test_exits(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "exits.safetensors"
    save_exits(path, [random_exit(model, 1)], model, {"seed": 0})
    fuzz(path, lambda: load_exits(path, model), (SpecdecError,), 60)


@pytest.mark.parametrize("lines", [b'{"prompt": "a", "category": "b"}\n{"turns": ["c", "d"]}\n', b'{"text": "some"}\n'])
def test_json_lines(tmp_path: Path, lines: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n')
    load_suite(path)
    path.write_bytes(lines)
    read = _texts if b"text" in lines else load_suite
    fuzz(path, lambda: read(path), (ValueError,), 200)


@pytest.mark.parametrize(
    "line", ["[" * 5_000, '{"prompt": ' + "9" * 5_000 + "}", json.dumps({"prompt": "\ud800"}), "NaN", '{"turns": {}}']
)
def test_json_that_is_hard_on_parsers(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=rf"{path}, line 1: ."):
        load_suite(path)
