"""Saved conversations: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.cli.chat.settings import Settings
from specdec.cli.chat.transcript import Transcript
from specdec.cli.options import Sampling

SAVED = Transcript(
    model="demo",
    drafter="prompt-lookup:num_tokens=4",
    system="Be brief.",
    settings=Settings(max_new_tokens=7, sampling=Sampling(sample=True, temperature=0.5, seed=3)),
    messages=[{"role": "user", "content": "naïve\n🙂"}, {"role": "assistant", "content": ""}],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SAVED.save(tmp_path / "talk.json")
    return tmp_path / "talk.json"


def test_what_is_saved_is_loaded(path: Path) -> None:
    assert Transcript.load(path) == SAVED
    assert "naïve" in path.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_stays_as_it_was(path: Path) -> None:
    with pytest.raises(ValueError, match="cannot write"):
        SAVED.save(path / "below a file.json")
    assert Transcript.load(path) == SAVED
    assert list(path.parent.iterdir()) == [path]


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(name)


def having(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(values)


USER, MODEL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

BROKEN = {
    "another format": (having(format="chat"), 'it does not say "format": "specdec-chat"'),
    "a later version": (having(version=2), "it is of version 2, and this one reads version 1"),
    "an entry less": (without("system"), "these entries are missing or unknown: system"),
    "an entry more": (having(mood="good"), "these entries are missing or unknown: mood"),
    "a model that is a number": (having(model=5), "model is not a text"),
    "a system prompt that is a list": (having(system=[]), "system is neither a text nor null"),
    "settings that are a list": (having(settings=[]), "settings is not an object"),
    "an unknown setting": (having(settings={"mood": 1}), "there is no setting 'mood'"),
    "a setting of another kind": (having(settings={"max_new_tokens": "many"}), "max_new_tokens is a positive whole"),
    "a flag for a number": (having(settings={"max_new_tokens": True}), "max_new_tokens is a positive whole"),
    "a setting out of range": (having(settings={"sample": True, "top_p": 2}), "top_p is a number above 0, at most 1"),
    "one that has no effect": (having(settings={"top_p": 0.5}), "needs --sample"),
    "messages that are a text": (having(messages="hello"), "messages is not a list"),
    "a question without a reply": (having(messages=[USER]), "the last message has no reply"),
    "two questions": (having(messages=[USER, USER]), 'message 2 is not {"role": "assistant", "content": TEXT}'),
    "a message that is a text": (having(messages=["a", "b"]), 'message 1 is not {"role": "user"'),
    "a content that is a number": (having(messages=[USER, {**MODEL, "content": 5}]), "message 2 is not"),
    "half a character": (having(messages=[USER, {**MODEL, "content": "\ud800"}]), "message 2 is not"),
    "a message with more in it": (having(messages=[USER, {**MODEL, "name": "x"}]), "message 2 is not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_is_refused(path: Path, name: str) -> None:
    change, message = BROKEN[name]
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is not a conversation that specdec chat has saved") as caught:
        Transcript.load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"format": "specdec-chat"', "is not JSON"),
        (b"\xff\xfe", "is not text"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b"null", "it does not say"),
    ],
)
def test_a_file_that_is_no_document(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Transcript.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="cannot read"):
            Transcript.load(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "sample"]), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["version", "model", "drafter", "system", "settings", "messages"]), value=VALUES)
def test_any_entry_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    SAVED.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, name: value}))
    try:
        loaded = Transcript.load(path)
    except ValueError:
        return
    loaded.save(path)
    assert Transcript.load(path) == loaded
