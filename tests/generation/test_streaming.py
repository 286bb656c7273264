"""A streamer sees exactly what plain decoding shows it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AsyncTextIteratorStreamer, PreTrainedModel, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.streaming import RoundStreamer, StreamFeed
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model

PROMPT = torch.tensor([list(b"to be")])
PROMPTS = torch.tensor([list(b"to be"), [0, 0, *b"or "], [0, *b"not "]])
GREEDY = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
TIMEOUT_S = 30.0


class Recording(BaseStreamer):
    """Keeps what it is given, and when it is told that that was all."""

    def __init__(self) -> None:
        self.puts: list[tuple[str, Any]] = []
        self.num_ends = 0

    def put(self, value: Tensor) -> None:
        assert self.num_ends == 0, "put after end"
        self.puts.append((f"{value.dtype} on {value.device}", value.tolist()))

    def end(self) -> None:
        self.num_ends += 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=5)


@pytest.fixture(params=["target", "PromptLookup", "Plain"])
def drafter(request: pytest.FixtureRequest, model: PreTrainedModel) -> Drafter:
    return {"target": SmallModel(model, num_tokens=6), "PromptLookup": PromptLookup(min_match=1), "Plain": Plain()}[
        request.param
    ]


def assert_streams_as_plain(model: PreTrainedModel, drafter: Drafter, input_ids: Tensor, **options: Any) -> None:
    plain, ours = Recording(), Recording()
    expected = model.generate(input_ids, streamer=plain, **GREEDY, **options)
    out = specdec.generate(model, input_ids, streamer=ours, drafter=drafter, **GREEDY, **options)
    assert torch.equal(out, expected)
    assert ours.puts == plain.puts
    assert ours.num_ends == plain.num_ends == 1


def test_one_row(model: PreTrainedModel, drafter: Drafter):
    assert_streams_as_plain(model, drafter, PROMPT)


def test_one_row_that_stops_inside_a_draft(model: PreTrainedModel, drafter: Drafter):
    eos = int(model.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] + 9])
    assert_streams_as_plain(model, drafter, PROMPT, eos_token_id=eos)


def test_a_batch_of_rows_that_stop_at_different_places(model: PreTrainedModel, drafter: Drafter):
    mask = (PROMPTS > 0).long()
    free = model.generate(PROMPTS, attention_mask=mask, **GREEDY)[:, PROMPTS.shape[1] :]
    eos = [int(row[place]) for row, place in zip(free, (3, 11, 25), strict=True)]
    assert_streams_as_plain(model, drafter, PROMPTS, attention_mask=mask, eos_token_id=eos)


def test_text_streamer(model: PreTrainedModel, drafter: Drafter, capsys: pytest.CaptureFixture[str]):
    tokenizer = ByteTokenizer()
    model.generate(PROMPT, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    expected = capsys.readouterr().out
    specdec.generate(model, PROMPT, streamer=TextStreamer(tokenizer, skip_prompt=True), drafter=drafter, **GREEDY)
    assert capsys.readouterr().out == expected != ""


def test_text_iterator_streamer_in_a_thread(model: PreTrainedModel, drafter: Drafter):
    def pieces(decode: Any, **options: Any) -> list[str]:
        streamer = TextIteratorStreamer(ByteTokenizer(), timeout=TIMEOUT_S)
        thread = threading.Thread(target=decode, kwargs={**GREEDY, **options, "streamer": streamer})
        thread.start()
        received = list(streamer)
        thread.join()
        return received

    expected = pieces(model.generate, inputs=PROMPT)
    assert pieces(specdec.generate, model=model, inputs=PROMPT, drafter=drafter) == expected
    assert len(expected) > 5


def test_async_text_iterator_streamer(model: PreTrainedModel, drafter: Drafter):
    async def pieces(decode: Any, **options: Any) -> list[str]:
        streamer = AsyncTextIteratorStreamer(ByteTokenizer(), timeout=TIMEOUT_S)
        decoding = asyncio.create_task(asyncio.to_thread(decode, **GREEDY, **options, streamer=streamer))
        received = [piece async for piece in streamer]
        await decoding
        return received

    expected = asyncio.run(pieces(model.generate, inputs=PROMPT))
    assert asyncio.run(pieces(specdec.generate, model=model, inputs=PROMPT, drafter=drafter)) == expected


def test_tokens_arrive_while_the_run_goes_on(model: PreTrainedModel):
    """A round's tokens are streamed before the next round's forward."""

    class Leaves(Exception):
        pass

    class LeavesAfter(Recording):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.puts) == 9:
                raise Leaves

    streamer, forwards = LeavesAfter(), []
    hook = model.register_forward_hook(lambda *_: forwards.append(len(streamer.puts)))
    with pytest.raises(Leaves):
        specdec.generate(model, PROMPT, streamer=streamer, drafter=Plain(), **GREEDY)
    hook.remove()
    assert forwards == list(range(1, 9))


def test_the_feed_waits_for_the_slowest_row_that_is_not_finished():
    streamer = Recording()
    feed = StreamFeed(streamer, num_rows=3, pad_token_id=0)
    feed.put(0, [1, 2, 3], False)
    feed.put(1, [4], True)
    feed.flush()
    assert streamer.puts == []
    feed.put(2, [5, 6], False)
    feed.flush()
    feed.put(2, [7], True)
    feed.put(0, [8], True)
    feed.flush()
    feed.end()
    assert [tokens for _, tokens in streamer.puts] == [[1, 4, 5], [2, 0, 6], [3, 0, 7], [8, 0, 0]]
    assert streamer.num_ends == 1


class RecordingRounds(RoundStreamer, Recording):
    """Keeps what it is told of rounds, and how many puts had come before."""

    def __init__(self) -> None:
        Recording.__init__(self)
        self.rounds: list[tuple[list[int], list[list[int]], list[int]]] = []
        self.num_puts_before: list[int] = []

    def put_round(self, rows: Any, tokens: Any, num_accepted: Any) -> None:
        self.rounds.append((list(rows), [list(row_tokens) for row_tokens in tokens], list(num_accepted)))
        self.num_puts_before.append(len(self.puts))


def test_a_round_streamer_is_told_which_tokens_were_drafted(model: PreTrainedModel):
    plain = model.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] :].tolist()
    wrong = (plain[6] + 1) % 250
    streamer = RecordingRounds()
    drafter = ScriptedDrafter([[plain[1:4]], [[plain[5], wrong]]])
    out = specdec.generate(model, PROMPT, streamer=streamer, drafter=drafter, **{**GREEDY, "max_new_tokens": 8})
    assert out[0, PROMPT.shape[1] :].tolist() == plain[:8]
    expected = [([plain[0]], 0), (plain[1:5], 3), (plain[5:7], 1), ([plain[7]], 0)]
    assert streamer.rounds == [([0], [tokens], [count]) for tokens, count in expected]
    assert streamer.num_puts_before == [1, 2, 6, 8], (
        "the prompt was put first; a round is told before its tokens are put"
    )
    assert len(streamer.puts) == 9


def test_a_draft_that_goes_past_the_stop_counts_up_to_it(model: PreTrainedModel):
    plain = model.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] :].tolist()
    stop = next(place for place in range(2, 9) if plain[place] not in plain[:place])
    streamer = RecordingRounds()
    drafter = ScriptedDrafter([[plain[1 : stop + 4]]])
    specdec.generate(model, PROMPT, streamer=streamer, drafter=drafter, eos_token_id=plain[stop], **GREEDY)
    assert streamer.rounds[1:] == [([0], [plain[1 : stop + 1]], [stop])]


def test_rounds_of_a_batch_name_the_unfinished_rows(model: PreTrainedModel, drafter: Drafter):
    mask = (PROMPTS > 0).long()
    free = model.generate(PROMPTS, attention_mask=mask, **GREEDY)[:, PROMPTS.shape[1] :]
    eos = [int(row[place]) for row, place in zip(free, (3, 11, 25), strict=True)]
    streamer = RecordingRounds()
    options = {**GREEDY, "attention_mask": mask, "eos_token_id": eos}
    out = specdec.generate(model, PROMPTS, streamer=streamer, drafter=drafter, return_dict_in_generate=True, **options)
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    num_accepted = 0
    for rows, tokens, accepted in streamer.rounds:
        assert all(0 <= count <= len(row_tokens) for count, row_tokens in zip(accepted, tokens, strict=True))
        num_accepted += sum(accepted)
        for row, row_tokens in zip(rows, tokens, strict=True):
            told[row] += row_tokens
    new = out.sequences[:, PROMPTS.shape[1] :].tolist()
    assert [row[: len(told[index])] for index, row in enumerate(new)] == list(told.values())
    assert all(token == 0 for index, row in enumerate(new) for token in row[len(told[index]) :])
    assert num_accepted <= out.stats.num_accepted
