"""Where benchmark prompts come from: the built-in suite or a JSON-lines file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
ALL = "all"
NO_CATEGORY = "prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`token_ids`: what is decoded in place of the text, where a number of tokens was asked for."""

    text: str
    category: str
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    name: str
    prompts: list[Prompt]

    @property
    def categories(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(prompt.category for prompt in self.prompts))

    def select(self, categories: Iterable[str] = (), limit: int | None = None) -> "Suite":
        """The first `limit` prompts of each of the `categories`; all of them where nothing is given."""
        wanted = list(categories) or self.categories
        unknown = [category for category in wanted if category not in self.categories]
        if unknown:
            raise ValueError(
                f"unknown category {unknown[0]!r} in suite {self.name}; it has: {', '.join(self.categories)}"
            )
        chosen = [
            prompt
            for category in dict.fromkeys(wanted)
            for prompt in [prompt for prompt in self.prompts if prompt.category == category][:limit]
        ]
        return Suite(name=self.name, prompts=chosen)


def load_suite(path: Path | None = None) -> Suite:
    """The built-in suite, or a file with one JSON object a line.

    A line holds either `prompt` or `turns` (Spec-Bench's format, of which the first turn is used), and may
    hold `category`. Raises `ValueError` that names the file and the line.
    """
    if path is None:
        text = (files("specdec") / "suites" / "builtin.jsonl").read_text(encoding="utf-8")
        return Suite(name=BUILTIN, prompts=list(_parse_lines(text, BUILTIN)))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path}: {error}") from error
    prompts = list(_parse_lines(text, str(path)))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return Suite(name=path.name, prompts=prompts)


def of_lengths(suite: Suite, lengths: Sequence[int], tokenizer: "PreTrainedTokenizerBase", *, count: int) -> Suite:
    """Prompts of exactly so many tokens, `count` of each length: the suite's texts, one after the other, cut off.

    Prompt i starts with text i. There is no chat template in it: the model goes on where the text stops.
    """
    texts = [prompt.text for prompt in suite.prompts]
    pieces = [tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"] for text in texts]
    opening = tokenizer("")["input_ids"]
    prompts = []
    for length in lengths:
        for index in range(count):
            turn = chain.from_iterable(islice(cycle(pieces), index % len(pieces), None))
            token_ids = tuple(islice(chain(opening, turn), length))
            category = f"{length} tokens"
            prompts.append(Prompt(text=texts[index % len(texts)], category=category, token_ids=token_ids))
    return Suite(name=f"{suite.name}, cut", prompts=prompts)


def _parse_lines(text: str, source: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _parse_prompt(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: {error}") from error


def _parse_prompt(record: Any) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    category = record.get("category", NO_CATEGORY)
    if not isinstance(category, str) or not category:
        raise ValueError(f"'category' must be a non-empty string, got {category!r}")
    if category == ALL:
        raise ValueError(f"the category name {ALL!r} is taken by the total")
    return Prompt(text=_prompt_text(record), category=category)


def _prompt_text(record: dict[str, Any]) -> str:
    if ("prompt" in record) == ("turns" in record):
        raise ValueError("expected either 'prompt' (a string) or 'turns' (a list of strings)")
    turns = record["turns"] if "turns" in record else [record["prompt"]]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'turns' must be a non-empty list of strings, got {turns!r}")
    if not isinstance(turns[0], str) or not turns[0].strip():
        raise ValueError(f"a prompt must be a non-empty string, got {turns[0]!r}")
    turns[0].encode()  # half of a surrogate pair is no text (a ValueError)
    return turns[0]
