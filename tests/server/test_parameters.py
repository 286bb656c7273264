"""Parameters of `specdec serve`: what asks for nothing is taken, what is beyond OpenAI's API is as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import torch

from tests.support.serving import NAME, TOKENIZER, Running, chat_prompt, plain_ids, running, served_model, text_of

MODEL = served_model(max_position_embeddings=512)
SHORT = {"max_tokens": 4, "temperature": 0}
EXPECTED = text_of(plain_ids(MODEL, chat_prompt("hello"), 4))


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(MODEL, max_new_tokens=256) as server:
        yield server


def body(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}], **SHORT, **options}


def refusal(served: Running, **options: Any) -> str:
    answer = served.chat(**options)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


IDLE: dict[str, list[Any]] = {
    "best_of": [1],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logprobs": [False, None],
    "metadata": [{}, {"trace": "1"}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "prompt_cache_key": ["key"],
    "prompt_cache_retention": ["in_memory"],
    "reasoning_effort": ["none"],
    "safety_identifier": ["someone"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "stream_options": [None, {}, {"include_usage": False}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "top_k": [0, -1],
    "min_p": [0],
    "repetition_penalty": [1],
    "user": ["someone"],
    "verbosity": ["medium"],
}
EFFECTIVE: dict[str, list[Any]] = {
    "best_of": [2, True],
    "function_call": [{"name": "f"}],
    "metadata": [{"trace": 1}, {"x" * 65: "1"}, {"x": "y" * 513}, {str(index): "" for index in range(17)}],
    "min_p": [-0.1, 1.1, "0.1"],
    "modalities": [["text", "audio"]],
    "reasoning_effort": ["high"],
    "repetition_penalty": [0, -1, 11],
    "service_tier": ["flex", "priority"],
    "store": [True],
    "stream_options": [{"include_usage": True}],
    "tool_choice": ["required", {"type": "function"}],
    "tools": [[{"type": "function"}]],
    "top_k": [-2, 1.5],
    "verbosity": ["low"],
}


def every(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), every(IDLE))
def test_what_asks_for_nothing_is_taken(served: Running, name: str, value: Any):
    for path, asked in (("/v1/chat/completions", body()), ("/v1/completions", {"prompt": chat_prompt("hello")})):
        if name == "top_logprobs" and "prompt" in asked:
            continue  # not of that request
        answer = served.http.post(path, json={"model": NAME, **asked, **SHORT, name: value})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == EXPECTED


@pytest.mark.parametrize(("name", "value"), every(EFFECTIVE))
def test_what_has_an_effect_is_refused_by_name(served: Running, name: str, value: Any):
    assert name in refusal(served, **{name: value})


def test_what_may_be_said_instead_is_told(served: Running):
    message = refusal(served, service_tier="flex")
    assert message == 'service_tier is not supported by this server: leave it out, or say "auto" or "default"'


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("penalty", [1.5, 0.6])
def test_a_repetition_penalty_is_that_of_transformers(served: Running, path: str, penalty: float):
    prompt = chat_prompt("hello")
    expected = plain_ids(MODEL, prompt, 24, repetition_penalty=penalty)
    assert expected != plain_ids(MODEL, prompt, 24)
    asked = body() if "chat" in path else {"prompt": prompt}
    options = {"max_tokens": 24, "temperature": 0, "repetition_penalty": penalty}
    (choice,) = served.http.post(path, json={"model": NAME, **asked, **options}).json()["choices"]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text_of(expected)


@pytest.mark.parametrize(
    "options", [{"min_p": 0.4}, {"top_k": 2}, {"min_p": 0.2, "top_k": 3, "repetition_penalty": 1.3}]
)
def test_sampling_is_among_what_transformers_leaves(served: Running, options: dict[str, Any]):
    """To every sampled token the processors of `model.generate` leave a probability; not all are greedy."""
    prompt, tokens = chat_prompt("hello"), set()
    for seed in range(6):
        answer = served.chat(max_tokens=8, temperature=2.0, seed=seed, logprobs=True, **options)
        content = answer.json()["choices"][0]["logprobs"]["content"]
        ids = [TOKENIZER.convert_tokens_to_ids(e["token"]) if len(e["bytes"]) > 1 else e["bytes"][0] for e in content]
        tokens.update(ids)
        for place, token in enumerate(ids):
            assert token in left_by_transformers([*prompt.encode(), *ids[:place]], **options), (place, token)
    assert len(tokens) > 1


def left_by_transformers(prefix: list[int], **options: Any) -> list[int]:
    out = MODEL.generate(
        torch.tensor([prefix]),
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **{"temperature": 2.0, "top_k": 0, **options},
    )
    return out.scores[0][0].isfinite().nonzero()[:, 0].tolist()


def test_seeded_sampling_takes_its_parameters_from_the_request(served: Running):
    """The likeliest token alone, by each of the three ways to say so."""
    greedy = served.chat(max_tokens=12, temperature=0).json()["choices"][0]["message"]["content"]
    for options in ({"top_k": 1}, {"min_p": 1.0}):
        reply = served.chat(max_tokens=12, temperature=2.0, seed=1, **options).json()
        assert reply["choices"][0]["message"]["content"] == greedy
