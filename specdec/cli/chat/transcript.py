"""Conversations as files: JSON with the messages, the settings and the model's name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.cli.chat.settings import Settings
from specdec.text.prompting import Message

FORMAT = "specdec-chat"
VERSION = 1

_KEYS = {"format", "version", "model", "drafter", "system", "settings", "messages"}
_MAX_BYTES = 64 << 20


def transcript_path(text: str) -> Path:
    """A file, `.json` if it has no suffix."""
    path = Path(text).expanduser()
    return path if path.suffix else path.with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A conversation and the circumstances that it was held in.

    Args:
        model: the name of the model that spoke last.
        drafter: what drafted for it, as typed after --drafter.
        messages: the user's and the model's by turns, complete ones.
    """

    model: str
    drafter: str
    system: str | None
    settings: Settings = field(default_factory=Settings)
    messages: list[Message]

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. Raises `ValueError` if it cannot be written."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "drafter": self.drafter,
            "system": self.system,
            "settings": self.settings.values(),
            "messages": self.messages,
        }
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            unfinished.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            unfinished.replace(path)
        except (OSError, UnicodeEncodeError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise ValueError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read a file that `save` has written. Raises `ValueError` that says what is wrong with it."""
        document = _read(path)
        try:
            return cls._from_document(document)
        except ValueError as error:
            raise ValueError(f"{path} is not a conversation that specdec chat has saved: {error}") from error

    @classmethod
    def _from_document(cls, document: Any) -> Transcript:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if document.get("version") != VERSION:
            raise ValueError(f"it is of version {document.get('version')!r}, and this one reads version {VERSION}")
        if document.keys() != _KEYS:
            odd = ", ".join(sorted(document.keys() ^ _KEYS))
            raise ValueError(f"these entries are missing or unknown: {odd}")
        for name in ("model", "drafter"):
            _require(_is_text(document[name]), f"{name} is not a text")
        _require(document["system"] is None or _is_text(document["system"]), "system is neither a text nor null")
        _require(isinstance(document["settings"], dict), "settings is not an object")
        _check_messages(document["messages"])
        return cls(
            model=document["model"],
            drafter=document["drafter"],
            system=document["system"] or None,
            settings=Settings.from_values(document["settings"]),
            messages=document["messages"],
        )


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise OSError(f"it has more than {_MAX_BYTES >> 20} MiB, which is no conversation")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _check_messages(messages: Any) -> None:
    _require(isinstance(messages, list), "messages is not a list")
    _require(len(messages) % 2 == 0, "the last message has no reply")
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        _require(
            isinstance(message, Mapping)
            and message.keys() == {"role", "content"}
            and message["role"] == role
            and _is_text(message["content"]),
            f'message {index + 1} is not {{"role": "{role}", "content": TEXT}}',
        )


def _is_text(value: Any) -> bool:
    """Whether a value is a text that has a UTF-8 form: JSON can also spell halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
