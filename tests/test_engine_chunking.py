"""A long prompt does not stall those that decode: chunks are sized by what rounds and tokens take.

It did: 256 tokens were read between two rounds, whatever they took. On a small core that was three seconds for each of
eight chunks, between tokens that came every 20 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig

from specdec.drafters import Plain
from specdec.engine import Engine, Request
from specdec.engine import engine as engine_module
from specdec.engine.chunking import LEAST, ChunkSizer
from specdec.testing import tiny_model


def chunks_of(sizer: ChunkSizer, round_s: float, cost: Callable[[int], float], count: int = 30) -> list[int]:
    """Sizes of chunks beside rounds of that length, on a machine where chunks have that cost."""
    sizes = []
    for _ in range(count):
        sizer.note_round(round_s)
        sizes.append(sizer.size(is_decoding=True))
        sizer.note_chunk(sizes[-1], cost(sizes[-1]))
    return sizes


@pytest.mark.parametrize("token_s", [0.0002, 0.001, 0.004])
@pytest.mark.parametrize("fixed_s", [0.0, 0.02])
def test_a_chunk_takes_about_as_long_as_a_round(token_s: float, fixed_s: float):
    def cost(num_tokens: int) -> float:
        return fixed_s + token_s * num_tokens

    sizes = chunks_of(ChunkSizer(10_000), 0.1, cost)
    assert sizes[0] == LEAST
    assert all(0.5 <= cost(size) / 0.1 <= 1.6 for size in sizes[5:])  # 1.5, down to a multiple of 8
    assert max(map(cost, sizes)) <= 0.25


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
    assert (before, after) == (144, 48)


def test_one_disturbed_chunk_changes_nothing():
    sizer = ChunkSizer(10_000)
    (*_, before) = chunks_of(sizer, 0.1, lambda num_tokens: 0.001 * num_tokens)
    sizer.note_chunk(before, 5.0)
    assert sizer.size(is_decoding=True) == before


class Machine:
    """A clock that moves only while the model is at work: `row_s` a round, `token_s` a token of a prompt."""

    def __init__(self, round_s: float, token_s: float):
        self.now, self.round_s, self.token_s = 0.0, round_s, token_s
        self.chunks: list[int] = []

    def __call__(self) -> float:
        return self.now

    def work_in(self, engine: Engine) -> None:
        read, verify = engine._reader.read, engine._loop.target.verify

        def slow_read(tokens_BT):
            self.now += self.token_s * tokens_BT.shape[1]
            self.chunks.append(tokens_BT.shape[1])
            return read(tokens_BT)

        def slow_verify(*args):
            self.now += self.round_s
            return verify(*args)

        engine._reader.read, engine._loop.target.verify = slow_read, slow_verify


def random_prompt(num_tokens: int) -> list[int]:
    return torch.randint(1, 200, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).tolist()


def request_of(prompt: list[int], num_new: int, **others: object) -> Request:
    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=0, pad_token_id=0)
    return Request(prompt=prompt, config=config, **others)


def test_long_prompts_beside_a_stream(monkeypatch: pytest.MonkeyPatch):
    """Tokens come at most 3 times as far apart, and the prompts take less than twice as long as they take alone."""
    machine = Machine(round_s=0.05, token_s=0.001)
    monkeypatch.setattr(engine_module, "perf_counter", machine)
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


def test_a_long_prompt_alone_is_read_in_large_chunks():
    engine, machine = Engine(tiny_model("llama", max_position_embeddings=2048), drafter=Plain()), Machine(0.05, 0.001)
    machine.work_in(engine)
    engine.submit(request_of(random_prompt(1201), 1))
    engine.run()
    assert machine.chunks == [512, 512, 176]
