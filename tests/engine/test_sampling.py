"""Sampling in the engine: exactly the target's distribution, and a function of the request and its seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.drafters import Auto, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.engine import Engine, Request
from specdec.engine.noise import GumbelNoise, gumbel
from specdec.testing import tiny_model
from tests.support.engine_requests import sampled_by_hand
from tests.support.goodness import assert_drawn_from

SEEDS = 2000


def draws(scores_V: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """A sample for each (seed, position)."""
    noise, sample = GumbelNoise(), []
    for seed, position in pairs:
        scores_1V = scores_V.clone().unsqueeze(0)
        noise.add(scores_1V, seed, [position])
        sample.append(int(scores_1V.argmax()))
    return sample


@pytest.mark.parametrize("unit", ["seeds", "positions"])
def test_the_greatest_of_score_and_noise_is_a_sample(unit: str):
    scores_V = 2 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    scores_V[[3, 7]] = -torch.inf
    pairs = [(n, 5) if unit == "seeds" else (5, n) for n in range(SEEDS)]
    assert_drawn_from(draws(scores_V, pairs), dict(enumerate(scores_V.double().softmax(-1).tolist())))


def test_few_possible_tokens_get_the_noise_that_they_get_among_many():
    scores_1V = torch.zeros(1, 64)
    few_1V = scores_1V.clone()
    few_1V[0, 5:] = -torch.inf
    noise = GumbelNoise()
    noise.add(scores_1V, 1, [2])
    noise.add(few_1V, 1, [2])
    assert torch.equal(scores_1V[0, :5], few_1V[0, :5])
    assert torch.equal(few_1V[0, 5:], torch.full((59,), -torch.inf))


def test_noise_is_independent_across_positions_seeds_and_tokens():
    scores_V = torch.tensor([0.3, 0.0, -0.5])
    probs = scores_V.double().softmax(-1).tolist()
    expected = {(a, b): probs[a] * probs[b] for a, b in itertools.product(range(3), repeat=2)}
    for second in (lambda n: (n, 1), lambda n: (n + 1, 0)):
        first = draws(scores_V, [(n, 0) for n in range(SEEDS)])
        both = draws(scores_V, [second(n) for n in range(SEEDS)])
        assert_drawn_from(zip(first, both, strict=True), expected)
    values_N = gumbel(3, 4, torch.arange(200_000))
    lag = torch.corrcoef(torch.stack([values_N[:-1], values_N[1:]]))[0, 1]
    assert abs(lag) < 5 / 200_000**0.5
    assert abs(values_N.mean() - 0.5772) < 5 * 1.2825 / 200_000**0.5


WARPERS = LogitsProcessorList([TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9)])
CONFIG = GenerationConfig(do_sample=True, temperature=1.3, top_k=20, top_p=0.9, max_new_tokens=10)
PROMPTS = [[1, 2, 3], [4] * 20, [5, 6, 5, 6, 5, 6, 5], [9], list(range(40))]


@pytest.mark.parametrize("max_rows", [1, 4])
@pytest.mark.parametrize("name", ["plain", "lookup", "small", "self", "auto"])
def test_output_is_a_function_of_prompt_and_seed(name: str, max_rows: int):
    model = tiny_model("llama")
    drafter = {
        "plain": Plain(),
        "lookup": PromptLookup(min_match=1, num_tokens=3),
        "small": SmallModel(tiny_model("llama", seed=1), num_tokens=2),
        "self": QuantizedSelf(num_tokens=3),
        "auto": Auto(),
    }[name]
    engine = Engine(model, drafter=drafter, max_rows=max_rows)
    generations = [engine.submit(Request(prompt=p, config=CONFIG, seed=seed)) for seed, p in enumerate(PROMPTS)]
    engine.run()
    assert [g.tokens for g in generations] == [
        sampled_by_hand(model, p, WARPERS, seed, 10) for seed, p in enumerate(PROMPTS)
    ]
    if name == "self":  # the noise couples: a draft that scores alike draws alike
        assert sum(g.stats.accepted for g in generations) > 0.8 * sum(g.stats.drafted for g in generations)


def test_without_a_seed_outputs_differ():
    engine = Engine(tiny_model("llama"), drafter=Plain())
    generations = [engine.submit(Request(prompt=PROMPTS[0], config=CONFIG)) for _ in range(2)]
    engine.run()
    assert generations[0].tokens != generations[1].tokens


@pytest.mark.parametrize("do_sample", [False, True])
def test_log_probabilities_are_the_targets_own(do_sample: bool):
    model, prompt = tiny_model("llama"), PROMPTS[2]
    config = GenerationConfig(do_sample=do_sample, max_new_tokens=9, temperature=0.7, repetition_penalty=1.5)
    engine = Engine(model, drafter=SmallModel(model, num_tokens=3))
    request = Request(prompt=prompt, config=config, seed=0, num_logprobs=3)
    generation, silent = engine.submit(request), engine.submit(Request(prompt=prompt, config=config, seed=0))
    none = engine.submit(Request(prompt=prompt, config=config, seed=0, num_logprobs=0))
    engine.run()
    assert silent.logprobs is None
    assert generation.tokens == silent.tokens == none.tokens
    assert [entry.top_ids for entry in none.logprobs] == [()] * 9
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + generation.tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = logits_TV.log_softmax(-1)
    assert len(generation.logprobs) == 9
    for logprobs_V, token, entry in zip(logprobs_TV, generation.tokens, generation.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
        top = logprobs_V.topk(3)
        assert entry.top_ids == tuple(top.indices.tolist())
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
