"""Tokens that a grammar forces are drafted for nothing, and nothing that is said changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec.control import ForwardCosts
from specdec.drafters import Auto, Drafter, EarlyExit, Plain, PromptLookup, SmallModel
from specdec.drafters.auto import drafter as auto
from specdec.drafters.composite.forced import Forced
from specdec.engine import Engine
from specdec.testing import ByteTokenizer, tiny_model
from tests.support.engine_requests import alone, request_of, sampled_by_hand
from tests.support.references import with_noise

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
MODEL = tiny_model("llama", eos_token_id=EOS, pad_token_id=PAD)


class Frame(LogitsProcessor):
    """A grammar: two bytes of one's choice, then a text that is given, over and over.

    Args:
        lies: whether what it tells to be forced is wrong from its third token on.
    """

    def __init__(self, prompt_length: int, text: bytes = b"<fixed>", lies: bool = False):
        self._prompt_length, self._text, self._lies = prompt_length, list(text), lies

    def _rest(self, num_said: int) -> list[int]:
        place = num_said % (2 + len(self._text)) - 2
        return self._text[place:] if place >= 0 else []

    def forced_tokens(self, prefix: list[int]) -> list[int]:
        rest = self._rest(len(prefix) - self._prompt_length)
        return [*rest[:2], *(token + 1 for token in rest[2:])] if self._lies else rest

    def __call__(self, input_ids, scores):
        rest = self._rest(input_ids.shape[1] - self._prompt_length)
        if not rest:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(rest[:1]), 0.0)


class Silent(LogitsProcessor):
    """A grammar that tells nothing: what it leaves is a text over and over, which prompt lookup finds."""

    def __init__(self, prompt_length: int):
        self._frame = Frame(prompt_length, text=b"<a fixed text>")

    def __call__(self, input_ids, scores):
        return self._frame(input_ids, scores)


def drafters() -> dict[str, Drafter]:
    noisy = with_noise(MODEL)
    return {
        "plain": Plain(),
        "lookup": PromptLookup(num_tokens=3),
        "small": SmallModel(noisy, num_tokens=3),
        "exit": EarlyExit(exit_layer=1),
    }


def rows_of(prompts: list[bytes]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    rows = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


@pytest.mark.parametrize("name", drafters())
@pytest.mark.parametrize("lies", [False, True])
def test_greedy_output_is_that_of_transformers(name: str, lies: bool):
    """Ragged rows; also where what is told to be forced is not."""
    inputs = rows_of([b"a", b"hello there", b"hm hm"])
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    processors = LogitsProcessorList([Frame(inputs["input_ids"].shape[1], lies=lies)])
    expected = MODEL.generate(**inputs, **options, logits_processor=processors)
    out = specdec.generate(
        MODEL,
        **inputs,
        **options,
        logits_processor=processors,
        drafter=Forced(drafters()[name]),
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, expected)
    if not lies:
        assert out.stats.num_accepted >= 3 * 20, "three rows of three frames of seven tokens"
        assert out.stats.num_rounds < 30


@pytest.mark.parametrize("name", ["plain", "small"])
def test_sampling_under_forced_tokens_has_the_distribution_of_plain_decoding(name: str):
    """Of the two free bytes around a forced text, by a seeded chi-square test at one in a million."""
    from scipy.stats import chi2_contingency

    model = tiny_model("llama", vocab_size=4, eos_token_id=None, pad_token_id=0)
    prompts = torch.tensor([[1, 2, 3]]).repeat(400, 1)
    draft = with_noise(model)
    drafter = Forced({"plain": Plain(), "small": SmallModel(draft, num_tokens=2)}[name])
    counts = []
    for seed, options in ((1, {"drafter": Plain()}), (2, {"drafter": drafter})):
        processors = LogitsProcessorList([Frame(3, text=bytes([1, 0, 2]))])
        out = specdec.generate(
            model,
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=7,
            do_sample=True,
            top_k=0,
            logits_processor=processors,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )[:, 3:]
        assert (out[:, 2:5] == torch.tensor([1, 0, 2])).all()
        free = out[:, [0, 1, 5]]
        counts.append(torch.bincount(free[:, 0] * 16 + free[:, 1] * 4 + free[:, 2], minlength=64))
    table = torch.stack(counts)
    assert chi2_contingency(table[:, table.sum(0) > 4].numpy()).pvalue > 1e-6


@pytest.mark.parametrize("name", ["plain", "lookup", "small"])
def test_an_engine_drafts_what_each_request_forces(name: str):
    """Rows with a grammar beside rows without, and one that may not draft."""
    prompts = [list(b"a"), list(b"hello there"), list(b"hm hm"), list(b"no")]
    frames = [[Frame(len(prompt))] if index != 1 else [] for index, prompt in enumerate(prompts)]
    requests = [
        request_of(prompt, processors=frame, max_new_tokens=20, eos_token_id=EOS)
        for prompt, frame in zip(prompts, frames, strict=True)
    ]
    engine = Engine(MODEL, drafter=drafters()[name], max_rows=3)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(MODEL, request) for request in requests]
    for index in (0, 2, 3):
        assert generations[index].stats.accepted >= 12


def test_what_forced_tokens_cost_is_known_to_be_theirs(monkeypatch: pytest.MonkeyPatch):
    """Rows without a choice make a forward wider than what Auto has drafted for the others."""
    widths, noted = [0], []

    class Noting(ForwardCosts):
        def update(self, num_tokens: int, seconds: float) -> None:
            noted.append((num_tokens, widths[-1]))

    monkeypatch.setattr(auto, "costs_of", lambda model, num_rows=1: Noting({1: 1.0}))
    monkeypatch.setattr(auto, "_own_drafters", lambda run, auto: [])
    prompts = [list(b"hello there"), list(b"ab ab ab ab"), list(b"hm hm"), list(b"no")]
    frames = [[cls(len(prompt))] for cls, prompt in zip((Silent, Silent, Frame, Frame), prompts, strict=True)]
    requests = [
        request_of(prompt, processors=frame, max_new_tokens=60) for prompt, frame in zip(prompts, frames, strict=True)
    ]
    engine = Engine(MODEL, drafter=Auto(), max_rows=4)
    requests = [replace(request, max_drafted=1 if index < 2 else None) for index, request in enumerate(requests)]
    generations = [engine.submit(request) for request in requests]
    hook = MODEL.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine.run()
    hook.remove()
    assert [generation.tokens for generation in generations] == [alone(MODEL, request) for request in requests]
    assert len({width for _, width in noted}) > 2
    assert all(num_tokens == width for num_tokens, width in noted)


@pytest.mark.parametrize("name", ["plain", "lookup", "small"])
def test_what_an_engine_samples_is_a_function_of_the_seed_whatever_is_forced(name: str):
    """Token by token what one forward each and the seed's noise make of it; rows with a grammar beside rows without."""
    prompts = [list(b"a"), list(b"hello there"), list(b"hm hm"), list(b"no")]
    frames = [[Frame(len(prompt), lies=index == 2)] if index != 1 else [] for index, prompt in enumerate(prompts)]
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "eos_token_id": EOS}
    engine = Engine(MODEL, drafter=drafters()[name], max_rows=3)
    generations = [
        engine.submit(request_of(prompt, processors=frame, seed=seed, **options))
        for seed, (prompt, frame) in enumerate(zip(prompts, frames, strict=True))
    ]
    engine.run()
    for seed, (prompt, frame, generation) in enumerate(zip(prompts, frames, generations, strict=True)):
        assert generation.tokens == sampled_by_hand(MODEL, prompt, LogitsProcessorList(frame), seed, 20)
    assert all(generations[index].stats.accepted >= 10 for index in (0, 3))
