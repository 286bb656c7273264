"""The engine: every request gets what it would get alone, whoever comes and goes beside it."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from specdec import CapacityError, DraftError, UnsupportedModelError, UnsupportedOptionError
from specdec.drafters import (
    Auto,
    Cascade,
    Drafter,
    EarlyExit,
    ForeignModel,
    Mixed,
    Plain,
    PromptLookup,
    QuantizedSelf,
    SmallModel,
)
from specdec.engine import Engine, Generation
from specdec.testing import tiny_model
from tests.support.engine_requests import REQUESTS, TOKENIZER, alone, expected, model_of, random_prompt, request_of
from trees import Fixed

DRAFTERS = ("plain", "lookup", "small", "tree", "self", "nested", "auto", "auto-small")


def drafter_of(name: str, target: PreTrainedModel) -> Drafter:
    noisy = tiny_model(target.config.model_type)
    with torch.no_grad():
        for number, parameter in enumerate(noisy.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.02 * noise)
    return {
        "plain": Plain(),
        "lookup": PromptLookup(num_tokens=3, min_match=1),
        "small": SmallModel(noisy, num_tokens=3),
        "tree": _Treed(SmallModel(noisy)),
        "self": QuantizedSelf(num_tokens=2),
        "nested": Cascade(SmallModel(noisy, num_tokens=3), QuantizedSelf(), num_tokens=5),
        "auto": Auto(),
        "auto-small": Auto(SmallModel(noisy)),
    }[name]


class _Treed(Drafter):
    """A drafter that grows trees where an engine asks for no shape."""

    def __init__(self, drafter: Drafter):
        self._drafter = drafter

    def start(self, run):
        return self._drafter.start(replace(run, tree=Fixed((2, 2, 1))))


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_request_gets_what_it_would_get_alone(name: str):
    engine = Engine(model_of(), drafter=drafter_of(name, model_of()), tokenizer=TOKENIZER, max_rows=3, prefill_chunk=8)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    assert [generation.tokens for generation in generations] == [expected(n) for n in range(len(REQUESTS))]
    assert engine.num_rows == engine.num_waiting == 0


@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("name", ["small", "auto"])
def test_families_with_windows_and_learnt_positions(family: str, name: str):
    model = model_of(family)
    engine = Engine(model, drafter=drafter_of(name, model), tokenizer=TOKENIZER, max_rows=4, prefill_chunk=8)
    numbers = (0, 2, 3, 1)
    generations = [engine.submit(REQUESTS[number]) for number in numbers]
    engine.run()
    assert [generation.tokens for generation in generations] == [expected(number, family) for number in numbers]


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(DRAFTERS),
    max_rows=st.integers(1, 4),
    prefill_chunk=st.sampled_from([1, 5, 64]),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, len(REQUESTS) - 1)),
            st.tuples(st.just("step"), st.integers(1, 4)),
            st.tuples(st.just("cancel"), st.integers(0, 20)),
        ),
        max_size=14,
    ),
)
def test_arrivals_and_cancellations_in_any_order(name, max_rows, prefill_chunk, events):
    model = model_of()
    engine = Engine(
        model, drafter=drafter_of(name, model), tokenizer=TOKENIZER, max_rows=max_rows, prefill_chunk=prefill_chunk
    )
    generations: list[tuple[int, Generation]] = []
    for kind, number in events:
        if kind == "submit":
            generations.append((number, engine.submit(REQUESTS[number])))
        elif kind == "step":
            for _ in range(number):
                engine.step()
        elif generations:
            engine.cancel(generations[number % len(generations)][1])
        engine._loop.target.cache.check_integrity()
    engine.run()
    for number, generation in generations:
        assert generation.error is None
        if generation.finish_reason == "cancelled":
            assert generation.tokens == expected(number)[: len(generation.tokens)]
        else:
            assert generation.tokens == expected(number)


def test_reasons_to_finish():
    engine = Engine(model_of(), drafter=Plain(), tokenizer=TOKENIZER)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    lengths = [request.config.max_new_tokens for request in REQUESTS]
    for generation, length in zip(generations, lengths, strict=True):
        assert generation.finish_reason == ("length" if len(generation.tokens) == length else "stop")
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}


def test_an_end_at_the_limit_is_a_stop():
    last = expected(0)[4]
    request = request_of(REQUESTS[0].prompt, max_new_tokens=5, eos_token_id=last)
    assert last not in expected(0)[:4]
    engine = Engine(model_of(), drafter=Plain())
    generation = engine.submit(request)
    engine.run()
    assert generation.tokens == expected(0)[:5]
    assert generation.finish_reason == "stop"


def test_callbacks_get_every_token_in_order_and_one_end():
    told: dict[int, list[int]] = {}
    ends: list[Generation] = []
    engine = Engine(model_of(), drafter=drafter_of("small", model_of()), tokenizer=TOKENIZER, max_rows=2)
    generations = []
    for number in range(4):
        told[number] = []
        heard = replace(REQUESTS[number], on_tokens=told[number].extend, on_finish=ends.append)
        generations.append(engine.submit(heard))
    engine.run()
    assert [told[number] for number in range(4)] == [expected(number) for number in range(4)]
    assert sorted(map(id, ends)) == sorted(map(id, generations))


def test_a_long_prompt_does_not_keep_others_waiting():
    engine = Engine(model_of(), drafter=Plain(), prefill_chunk=16)
    engine._clock = itertools.count().__next__  # a round takes as long as a chunk, however busy the machine is
    short = engine.submit(request_of(random_prompt(3), max_new_tokens=40))
    engine.step()
    long = engine.submit(request_of(random_prompt(161), max_new_tokens=3))
    while not long.tokens:
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) == before + 1
    assert 11 <= len(short.tokens) <= 21  # most chunks are of 16
    assert long.stats.prefill_seconds > 0


def test_shared_beginnings_are_read_once():
    model, system = model_of(), random_prompt(40)
    engine = Engine(model, drafter=Plain())
    prompts = [[*system, *random_prompt(7, seed)] for seed in range(3)]
    generations = [engine.submit(request_of(prompt)) for prompt in prompts]
    engine.run()
    assert [generation.stats.num_reused_tokens for generation in generations] == [0, 32, 32]
    assert [generation.tokens for generation in generations] == [alone(model, request_of(p)) for p in prompts]
    # what was written is known too: a conversation goes on where it stopped
    more = request_of([*prompts[0], *generations[0].tokens, 1, 2])
    generation = engine.submit(more)
    engine.run()
    assert generation.stats.num_reused_tokens == (len(prompts[0]) + 11) // 16 * 16
    assert generation.tokens == alone(model, more)


def test_memory_decides_who_is_admitted():
    engine = Engine(model_of(), drafter=Plain(), max_cached_tokens=100)
    with pytest.raises(CapacityError, match=r"90 tokens that may grow to 102 .* the 100 slots"):
        engine.submit(request_of(random_prompt(90)))
    generations = [engine.submit(request_of(random_prompt(20 + seed, seed))) for seed in range(5)]
    while engine.step():
        assert engine.num_rows <= 3  # of 32 slots and more
        assert engine.num_cached_tokens <= 100
    assert all(generation.finish_reason == "length" for generation in generations)


def test_a_full_queue_refuses():
    engine = Engine(model_of(), drafter=Plain(), max_rows=1, max_waiting=2)
    for _ in range(2):
        engine.submit(REQUESTS[0])
    with pytest.raises(CapacityError, match="2 requests wait"):
        engine.submit(REQUESTS[0])
    engine.step()
    assert (engine.num_rows, engine.num_waiting) == (1, 1)
    engine.submit(REQUESTS[0])


def test_cancelling_frees_at_once():
    engine = Engine(model_of(), drafter=drafter_of("auto-small", model_of()), max_rows=2, prefill_chunk=8)
    ends = []
    requests = [replace(REQUESTS[2], on_finish=ends.append) for _ in range(4)]
    running, reading, *waiting = [engine.submit(request) for request in requests]
    while not running.tokens:
        engine.step()
    engine.cancel(running)
    assert running.finish_reason == "cancelled"
    assert len(engine._loop.sequences) == engine._loop.target.cache.num_rows == 0
    for generation in (*waiting, reading):
        engine.cancel(generation)
        engine.cancel(generation)
    assert engine.num_rows == engine.num_waiting == 0
    assert ends == [running, *waiting, reading]
    assert not engine.step()
    assert not engine._loop.target.cache.layers[0].is_initialized


def test_a_callback_may_cancel_and_submit():
    engine = Engine(model_of(), drafter=Plain(), max_rows=4)
    other = engine.submit(REQUESTS[0])
    later: list[Generation] = []

    def interfere(tokens):
        engine.cancel(other)
        if not later:
            later.append(engine.submit(REQUESTS[1]))
        if len(generation.tokens) == 4:
            engine.cancel(generation)

    generation = engine.submit(replace(REQUESTS[2], on_tokens=interfere))
    engine.run()
    assert other.finish_reason == generation.finish_reason == "cancelled"
    assert generation.tokens == expected(2)[:4]
    assert later[0].tokens == expected(1)


class _BrokenProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 8:
            raise RuntimeError("a bug in somebody's grammar")
        return scores


class _BrokenCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 8:
            raise RuntimeError("a bug in somebody's criterion")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _NoNumbers(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, torch.nan if input_ids.shape[1] > 8 else 0.0)


@pytest.mark.parametrize("name", ["plain", "small"])
def test_an_error_of_one_request_is_its_own(name: str):
    engine = Engine(model_of(), drafter=drafter_of(name, model_of()), tokenizer=TOKENIZER)
    prompt = random_prompt(6)
    broken = [
        engine.submit(request_of(prompt, processors=[_BrokenProcessor()])),
        engine.submit(request_of(prompt, criteria=[_BrokenCriterion()])),
        engine.submit(request_of(prompt, processors=[_NoNumbers()])),
        engine.submit(request_of(prompt, processors=[_NoNumbers()], do_sample=True)),
    ]
    good = [engine.submit(request) for request in REQUESTS]
    engine.run()
    assert [generation.finish_reason for generation in broken] == ["error"] * 4
    assert "grammar" in str(broken[0].error)
    assert "not numbers" in str(broken[2].error)
    assert all(len(generation.tokens) < 4 for generation in broken)
    assert [generation.tokens for generation in good] == [expected(n) for n in range(len(REQUESTS))]


def test_a_callback_that_fails_ends_its_request():
    engine = Engine(model_of(), drafter=Plain())

    def fail(_):
        raise ConnectionError("the client has gone")

    generation = engine.submit(replace(REQUESTS[0], on_tokens=fail, on_finish=fail))
    other = engine.submit(REQUESTS[1])
    engine.run()
    assert generation.finish_reason == "error"
    assert isinstance(generation.error, ConnectionError)
    assert other.tokens == expected(1)


class _BreaksOnce(PromptLookup):
    """A drafter with a bug."""

    def start(self, run):
        session = super().start(run)
        propose = session.propose
        rounds = []

        def break_once(max_depths):
            rounds.append(1)
            if len(rounds) == 3 and not self.__dict__.setdefault("has_broken", False):
                self.has_broken = True
                raise IndexError("a bug in the drafter")
            return propose(max_depths)

        session.propose = break_once
        return session


def test_a_round_that_breaks_ends_its_rows_only():
    engine = Engine(model_of(), drafter=_BreaksOnce(), max_rows=2)
    generations = [engine.submit(REQUESTS[number]) for number in (0, 2, 3, 1)]
    engine.run()
    assert [generation.finish_reason for generation in generations] == ["error", "error", "length", "length"]
    assert isinstance(generations[0].error, IndexError)
    assert [generation.tokens for generation in generations[2:]] == [expected(3), expected(1)]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Mixed([PromptLookup(), SmallModel(model)]),
        lambda model: EarlyExit(exit_layer=1),
        lambda model: EarlyExit(),  # there were no rows to divide the time by
        lambda model: ForeignModel(model, TOKENIZER, TOKENIZER),
        lambda model: Auto(EarlyExit(exit_layer=1)),
    ],
)
def test_drafters_that_cannot_take_rows_are_refused_at_once(make):
    with pytest.raises(DraftError, match="cannot take rows that join"):
        Engine(model_of(), drafter=make(model_of()))


def test_other_vocabularies_are_refused_at_once():
    with pytest.raises(DraftError, match="vocabulary"):
        Engine(model_of(), drafter=SmallModel(tiny_model("llama", vocab_size=100)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, ValueError, "prompt is empty"),
        ({"prompt": "text"}, ValueError, "token ids"),
        ({"prompt": [1, 259]}, ValueError, "259 is outside"),
        ({"prompt": [0] * 257}, UnsupportedOptionError, "256 positions"),
        ({"config": {}}, ValueError, "GenerationConfig"),
        ({"config": GenerationConfig(num_beams=2)}, UnsupportedOptionError, "beam"),
        (
            {"config": GenerationConfig(do_sample=True, num_return_sequences=2)},
            UnsupportedOptionError,
            "submit several",
        ),
        ({"config": GenerationConfig(stop_strings=["x"])}, ValueError, "tokenizer"),
        (
            {"config": GenerationConfig(return_dict_in_generate=True, output_scores=True)},
            UnsupportedOptionError,
            "num_logprobs",
        ),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"num_logprobs": -1}, ValueError, "num_logprobs=-1"),
    ],
)
def test_what_is_refused_is_refused_at_submit(changes, error, message):
    engine = Engine(model_of(), drafter=Plain())
    with pytest.raises(error, match=message):
        engine.submit(replace(REQUESTS[0], **changes))
    assert engine.num_waiting == 0


def test_arguments_of_an_engine():
    for name in ("max_rows", "max_waiting", "max_cached_tokens", "prefill_chunk"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Engine(model_of(), **{name: 0})
    with pytest.raises(ValueError, match="drafter="):
        Engine(model_of(), drafter=3)
    with pytest.raises(UnsupportedModelError):
        Engine(tiny_model("llama", attn_implementation="flex_attention"))


def test_a_rotary_embedding_that_changes_is_not_crossed():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", rope_parameters=rope)
    engine = Engine(model, drafter=Plain())
    with pytest.raises(UnsupportedOptionError, match="changes its rotary embedding at 32"):
        engine.submit(request_of(random_prompt(40)))
    request = request_of(random_prompt(10))
    generation = engine.submit(request)
    engine.run()
    assert generation.tokens == alone(model, request)


def test_nothing_is_kept_of_what_is_done():
    engine = Engine(model_of(), drafter=drafter_of("auto", model_of()))
    generation = engine.submit(REQUESTS[0])
    engine.run()
    gone = weakref.ref(generation)
    del generation
    gc.collect()
    assert gone() is None


def test_statistics_of_a_request():
    engine = Engine(model_of(), drafter=SmallModel(model_of(), num_tokens=3))
    generation = engine.submit(request_of(random_prompt(9), max_new_tokens=12))
    engine.run()
    stats = generation.stats
    assert (stats.num_prompt_tokens, stats.rounds, stats.drafted, stats.accepted) == (9, 3, 9, 9)
    assert 0 <= stats.queued_seconds <= stats.first_token_seconds <= stats.seconds
