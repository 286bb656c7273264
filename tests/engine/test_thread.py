"""An engine in its own thread: many callers, no lost answers, nothing left running."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from specdec.drafters import Plain, PromptLookup
from specdec.engine import Engine, EngineThread
from tests.support.engine_requests import REQUESTS, TOKENIZER, alone, expected, model_of, random_prompt, request_of

SECONDS = 120
"""Far more than any wait here takes."""


def ask(thread: EngineThread, request) -> list[int]:
    done = threading.Event()
    generation = thread.submit(replace(request, on_finish=lambda _: done.set()))
    assert done.wait(SECONDS)
    assert generation.error is None
    return generation.tokens


def test_callers_from_many_threads():
    numbers = [number % len(REQUESTS) for number in range(24)]
    engine = Engine(model_of(), drafter=PromptLookup(), tokenizer=TOKENIZER, max_rows=5)
    with EngineThread(engine) as thread, ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda number: ask(thread, REQUESTS[number]), numbers))
    assert answers == [expected(number) for number in numbers]
    assert engine.num_rows == engine.num_waiting == 0


def test_it_sleeps_and_wakes():
    with EngineThread(Engine(model_of(), drafter=Plain())) as thread:
        for number in (0, 1):
            assert ask(thread, REQUESTS[number]) == expected(number)


def test_cancelling_from_another_thread():
    engine = Engine(model_of(), drafter=Plain(), max_rows=1)
    begun, done = threading.Event(), threading.Event()
    request = request_of(random_prompt(5), max_new_tokens=240)
    with EngineThread(engine) as thread:
        generation = thread.submit(replace(request, on_tokens=lambda _: begun.set(), on_finish=lambda _: done.set()))
        assert begun.wait(SECONDS)
        thread.cancel(generation)
        assert done.wait(SECONDS)
    assert generation.finish_reason == "cancelled"
    assert generation.tokens == alone(model_of(), request)[: len(generation.tokens)]


def test_closing_waits_for_what_is_under_way():
    thread = EngineThread(Engine(model_of(), drafter=Plain(), max_rows=1))
    generations = [thread.submit(REQUESTS[0]) for _ in range(3)]
    thread.close()
    assert [generation.tokens for generation in generations] == [expected(0)] * 3
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(REQUESTS[0])
    thread.close()


def test_closing_at_once_cancels():
    ends = []
    thread = EngineThread(Engine(model_of(), drafter=Plain(), max_rows=1))
    request = replace(request_of(random_prompt(5), max_new_tokens=240), on_finish=ends.append)
    generations = [thread.submit(request) for _ in range(3)]
    thread.close(0)
    assert {generation.finish_reason for generation in generations} == {"cancelled"}
    assert len(ends) == 3


def test_an_exception_in_the_block_does_not_wait():
    thread = EngineThread(Engine(model_of(), drafter=Plain()))
    generation = thread.submit(request_of(random_prompt(5), max_new_tokens=240))
    with pytest.raises(KeyError), thread:
        raise KeyError
    assert generation.is_finished


def test_the_thread_computes_with_as_many_threads_as_its_maker():
    seen = []
    with EngineThread(Engine(model_of(), drafter=Plain())) as thread:
        request = replace(REQUESTS[1], on_tokens=lambda _: seen.append(torch.get_num_threads()))
        ask(thread, request)
    assert set(seen) == {torch.get_num_threads()}
