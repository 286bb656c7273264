"""The small model of `bench/del.py`: its texts, its tokenizer, and its training with early exits.

Texts of six kinds, from tokens that follow from the ones before to tokens that nobody can know: days of a calendar,
numbers in words, records in JSON, classes in Python, questions of arithmetic, and the prose of Python's own manual. All
come from a random source that says which text it is, so training and prompts never share one.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from specdec.training.heads.layerskip import LayerSkipRecipe, LayerSkipTrainer

VOCAB_SIZE = 1024
ROW_TOKENS = 256
BATCH_ROWS = 8

NAMES = [
    "ada",
    "bela",
    "carl",
    "dora",
    "emil",
    "frida",
    "georg",
    "hanna",
    "ivo",
    "jane",
    "karl",
    "lena",
    "milo",
    "nora",
]
SURNAMES = ("abel", "brand", "cole", "drew", "ekman", "frost", "gray", "hale", "ivers", "jung", "klein", "lund", "moss")
CITIES = ("Oslo", "Turin", "Porto", "Ghent", "Basel", "Bergen", "Malmo", "Lyon", "Graz", "Bonn", "Cork", "Bath")
FIELDS = ("name", "price", "owner", "color", "weight", "status", "size", "code", "label", "count", "speed", "title")
CLASSES = ("Order", "Parcel", "Engine", "Ticket", "Garden", "Signal", "Bottle", "Planet", "Window", "Letter", "Bridge")
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
UNITS = _WORDS.split()
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def calendar(source: random.Random) -> str:
    day = date(1950, 1, 1) + timedelta(days=source.randrange(36500))
    days = [day + timedelta(days=index) for index in range(source.randrange(15, 25))]
    return f"Calendar from {day:%d %B %Y}\n" + "".join(f"{day:%A}, {day:%d %B %Y}\n" for day in days)


def counting(source: random.Random) -> str:
    start = source.randrange(1, 970)
    numbers = range(start, start + source.randrange(15, 25))
    return f"Count from {start}\n" + "".join(f"{number} is {in_words(number)}\n" for number in numbers)


def in_words(number: int) -> str:
    if number >= 100:
        rest = f" and {in_words(number % 100)}" if number % 100 else ""
        return f"{UNITS[number // 100]} hundred{rest}"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10] + (f" {UNITS[number % 10]}" if number % 10 else "")


def records(source: random.Random) -> str:
    start = source.randrange(100, 900)
    lines = []
    for index in range(source.randrange(4, 8)):
        name, surname = source.choice(NAMES), source.choice(SURNAMES)
        person = {
            "id": start + index,
            "name": f"{name} {surname}",
            "mail": f"{name}.{surname}@example.org",
            "city": source.choice(CITIES),
            "age": source.randrange(18, 80),
        }
        lines.append(json.dumps(person))
    return "Records\n" + "\n".join(lines) + "\n"


def code(source: random.Random) -> str:
    fields = source.sample(FIELDS, source.randrange(2, 5))
    title = source.choice(CLASSES)
    lines = [f"class {title}:", f"    def __init__(self, {', '.join(fields)}):"]
    lines += [f"        self._{field} = {field}" for field in fields]
    for field in fields:
        lines += ["", f"    def get_{field}(self):", f"        return self._{field}"]
        lines += ["", f"    def set_{field}(self, {field}):", f"        self._{field} = {field}"]
    lines += ["", "    def __repr__(self):", f'        return f"{title}({{self._{fields[0]}}})"']
    return "\n".join(lines) + "\n\n"


def arithmetic(source: random.Random) -> str:
    lines = []
    for _ in range(source.randrange(6, 10)):
        first, second = source.randrange(2, 60), source.randrange(2, 60)
        name, thing = source.choice(NAMES).title(), source.choice(("apples", "coins", "books", "stamps"))
        if source.random() < 0.5:
            lines.append(
                f"{name} has {first} {thing} and gets {second} more: {first} + {second} = {first + second} {thing}."
            )
        else:
            first, second = max(first, second), min(first, second)
            lines.append(
                f"{name} has {first} {thing} and gives away {second}: {first} - {second} = {first - second} {thing}."
            )
    return "Sums\n" + "\n".join(lines) + "\n"


_PARAGRAPHS = [
    " ".join(paragraph.split())
    for _, topic in sorted(pydoc_data.topics.topics.items())
    for paragraph in re.split(r"\n\s*\n", topic)
    if len(paragraph) > 200 and paragraph.count("  ") < 20
]
"""Python's manual; every tenth paragraph is held out."""


def prose(source: random.Random, held_out: bool = False) -> str:
    number = source.randrange(len(_PARAGRAPHS) // 10)
    return _PARAGRAPHS[10 * number + (0 if held_out else source.randrange(1, 10))] + "\n"


TASKS: dict[str, Callable[[random.Random], str]] = {
    "calendar": calendar,
    "counting": counting,
    "records": records,
    "code": code,
    "arithmetic": arithmetic,
    "prose": prose,
}


def prompts(task: str, count: int, seed: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Tensor]:
    """The first tokens of texts that were not trained on, each int64 [1, P]."""
    source = random.Random(f"{seed} {task}")
    chosen: list[Tensor] = []
    while len(chosen) < count:
        text = prose(source, held_out=True) if task == "prose" else TASKS[task](source)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]
        if ids.shape[1] == num_tokens:
            chosen.append(ids)
    return chosen


def _text_row(task: str, source: random.Random, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Texts of one kind, one after the other."""
    ids: list[int] = []
    while len(ids) < ROW_TOKENS:
        ids += tokenizer(TASKS[task](source)).input_ids
    return ids[:ROW_TOKENS]


def batch(step: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What is trained on in a step: a row of each kind, prose as often as two others, int64 [B, T]."""
    kinds = [*TASKS, *["prose"] * (BATCH_ROWS - len(TASKS))]
    source = random.Random(f"train {step}")
    return torch.tensor([_text_row(kind, source, tokenizer) for kind in kinds])


def new_tokenizer() -> PreTrainedTokenizerFast:
    source = random.Random("tokenizer")
    texts = [make(source) for _ in range(150) for make in TASKS.values()]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def new_model() -> PreTrainedModel:
    """16 layers of 256 channels, 13 million weights, random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(folder: Path, num_steps: int) -> Iterator[str]:
    """Writes the model and its tokenizer to a folder; goes on with what an earlier call left. Yields progress."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, model = new_tokenizer(), new_model()
    recipe = LayerSkipRecipe(num_steps=num_steps, learning_rate=2e-3)
    trainer = LayerSkipTrainer(model.train(), recipe)
    state = folder / "unfinished.safetensors"
    if state.exists():
        trainer.load(state)
    saved = time.monotonic()
    while trainer.step < num_steps:
        losses = trainer.advance(batch(trainer.step, tokenizer))
        if time.monotonic() - saved > 60:
            trainer.save(state)
            saved = time.monotonic()
        exits = " ".join(f"{depth}: {loss:.2f}" for depth, loss in losses.exits.items())
        yield f"step {trainer.step}/{num_steps}: last layer {losses.last:.2f}, exits {exits}"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state.unlink(missing_ok=True)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
