"""A long prompt does not stall those that decode: chunks are sized by what rounds and tokens take.

It did: 256 tokens were read between two rounds, whatever they took. On a small core that was three seconds for each of
eight chunks, between tokens that came every 20 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup
from specdec.engine import Engine, Request
from specdec.engine.chunking import LEAST, ChunkSizer
from specdec.kernels import native
from specdec.testing import tiny_model


def chunks_of(sizer: ChunkSizer, round_s: float, cost: Callable[[int], float], count: int = 30) -> list[int]:
    """Sizes of chunks beside rounds of that length, on a machine where chunks have that cost."""
    sizes = []
    for _ in range(count):
        sizer.update_round(round_s)
        sizes.append(sizer.size(is_decoding=True))
        sizer.update_chunk(sizes[-1], cost(sizes[-1]))
    return sizes


@pytest.mark.parametrize("token_s", [0.0002, 0.001, 0.004])
@pytest.mark.parametrize("fixed_s", [0.0, 0.02])
def test_a_chunk_takes_about_as_long_as_a_round(token_s: float, fixed_s: float):
    def cost(num_tokens: int) -> float:
        return fixed_s + token_s * num_tokens

    sizes = chunks_of(ChunkSizer(10_000), 0.1, cost)
    assert sizes[0] == LEAST
    assert all(1.5 <= cost(size) / 0.1 <= 1.7001 for size in sizes[-10:])
    assert max(map(cost, sizes)) <= 0.2


def test_there_is_always_some_progress():
    assert set(chunks_of(ChunkSizer(512), 0.001, lambda num_tokens: num_tokens)) == {LEAST}


def test_an_idle_machine_reads_as_much_as_it_may():
    sizer = ChunkSizer(512)
    assert sizer.size(is_decoding=False) == 512
    chunks_of(sizer, 0.01, lambda num_tokens: 0.001 * num_tokens)
    assert sizer.size(is_decoding=False) == 512


@pytest.mark.parametrize("most", [1, 5, 24])
def test_no_chunk_is_larger_than_asked_for(most: int):
    sizes = chunks_of(ChunkSizer(most), 1.0, lambda num_tokens: 0.001 * num_tokens)
    assert max(sizes) == most


def test_chunks_follow_a_machine_that_gets_slower():
    """Each token costs more the longer the context is, and other programs come and go."""
    sizer = ChunkSizer(10_000)
    before = chunks_of(sizer, 0.1, lambda num_tokens: 0.001 * num_tokens)[-1]
    after = chunks_of(sizer, 0.1, lambda num_tokens: 0.003 * num_tokens)[-1]
    assert (before, after) == (170, 56)


def test_one_disturbed_chunk_changes_nothing():
    sizer = ChunkSizer(10_000)
    (*_, before) = chunks_of(sizer, 0.1, lambda num_tokens: 0.001 * num_tokens)
    sizer.update_chunk(before, 5.0)
    assert sizer.size(is_decoding=True) == before


class Machine:
    """A clock that moves only while the model is at work: `row_s` a round, `token_s` a token of a prompt."""

    def __init__(self, round_s: float, token_s: float):
        self.now, self.round_s, self.token_s = 0.0, round_s, token_s
        self.chunks: list[int] = []

    def __call__(self) -> float:
        return self.now

    def work_in(self, engine: Engine) -> None:
        read, verify = engine._reader._model.read, engine._loop.target.verify

        def slow_read(tokens_BT):
            self.now += self.token_s * tokens_BT.shape[1]
            self.chunks.append(tokens_BT.shape[1])
            return read(tokens_BT)

        def slow_verify(*args):
            self.now += self.round_s
            return verify(*args)

        engine._reader._model.read, engine._loop.target.verify = slow_read, slow_verify
        engine._clock = self


def random_prompt(num_tokens: int) -> list[int]:
    return torch.randint(1, 200, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).tolist()


def request_of(prompt: list[int], num_new: int, **others: object) -> Request:
    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return Request(prompt=prompt, config=config, **others)


def test_long_prompts_beside_a_stream():
    """Tokens come at most 3 times as far apart, and the prompts take less than twice as long as they take alone."""
    machine = Machine(round_s=0.05, token_s=0.001)
    model = tiny_model("llama", max_position_embeddings=2048)
    engine = Engine(model, drafter=Plain())
    machine.work_in(engine)
    times: list[float] = []
    stream = engine.submit(request_of([5, 6, 7], 400, on_tokens=lambda _: times.append(machine.now)))
    for _ in range(10):
        engine.step()
    started = machine.now
    long, other = [engine.submit(request_of(random_prompt(count), 1)) for count in (1201, 601)]
    while not long.tokens:
        engine.step()
    assert machine.now - started < 2 * 1.2
    while not other.tokens:
        engine.step()
    assert machine.now - started < 2 * 1.8
    assert not stream.is_finished
    assert max(after - before for before, after in pairwise(times)) <= 3 * 0.05
    engine.close()


def test_rounds_that_read_along_show_what_a_token_adds():
    sizer = ChunkSizer(512)
    sizer.update_round(0.1)
    sizer.update_along(8, 0.1 + 8 * 0.002)
    assert sizer.size(is_decoding=True) == 12  # 85 tokens take 0.17 s, but a chunk grows by half at most
    for _ in range(15):
        sizer.update_along(85, 0.1 + 85 * 0.002)
    assert sizer.size(is_decoding=True) == 0  # let us see what a round takes by now
    sizer.update_round(0.1)
    assert sizer.size(is_decoding=True) == 85


def test_noise_that_hides_what_a_chunk_costs_does_not_make_the_next_one_huge():
    sizer = ChunkSizer(512)
    sizer.update_round(0.1)
    for _ in range(5):
        sizer.update_chunk(8, 0.0)
    assert sizer.size(is_decoding=True) == 12


def int8_model() -> PreTrainedModel:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", max_position_embeddings=2048, **sizes)
    return specdec.prepare(model, weights="int8")


@pytest.mark.skipif(native.library() is None, reason=native.describe())
@pytest.mark.parametrize("drafter", [Plain(), PromptLookup(num_tokens=3, min_match=1)], ids=["plain", "lookup"])
def test_int8_prompts_go_through_the_model_with_the_rounds(drafter: Drafter):
    """One forward for both: weights are read once. Nobody's tokens change, and no forward is run for prompts alone."""
    model = int8_model()
    requests = [request_of(random_prompt(length), 60) for length in (3, 150, 1, 90, 2, 33)]
    alone = []
    for request in requests:
        engine = Engine(model, drafter=Plain())
        alone.append(engine.submit(request))
        engine.run()
    engine = Engine(model, drafter=drafter, max_rows=4)
    assert engine._loop.target.can_read_along
    first = engine.submit(requests[0])
    engine.step()
    engine._reader._model.read = None  # called, it would fail
    others = [engine.submit(request) for request in requests[1:]]
    engine.run()
    for generation, expected in zip([first, *others], alone, strict=True):
        assert generation.finish_reason == "length"
        assert generation.tokens == expected.tokens
    assert engine._reader._model.num_forwards > 0, "they went along"


@pytest.mark.skipif(native.library() is None, reason=native.describe())
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_round_that_breaks_does_not_break_the_prompt_that_is_read_along(place: str):
    model = int8_model()
    request = request_of(random_prompt(60), 5)
    engine = Engine(model, drafter=Plain())
    expected = engine.submit(request)
    engine.run()
    engine = Engine(model, drafter=Plain())
    stream = engine.submit(request_of([5, 6, 7], 400))
    for _ in range(3):
        engine.step()
    generation = engine.submit(request)
    engine.step()

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    if place == "before":
        engine._loop.target.verify = broken
    else:
        engine._loop.accept = broken
    engine.step()
    assert stream.finish_reason == "error"
    engine.run()
    assert generation.tokens == expected.tokens


def test_a_long_prompt_alone_is_read_in_large_chunks():
    engine, machine = Engine(tiny_model("llama", max_position_embeddings=2048), drafter=Plain()), Machine(0.05, 0.001)
    machine.work_in(engine)
    engine.submit(request_of(random_prompt(1201), 1))
    engine.run()
    assert machine.chunks == [512, 512, 176]
