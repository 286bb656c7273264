"""Speculation stops at the token at which plain decoding stops, however far drafts run past it.

The drafts here come from the target itself, eight tokens at a time, so that every stop falls inside accepted ones.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

import specdec
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.testing import ByteTokenizer, tiny_model

NUM_NEW = 40
PROMPT = torch.tensor([list(b"the cat")])
PROMPTS = torch.tensor([list(b"the cat"), [0, 0, *b"a dog"], [0, 0, 0, 0, *b"owl"]])
MASKS = (PROMPTS > 0).long()
PRINTABLE = {"suppress_tokens": [*range(32), *range(127, 259)]}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=4)


@pytest.fixture(scope="module")
def continuation(model: PreTrainedModel) -> list[int]:
    """What the model says to `PROMPT` as printable text, token by token."""
    out = model.generate(PROMPT, max_new_tokens=NUM_NEW, do_sample=False, **PRINTABLE)
    return out[0, PROMPT.shape[1] :].tolist()


@pytest.fixture(params=["target", "PromptLookup", "Plain"])
def drafter(request: pytest.FixtureRequest, model: PreTrainedModel) -> Drafter:
    return {"target": SmallModel(model, num_tokens=8), "PromptLookup": PromptLookup(min_match=1), "Plain": Plain()}[
        request.param
    ]


def assert_stops_as_plain(model: PreTrainedModel, drafter: Drafter, num_new: int | None = None, **options: Any) -> None:
    """Compare with plain decoding of `PROMPT`, which should stop after `num_new` tokens."""
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, **PRINTABLE, **options}
    expected = model.generate(PROMPT, **options)
    if num_new is not None:
        assert expected.shape[1] == PROMPT.shape[1] + num_new
    assert torch.equal(specdec.generate(model, PROMPT, drafter=drafter, **options), expected)


def first_place(tokens: list[int], at_least: int) -> int:
    """Index of a token, not before `at_least`, that has not occurred earlier."""
    return next(place for place in range(at_least, len(tokens)) if tokens[place] not in tokens[:place])


# tokens and lengths


@pytest.mark.parametrize("at_least", range(0, 12, 2))
def test_eos_inside_a_draft(model: PreTrainedModel, drafter: Drafter, continuation: list[int], at_least: int):
    place = first_place(continuation, at_least)
    assert_stops_as_plain(model, drafter, place + 1, eos_token_id=continuation[place])


def test_a_list_of_eos_ids(model: PreTrainedModel, drafter: Drafter, continuation: list[int]):
    early, late = first_place(continuation, 5), first_place(continuation, 9)
    eos_token_id = [continuation[late], continuation[early], 258]
    assert_stops_as_plain(model, drafter, early + 1, eos_token_id=eos_token_id)


def test_eos_before_min_new_tokens_does_not_stop(model: PreTrainedModel, drafter: Drafter, continuation: list[int]):
    eos = continuation[first_place(continuation, 3)]
    assert_stops_as_plain(model, drafter, eos_token_id=eos, min_new_tokens=10)
    assert_stops_as_plain(model, drafter, eos_token_id=eos, min_length=PROMPT.shape[1] + 10)


@pytest.mark.parametrize("num_new", [1, 2, 8, 9, 10])
def test_the_length_limit(model: PreTrainedModel, drafter: Drafter, num_new: int):
    assert_stops_as_plain(model, drafter, num_new, max_new_tokens=num_new)
    assert_stops_as_plain(model, drafter, num_new, max_new_tokens=None, max_length=PROMPT.shape[1] + num_new)


def test_max_new_tokens_wins_over_max_length(model: PreTrainedModel, drafter: Drafter):
    assert_stops_as_plain(model, drafter, 7, max_new_tokens=7, max_length=PROMPT.shape[1] + 20)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_a_limit_that_the_prompt_has_passed(model: PreTrainedModel, drafter: Drafter):
    # one token is always written, and what is already longer than the limit does not run past it for ever
    limit = StoppingCriteriaList([MaxLengthCriteria(max_length=PROMPT.shape[1] - 2)])
    assert_stops_as_plain(model, drafter, num_new=1, stopping_criteria=limit)


def test_the_length_that_transformers_falls_back_on(model: PreTrainedModel, drafter: Drafter):
    assert_stops_as_plain(model, drafter, max_new_tokens=None)


def test_a_draft_meets_the_end_of_the_context(drafter: Drafter):
    """A model of 16 positions is not asked for a seventeenth, and the run ends where plain decoding ends."""
    small = tiny_model("llama", max_position_embeddings=16)
    options = {"max_new_tokens": 16 - PROMPT.shape[1] + 1, "do_sample": False}
    expected = small.generate(PROMPT, **options)
    assert torch.equal(specdec.generate(small, PROMPT, drafter=drafter, **options), expected)


# stop strings


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 2), (8, 3), (9, 4)])
def test_stop_strings(model: PreTrainedModel, drafter: Drafter, continuation: list[int], start: int, length: int):
    text = bytes(continuation).decode()
    wanted = text[start : start + length]
    num_new = text.index(wanted) + length
    assert_stops_as_plain(model, drafter, num_new, stop_strings=[wanted, "never"], tokenizer=ByteTokenizer())
    assert_stops_as_plain(model, drafter, num_new, stop_strings=wanted, tokenizer=ByteTokenizer())


@pytest.mark.parametrize("source", ["argument", "model"])
def test_stop_strings_from_a_generation_config(
    model: PreTrainedModel, continuation: list[int], source: str, monkeypatch: pytest.MonkeyPatch
):
    text = bytes(continuation).decode()
    wanted = text[9:12]
    config = GenerationConfig(stop_strings=[wanted], max_new_tokens=NUM_NEW, do_sample=False, **PRINTABLE)
    options: dict[str, Any] = {"tokenizer": ByteTokenizer()}
    if source == "argument":
        options["generation_config"] = config
    else:
        monkeypatch.setattr(model, "generation_config", config)
    expected = model.generate(PROMPT, **options)
    assert expected.shape[1] == PROMPT.shape[1] + text.index(wanted) + 3
    before = config.to_dict()
    assert torch.equal(specdec.generate(model, PROMPT, drafter=SmallModel(model, num_tokens=8), **options), expected)
    assert config.to_dict() == before


# criteria of the user's own


class StopAfter(StoppingCriteria):
    """Depends on the length alone."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.num_tokens)


class StopAtCall(StoppingCriteria):
    """Keeps what it was called with, and stops at its n-th call."""

    def __init__(self, last: int):
        self.last = last
        self.calls: list[tuple[list[list[int]], int | None]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.full((len(input_ids),), len(self.calls) >= self.last)


@pytest.mark.parametrize("num_new", [1, 5, 13])
def test_a_criterion_without_memory(model: PreTrainedModel, drafter: Drafter, num_new: int):
    criterion = StopAfter(PROMPT.shape[1] + num_new)
    assert_stops_as_plain(model, drafter, num_new, stopping_criteria=StoppingCriteriaList([criterion]))


@pytest.mark.parametrize("with_scores", [False, True])
def test_a_criterion_that_counts_sees_the_calls_of_plain_decoding(
    model: PreTrainedModel, drafter: Drafter, with_scores: bool
):
    options = {"max_new_tokens": NUM_NEW, "output_scores": with_scores, "return_dict_in_generate": with_scores}
    plain, ours = StopAtCall(11), StopAtCall(11)
    model.generate(PROMPT, stopping_criteria=StoppingCriteriaList([plain]), **options)
    specdec.generate(model, PROMPT, drafter=drafter, stopping_criteria=StoppingCriteriaList([ours]), **options)
    assert ours.calls == plain.calls
    assert len(plain.calls) == 11


def test_the_scores_that_a_criterion_sees_are_plain_ones(model: PreTrainedModel, drafter: Drafter):
    seen: list[list[Tensor]] = [[], []]

    def noting(into: list[Tensor]) -> StoppingCriteriaList:
        class Note(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
                into.append(torch.stack(scores))
                return torch.zeros(len(input_ids), dtype=torch.bool)

        return StoppingCriteriaList([Note()])

    options = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    model.generate(PROMPT, stopping_criteria=noting(seen[0]), **options)
    specdec.generate(model, PROMPT, drafter=drafter, stopping_criteria=noting(seen[1]), **options)
    torch.testing.assert_close(seen[1], seen[0])


def test_max_time_is_looked_at_for_every_token(model: PreTrainedModel, drafter: Drafter):
    assert_stops_as_plain(model, drafter, 1, max_time=1e-9)


def test_max_time_ends_a_slow_run(model: PreTrainedModel, drafter: Drafter):
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        out = specdec.generate(model, PROMPT, drafter=drafter, max_new_tokens=100, do_sample=False, max_time=0.3)
    finally:
        hook.remove()
    expected = model.generate(PROMPT, max_new_tokens=100, do_sample=False)
    num_tokens = out.shape[1]
    assert PROMPT.shape[1] < num_tokens < expected.shape[1]
    assert torch.equal(out, expected[:, :num_tokens])


# rows that stop at different places


def ragged_options(model: PreTrainedModel) -> dict[str, Any]:
    return {"attention_mask": MASKS, "max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, **PRINTABLE}


def test_rows_that_meet_eos_at_different_places(model: PreTrainedModel, drafter: Drafter):
    options = ragged_options(model)
    free = model.generate(PROMPTS, **options)[:, PROMPTS.shape[1] :]
    eos_token_id = [int(row[place]) for row, place in zip(free, (4, 11, 23), strict=True)]
    expected = model.generate(PROMPTS, eos_token_id=eos_token_id, **options)
    assert (expected[:, PROMPTS.shape[1] :] == 0).any(), "some row is padded"
    out = specdec.generate(model, PROMPTS, drafter=drafter, eos_token_id=eos_token_id, **options)
    assert torch.equal(out, expected)


def test_padding_falls_back_on_eos(model: PreTrainedModel, drafter: Drafter):
    options = {**ragged_options(model), "pad_token_id": None}
    free = model.generate(PROMPTS, **options)[:, PROMPTS.shape[1] :]
    options["eos_token_id"] = [int(free[0, 3]), int(free[1, 9])]
    expected = model.generate(PROMPTS, **options)
    assert torch.equal(specdec.generate(model, PROMPTS, drafter=drafter, **options), expected)


def test_rows_that_meet_a_stop_string_at_different_places(model: PreTrainedModel, drafter: Drafter):
    options = {**ragged_options(model), "eos_token_id": 258, "tokenizer": ByteTokenizer()}
    free = model.generate(PROMPTS, **options)[:, PROMPTS.shape[1] :].tolist()
    pieces = [row[place : place + 2] for row, place in zip(free, (2, 9, 17), strict=True)]
    options["stop_strings"] = [bytes(piece).decode() for piece in pieces]
    expected = model.generate(PROMPTS, **options)
    assert (expected[:, PROMPTS.shape[1] :] == 0).any(), "some row is padded"
    assert torch.equal(specdec.generate(model, PROMPTS, drafter=drafter, **options), expected)


class StopOnMultiple(StoppingCriteria):
    """Stops a row at a token that depends on the row's index and on its last two tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, -2:].sum(1) + torch.arange(len(input_ids))) % 7 == 0


def test_rows_that_a_criterion_stops_at_different_places(model: PreTrainedModel, drafter: Drafter):
    options = {**ragged_options(model), "eos_token_id": 258}
    options["stopping_criteria"] = StoppingCriteriaList([StopOnMultiple()])
    expected = model.generate(PROMPTS, **options)
    assert (expected[:, PROMPTS.shape[1] :] == 0).any(), "some row is padded"
    assert torch.equal(specdec.generate(model, PROMPTS, drafter=drafter, **options), expected)


def test_each_row_stops_as_it_does_alone(model: PreTrainedModel, drafter: Drafter):
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, **PRINTABLE}
    free = model.generate(PROMPTS, attention_mask=MASKS, **options)[:, PROMPTS.shape[1] :]
    options["eos_token_id"] = [int(row[place]) for row, place in zip(free, (4, 11, 23), strict=True)]
    together = specdec.generate(model, PROMPTS, attention_mask=MASKS, drafter=drafter, **options)
    for row, prompt, mask in zip(together, PROMPTS, MASKS, strict=True):
        alone = specdec.generate(model, prompt[mask.bool()].unsqueeze(0), drafter=drafter, **options)[0]
        new = alone[int(mask.sum()) :]
        padding = torch.zeros(together.shape[1] - PROMPTS.shape[1] - len(new), dtype=torch.long)
        assert torch.equal(row[PROMPTS.shape[1] :], torch.cat([new, padding]))
