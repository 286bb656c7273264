"""How far each request drafts, and what it is told of its rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec.drafters import Auto, Drafter, SmallModel
from specdec.engine import Engine
from specdec.testing import tiny_model
from tests.support.engine_requests import REQUESTS, TOKENIZER, alone, expected, model_of, random_prompt, request_of

LIMITS = (0, 2, None)


@pytest.mark.parametrize("drafter", [SmallModel(model_of(), num_tokens=4), Auto(SmallModel(model_of()))])
def test_a_request_drafts_no_further_than_it_allows(drafter: Drafter):
    """Beside others that may draft more: what is said stays the same."""
    engine = Engine(model_of(), drafter=drafter, tokenizer=TOKENIZER, max_rows=3)
    numbers = range(len(REQUESTS))
    asked = [replace(REQUESTS[number], max_drafted=LIMITS[number % 3], keeps_rounds=True) for number in numbers]
    generations = [engine.submit(request) for request in asked]
    engine.run()
    assert [generation.tokens for generation in generations] == [expected(number) for number in numbers]
    for generation, request in zip(generations, asked, strict=True):
        stats, rounds = generation.stats, generation.rounds or []
        most = request.max_drafted
        assert all(most is None or max(round_.tree.depths, default=0) <= most for round_ in rounds)
        assert stats.rounds == len(rounds) == sum(stats.accepted_histogram)
        assert stats.drafted == sum(len(round_.tree) for round_ in rounds)
        assert stats.accepted == sum(len(round_.path) for round_ in rounds)
        assert stats.accepted == sum(count * times for count, times in enumerate(stats.accepted_histogram))
        place = 0
        for round_ in rounds:
            tokens = generation.tokens[place : place + round_.num_tokens]
            assert [round_.tree.tokens[node] for node in round_.path] == tokens[: len(round_.path)]
            place += round_.num_tokens
        assert place == len(generation.tokens)
    assert not generations[0].stats.drafted
    if isinstance(drafter, SmallModel):  # which has the target's own opinion
        assert generations[2].stats.accepted > 0


def test_rounds_are_kept_only_if_asked_for():
    engine = Engine(model_of(), drafter=SmallModel(model_of()), tokenizer=TOKENIZER)
    generation = engine.submit(REQUESTS[0])
    engine.run()
    assert generation.rounds is None
    assert generation.stats.accepted_histogram


def test_a_long_prompt_that_is_alone():
    """Once its draft model was asked about no token at all, while it still read the prompt, and the round failed."""
    model = tiny_model("llama", max_position_embeddings=2048)
    request = request_of(random_prompt(1300, 1), max_new_tokens=8)
    engine = Engine(model, drafter=SmallModel(model, num_tokens=2))
    generation = engine.submit(request)
    engine.run()
    assert generation.tokens == alone(model, request)
