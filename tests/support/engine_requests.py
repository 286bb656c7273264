"""Requests to an engine, and what `model.generate()` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from specdec.engine import Request
from specdec.engine.noise import gumbel
from specdec.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()


@cache
def model_of(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    return tiny_model(family, seed=seed)


class BanAfter(LogitsProcessor):
    """Forbids a token that depends on the prefix's last one: a grammar of a kind."""

    def __init__(self, shift: int):
        self.shift = shift

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        banned = (input_ids[:, -1:] + self.shift) % scores.shape[1]
        return scores.scatter(1, banned, -torch.inf)


class StopOnSum(StoppingCriteria):
    def __init__(self, divisor: int):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -2:].sum(-1) % self.divisor == 0


def request_of(prompt: Sequence[int], *, processors=(), criteria=(), seed=None, **options) -> Request:
    return Request(
        prompt=prompt,
        config=GenerationConfig(**{"do_sample": False, "max_new_tokens": 12, **options}),
        seed=seed,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(criteria),
    )


def alone(model: PreTrainedModel, request: Request) -> list[int]:
    """What `model.generate()` makes of a greedy request."""
    prompt_1P = torch.tensor([list(request.prompt)])
    out = model.generate(
        prompt_1P,
        attention_mask=torch.ones_like(prompt_1P),
        generation_config=request.config,
        logits_processor=request.logits_processor,
        stopping_criteria=request.stopping_criteria,
        tokenizer=TOKENIZER,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return out[0, len(request.prompt) :].tolist()


@torch.no_grad()
def sampled_by_hand(
    model: PreTrainedModel, prompt: Sequence[int], processors: LogitsProcessorList, seed: int, count: int
) -> list[int]:
    """One forward of the model for each token, and the noise as `gumbel` defines it."""
    text = list(prompt)
    for _ in range(count):
        text_1L = torch.tensor([text])
        scores_1V = processors(text_1L, model(text_1L).logits[:, -1].float())
        noise_V = gumbel(seed, len(text), torch.arange(scores_1V.shape[1]))
        text.append(int((scores_1V[0].double().log_softmax(-1) + noise_V).argmax()))
    return text[len(prompt) :]


def random_prompt(length: int, seed: int = 0, vocab_size: int = 6) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


REQUESTS = (
    request_of(random_prompt(9, 1), max_new_tokens=20),
    request_of(random_prompt(1, 2), max_new_tokens=7),
    request_of(random_prompt(41, 3), repetition_penalty=1.3, max_new_tokens=15),
    request_of(random_prompt(17, 4), processors=[BanAfter(3)], max_new_tokens=11),
    request_of(random_prompt(5, 5), criteria=[StopOnSum(7)], max_new_tokens=25),
    request_of(random_prompt(33, 6), eos_token_id=list(range(0, 259, 9)), max_new_tokens=25),
    request_of(random_prompt(12, 7), no_repeat_ngram_size=2, min_new_tokens=4, eos_token_id=list(range(0, 259, 5))),
    request_of(random_prompt(8, 8), stop_strings=["e", "A", "z", "10", "\x00"], max_new_tokens=30),
    request_of(random_prompt(3, 9), max_new_tokens=1),
)


@cache
def expected(number: int, family: str = "llama") -> list[int]:
    return alone(model_of(family), REQUESTS[number])
