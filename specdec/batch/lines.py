"""Lines of the input: what each of them asks for, and how a line that asks wrongly is told."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from numbers import Real
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from specdec.errors import BatchError
from specdec.text.prompting import Message

LineId: TypeAlias = str | int

MAX_LINE_BYTES = 16 << 20
"""More than a million tokens, however they are spelt. A longer line is not kept in memory, and not answered."""
_MAX_STOP_CHARACTERS = 1000
"""Of a stop text: looking for one costs time for each of its characters and each token of the vocabulary."""


class Line(NamedTuple):
    """A line as it stands in the file.

    Args:
        number: from 1 on, empty lines counted.
        text: without its end; None if it is longer than `MAX_LINE_BYTES`, or not needed any more.
        end: bytes of the file up to its end.
        digest: 16 hexadecimal digits by which a line is known again.
    """

    number: int
    text: bytes | None
    end: int
    digest: str


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that are not empty, one at a time; a byte order mark at the beginning is passed over."""
    for number in count(1):
        text = file.readline(MAX_LINE_BYTES + 1)
        if not text:
            return
        if len(text) > MAX_LINE_BYTES and not text.endswith(b"\n"):
            digest = _skip(file, text)
            yield Line(number, None, file.tell(), digest)
            continue
        if number == 1:
            text = text.removeprefix(codecs.BOM_UTF8)
        if stripped := text.strip():
            yield Line(number, stripped, file.tell(), _new_digest(stripped).hexdigest())


def _skip(file: BinaryIO, beginning: bytes) -> str:
    """Pass over the rest of a line, a piece at a time; returns the digest of all of it."""
    digest, piece = _new_digest(beginning), beginning
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(1 << 20)
        digest.update(piece)
    return digest.hexdigest()


def _new_digest(text: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(text, digest_size=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How prompts are continued: the defaults of a job, which a line may override.

    Args:
        max_new_tokens: at most so many.
        do_sample: draw tokens; False takes the likeliest.
        temperature, top_p, top_k, min_p: with `do_sample`; None leaves them to the model's own generation config.
        repetition_penalty: None leaves it to the model's own.
        stop: texts after which to stop.
        seed: of the job: every line draws from a seed made of this and its number. Of a line: its own. None with
            `do_sample`: another text every time.
        raw: continue a prompt as it is, without the chat template.
        system: the system prompt of lines that are one user turn.

    Raises:
        ValueError: says which value is wrong, and what is allowed.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, lowest=1)
        for name in ("do_sample", "raw"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is true or false, got {getattr(self, name)!r}")
        for name, lowest, highest in _NUMBERS:
            _check_number(name, getattr(self, name), lowest, highest)
        for name in ("top_k", "seed"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), lowest=0)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is a text or a list of texts, none of them empty, got {list(self.stop)!r}")
        if (longest := max(map(len, self.stop), default=0)) > _MAX_STOP_CHARACTERS:
            raise ValueError(f"a stop text has at most {_MAX_STOP_CHARACTERS} characters, got {longest}")
        if self.system is not None and not isinstance(self.system, str):
            raise ValueError(f"system is a text, got {self.system!r}")
        for name in _OF_SAMPLING:
            if not self.do_sample and getattr(self, name) is not None:
                raise ValueError(f"{name} needs do_sample: without it, decoding is greedy")

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """What `model.generate()` takes; what is not set is left to the model's own generation config."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        stop = {"stop_strings": list(self.stop)} if self.stop else {}
        set_ones = {name: value for name, value in given.items() if value is not None}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample, **set_ones, **stop}

    def overridden(self, values: Mapping[str, Any]) -> Settings:
        """These settings with a line's own; what belongs to sampling goes if the line turns that off."""
        own = dict(values)
        if "stop" in own:
            stop = own["stop"]
            own["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (stop,)
        if own.get("do_sample") is False:
            own = dict.fromkeys(name for name in _OF_SAMPLING if name not in own) | own
        return replace(self, **own)

    def digest(self, *others: object) -> str:
        """8 hexadecimal digits that change with any setting, or with what else is given."""
        text = json.dumps([asdict(self), *map(str, others)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


_NUMBERS = (
    ("temperature", 0.0, None),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, None),
)
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
SETTING_NAMES = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
)
"""What a line may set."""
_FIELDS = ("id", "prompt", "messages", *SETTING_NAMES)


def _check_int(name: str, value: object, *, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name} is a whole number of at least {lowest}, got {value!r}")


def _check_number(name: str, value: object, lowest: float, highest: float | None) -> None:
    """Above `lowest`, up to `highest`."""
    if value is None:
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not lowest < float(value) <= (highest or 1e9):  # type: ignore[arg-type]
        bounds = f"above {lowest:g}" + ("" if highest is None else f" and at most {highest:g}")
        raise ValueError(f"{name} is a number {bounds}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a line asks for.

    Args:
        number: of the line.
        conversation: messages for the chat template, or a text: one user turn, or the prompt as it is.
        settings: the job's, with the line's own.
        id: the line's own name, None if it has none.
    """

    number: int
    conversation: str | list[Message]
    settings: Settings
    id: LineId | None = field(default=None)


def parse(line: Line, defaults: Settings) -> Job:
    """Read a line.

    Raises:
        BatchError: it is too long, no JSON, lacks a prompt, or has fields or values that are not known.
    """
    if line.text is None:
        raise BatchError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB: shorten it, or answer it by other means")
    return job_of(_decode(line.text), line.number, defaults)


def job_of(document: Mapping[str, Any], number: int, defaults: Settings) -> Job:
    """What a row asks for, by its fields; `number` tells rows apart.

    Raises:
        BatchError: it lacks a prompt, or has fields or values that are not known.
    """
    unknown = [name for name in document if name not in _FIELDS]
    if unknown:
        raise BatchError(f"unknown field {unknown[0]!r}: a line has {', '.join(_FIELDS)}")
    own = {name: document[name] for name in SETTING_NAMES if name in document}
    try:
        settings = defaults.overridden(own)
    except ValueError as error:
        raise BatchError(str(error)) from error
    if "seed" not in own and settings.seed is not None:
        settings = replace(settings, seed=_seed_of(settings.seed, number))
    return Job(number=number, conversation=_conversation(document), settings=settings, id=_id(document))


def _decode(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BatchError(f"no UTF-8: byte {error.start + 1} of the line is {text[error.start]:#04x}") from error
    except (ValueError, RecursionError) as error:
        raise BatchError(f"no JSON: {error}") from error
    if not isinstance(document, dict):
        raise BatchError(f'a line is an object such as {{"prompt": "..."}}, got {_kind(document)}')
    return document


def _conversation(document: Mapping[str, Any]) -> str | list[Message]:
    if ("prompt" in document) == ("messages" in document):
        raise BatchError("a line has either a prompt or messages")
    if "prompt" in document:
        prompt = document["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise BatchError(f"prompt is a text that is not empty, got {_kind(prompt)}")
        return _whole(prompt)
    messages = document["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise BatchError('messages is a list of {"role": ..., "content": ...}, both of them texts')
    return [{"role": message["role"], "content": _whole(message["content"])} for message in messages]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
    )


def _whole(text: str) -> str:
    """JSON can spell half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BatchError(f"no text: character {error.start + 1} is half of a surrogate pair") from error
    return text


def _id(document: Mapping[str, Any]) -> LineId | None:
    own = document.get("id")
    if own is not None and (not isinstance(own, (str, int)) or isinstance(own, bool)):
        raise BatchError(f"id is a text or a whole number, got {_kind(own)}")
    return own


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "an empty text" if isinstance(value, str) and not value.strip() else names.get(type(value), repr(value))


def _seed_of(seed: int, number: int) -> int:
    """Another seed for every line, the same one whenever the job is run."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest(), "big")
