"""Text to train heads on, with the model's states there: the model talks to itself, or answers given questions.

A shard is a batch of conversations, all of one length, generated a token at a time, so that the states cost nothing
extra. Questions are sampled or given; answers are greedy, because greedy decoding is what is to be predicted. A shard
depends on its random seed alone: an interrupted collection goes on where it stopped.

Shape legend: B rows, T positions, C channels, V vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.suites import load_suite
from specdec.text.prompting import has_chat_template
from specdec.training.heads.openings import OPENINGS
from specdec.tree_model.layer_views import LayerViews
from specdec.tree_model.model import TreeModel

NUM_ROWS = 64  # what prepared layers take at once
TEMPERATURE, TOP_K = 0.9, 64  # of questions; sampling from all of a large vocabulary costs more than the forward
NUM_BEST = 16  # likeliest tokens that a shard keeps
MAX_QUESTION, MAX_ANSWER = 100, 160  # tokens; small models do not always find an end

Choices: TypeAlias = tuple[int, int]
"""What the model could say next: a sampled token, and its greedy choice."""

Spoken: TypeAlias = tuple[int, bool]
"""What is said: a token, and whether exits are to learn to predict it."""

Script: TypeAlias = Generator[Spoken, Choices, None]
"""One row of a shard: is sent the choices, and yields what is said next; never ends."""

_SAMPLED, _GREEDY = 0, 1


class Shard(NamedTuple):
    """What was said, and the model's states there.

    tokens_BT: int32. learned_BT: bool, see `Spoken`. best_ids_BTK, best_logits_BTK: int32 and float16, the model's K
    likeliest next tokens, best first. states: number of layers passed -> bfloat16 [B, T, C], the residual stream
    before the final norm; the last entry is the model's own. Empty if they were not kept.
    """

    tokens_BT: Tensor
    learned_BT: Tensor
    best_ids_BTK: Tensor
    best_logits_BTK: Tensor
    states: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class Template:
    """The fixed parts of a conversation, as tokens: before the first question, before an answer, before the next
    question."""

    opening: list[int]
    reply: list[int]
    again: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The tokenizer's chat template; without one, texts that follow each other."""
        if not has_chat_template(tokenizer):
            start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
            return cls(start, [], start)
        question, answer = "<QUESTION>", "<ANSWER>"
        turns = (("user", question), ("assistant", answer), ("user", question))
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        opening, rest = text.split(question, 1)
        _, again = rest.split(answer, 1)
        alone = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        parts = opening, alone.split(question, 1)[1], again.split(question, 1)[0]
        return cls(*(tokenizer.encode(part, add_special_tokens=False) for part in parts))


def converse(template: Template, questions: Iterator[list[int]], *, are_complete: bool) -> Script:
    """Questions and answers in turn.

    Args:
        questions: as tokens; whole ones if they `are_complete`, else their beginnings, which the model completes.
    """
    choices = yield from _given([*template.opening, *next(questions)])
    while True:
        limit = 0 if are_complete else MAX_QUESTION
        choices = yield from _speak(choices, _SAMPLED, limit, template.reply)
        choices = yield from _speak(choices, _GREEDY, MAX_ANSWER, template.again)
        choices = yield from _given(next(questions), choices)


def recite(texts: Iterator[list[int]]) -> Script:
    """Given texts, one after the other."""
    while True:
        for token in next(texts):
            yield token, True


def _given(tokens: Sequence[int], choices: Choices = (0, 0)) -> Generator[Spoken, Choices, Choices]:
    for token in tokens:
        choices = yield token, False
    return choices


def _speak(choices: Choices, speaker: int, limit: int, end: Sequence[int]) -> Generator[Spoken, Choices, Choices]:
    """One side speaks until it says the first token of `end` or has reached the limit; then the whole end is said."""
    for _ in range(limit):
        if choices[speaker] in end[:1]:
            break
        choices = yield choices[speaker], speaker == _GREEDY
    for index, token in enumerate(end):
        choices = yield token, index == 0 and speaker == _GREEDY and token == choices[_GREEDY]
    return choices


def self_generation(tokenizer: PreTrainedTokenizerBase) -> Callable[[random.Random], Script]:
    """Makes scripts in which the model asks itself."""
    template = Template.of(tokenizer)
    openings = [tokenizer.encode(opening, add_special_tokens=False) for opening in OPENINGS]

    return lambda rng: converse(template, _endless(openings, rng), are_complete=False)


def given_texts(tokenizer: PreTrainedTokenizerBase, path: Path) -> tuple[Callable[[random.Random], Script], int]:
    """Makes scripts from a JSON-lines file, and says how many tokens they come to, about.

    Every line holds `text`, which is taken as it is; or each holds `prompt` or `turns`, of which the model answers the
    first. Raises ValueError that names the file and the line.
    """
    if texts := _texts(path):
        encoded = [tokenizer.encode(text) for text in texts]
        return lambda rng: recite(_endless(encoded, rng)), sum(map(len, encoded))
    template = Template.of(tokenizer)
    questions = [tokenizer.encode(prompt.text, add_special_tokens=False) for prompt in load_suite(path).prompts]
    num_tokens = sum(map(len, questions)) + MAX_ANSWER * len(questions)
    return lambda rng: converse(template, _endless(questions, rng), are_complete=True), num_tokens


def _texts(path: Path) -> list[str]:
    """The texts of a file of texts; nothing if it is none."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError):
        return []  # whoever reads the prompts says which line is wrong
    texts = [record.get("text") for record in records if isinstance(record, dict)]
    is_whole = len(texts) == len(records) and all(isinstance(text, str) and text for text in texts)
    return [str(text) for text in texts] if is_whole else []


def _endless(items: Sequence[list[int]], rng: random.Random) -> Iterator[list[int]]:
    while True:
        yield from rng.sample(items, len(items))


class Collector:
    """Writes shards with one model.

    Args:
        depths: numbers of layers whose states are kept, besides the last; None keeps no states.
        script: makes the script of a row from a random source of its own.
        length: T.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        depths: Iterable[int] | None,
        script: Callable[[random.Random], Script],
        length: int,
        num_rows: int = NUM_ROWS,
    ):
        views = LayerViews(model)
        self._view = views.whole(() if depths is None else {*depths, views.num_layers})
        self._script = script
        self._length = length
        self._num_rows = num_rows

    @torch.inference_mode()
    def shard(self, seed: int) -> Iterator[Shard | None]:
        """Yields None after each position but the last, and then the shard."""
        scripts = [self._script(random.Random(f"{seed} {row}")) for row in range(self._num_rows)]
        generator = torch.Generator().manual_seed(seed)
        reader = TreeModel(self._view.model)
        said = [next(script) for script in scripts]
        logits_B1V = reader.prefill(_tokens(said).to(reader.device), capacity=self._length)
        shard = self._blank(logits_B1V.shape[-1])
        for position in range(self._length):
            logits_BK, ids_BK = (top.cpu() for top in logits_B1V[:, -1].float().topk(min(TOP_K, logits_B1V.shape[-1])))
            self._record(shard, position, said, ids_BK, logits_BK)
            if position + 1 < self._length:
                yield None
                choices = _choices(ids_BK, logits_BK, generator)
                said = [script.send(pair) for script, pair in zip(scripts, choices, strict=True)]
                tokens_B1 = _tokens(said).to(reader.device)
                logits_B1V = reader.forward(tokens_B1, torch.zeros_like(tokens_B1), None)
                reader.commit([range(1)] * len(said))
        yield shard

    def _blank(self, vocab_size: int) -> Shard:
        """Allocated once: thousands of small tensors among large ones would break the heap into pieces."""
        size = self._num_rows, self._length
        best = *size, min(NUM_BEST, vocab_size)
        ids, logits = torch.zeros(best, dtype=torch.int32), torch.zeros(best, dtype=torch.float16)
        states = {
            depth: torch.zeros(*size, state.shape[-1], dtype=torch.bfloat16)
            for depth, state in self._view.states.items()
        }
        return Shard(torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.bool), ids, logits, states)

    def _record(self, shard: Shard, position: int, said: Sequence[Spoken], ids_BK: Tensor, logits_BK: Tensor) -> None:
        tokens, learned = zip(*said, strict=True)
        num_best = shard.best_ids_BTK.shape[-1]
        shard.tokens_BT[:, position] = torch.tensor(tokens)
        shard.learned_BT[:, position] = torch.tensor(learned)
        shard.best_ids_BTK[:, position] = ids_BK[:, :num_best]
        shard.best_logits_BTK[:, position] = logits_BK[:, :num_best]
        for depth, state_B1C in self._view.states.items():
            shard.states[depth][:, position] = state_B1C[:, -1]


def _tokens(said: Sequence[Spoken]) -> Tensor:
    return torch.tensor([[token] for token, _ in said])


def _choices(ids_BK: Tensor, logits_BK: Tensor, generator: torch.Generator) -> list[Choices]:
    picked_B1 = torch.multinomial((logits_BK / TEMPERATURE).softmax(-1), 1, generator=generator)
    return list(zip(ids_BK.gather(1, picked_B1).squeeze(1).tolist(), ids_BK[:, 0].tolist(), strict=True))
