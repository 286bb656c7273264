"""`specdec serve`: a tour of the API with the real `openai` client, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "openai"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import jsonschema
import openai
from prometheus_client.parser import text_string_to_metric_families
from transformers import LogitsProcessorList

from specdec.server.grammar import Grammars, GrammarSource
from specdec.server.processors import RepetitionPenalties
from tests.support.serving import EOS, NAME, TOKENIZER, Running, chat_prompt, plain_ids, running, served_model, text_of

MODEL = served_model(max_position_embeddings=512)
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(MODEL, max_new_tokens=256) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0)


def ask(client: openai.OpenAI, **options: object):
    return client.chat.completions.create(**{"model": NAME, "messages": HELLO, "temperature": 0, **options})


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match=r"there is no model 'gpt-9' here: this server has 'tiny'"):
        client.models.retrieve("gpt-9")


def test_a_greedy_reply_is_that_of_transformers(client: openai.OpenAI):
    expected = plain_ids(MODEL, chat_prompt("hello"), 40)
    reply = ask(client, max_tokens=40)
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role) == (text_of(expected), "assistant")
    assert choice.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(chat_prompt("hello")), len(expected))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens_details.accepted_prediction_tokens >= 0
    assert reply.usage.completion_tokens_details.rejected_prediction_tokens >= 0
    assert (reply.model, reply.object) == (NAME, "chat.completion")


def test_a_conversation(client: openai.OpenAI):
    turns = ["hello", "who is there?", "me"]
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    messages[0]["content"] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    expected = text_of(plain_ids(MODEL, chat_prompt(*turns), 12))
    assert ask(client, messages=messages, max_completion_tokens=12).choices[0].message.content == expected
    developer = ask(client, messages=[{"role": "developer", "content": "brief"}, *HELLO], max_tokens=4)
    expected = plain_ids(MODEL, f"system: brief\n{chat_prompt('hello')}", 4)
    assert developer.choices[0].message.content == text_of(expected)


def test_a_stream_is_the_whole_in_parts(client: openai.OpenAI):
    whole = ask(client, max_tokens=60)
    chunks = list(ask(client, max_tokens=60, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    texts = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 3
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 60)
    assert all(part.usage is None for part in parts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client: openai.OpenAI):
    prompts = ["a rose is", "the cat"]
    expected = [text_of(plain_ids(MODEL, prompt, 16)) for prompt in prompts]
    one = client.completions.create(model=NAME, prompt=prompts[0], temperature=0)  # 16 tokens is the API's default
    assert [choice.text for choice in one.choices] == expected[:1]
    both = client.completions.create(model=NAME, prompt=prompts, temperature=0)
    assert [choice.text for choice in both.choices] == expected
    assert both.usage.prompt_tokens == len("".join(prompts))
    by_ids = client.completions.create(model=NAME, prompt=[list(prompts[0].encode())], temperature=0)
    assert by_ids.choices[0].text == expected[0]
    parts = list(client.completions.create(model=NAME, prompt=prompts, temperature=0, stream=True))
    for index in range(2):
        mine = [choice for part in parts for choice in part.choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == expected[index]
        assert mine[-1].finish_reason == "length"


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_is_cut_and_never_seen(client: openai.OpenAI, as_list: bool):
    text = ask(client, max_tokens=60).choices[0].message.content
    place = next(place for place in range(8, 40) if "\ufffd" not in text[place : place + 3])
    stop = text[place : place + 3]
    place = text.index(stop)
    stops = ["never said", stop] if as_list else stop
    reply = ask(client, max_tokens=60, stop=stops)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text[:place], "stop")
    assert reply.usage.completion_tokens < 60
    parts = [part.choices[0] for part in ask(client, max_tokens=60, stop=stops, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == text[:place]
    assert parts[-1].finish_reason == "stop"


def test_a_seed_and_n(client: openai.OpenAI):
    sampled = {"temperature": 1.0, "max_tokens": 12}
    first = ask(client, **sampled, seed=3, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [ask(client, **sampled, seed=3 + place).choices[0].message.content for place in range(3)] == texts
    assert first.usage.prompt_tokens == len(chat_prompt("hello"))
    assert first.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for part in ask(client, **sampled, seed=3, n=3, stream=True):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert streamed == texts


def test_top_p_and_top_k_leave_the_likeliest(client: openai.OpenAI):
    greedy = ask(client, max_tokens=12).choices[0].message.content
    for options in ({"top_p": 0}, {"extra_body": {"top_k": 1}}):
        assert ask(client, temperature=2, max_tokens=12, **options).choices[0].message.content == greedy


def test_penalties_and_biases(client: openai.OpenAI):
    prompt = chat_prompt("hello")
    penalties = RepetitionPenalties(presence=1.5, frequency=-1.0, prompt_length=len(prompt))
    expected = plain_ids(MODEL, prompt, 24, logits_processor=LogitsProcessorList([penalties]))
    assert expected != plain_ids(MODEL, prompt, 24)
    reply = ask(client, max_tokens=24, presence_penalty=1.5, frequency_penalty=-1.0)
    assert reply.choices[0].message.content == text_of(expected)
    biased = ask(client, max_tokens=5, logit_bias={str(ord("z")): 100})
    assert biased.choices[0].message.content == "zzzzz"


def test_logprobs(client: openai.OpenAI):
    prompt, ids = chat_prompt("hello"), plain_ids(MODEL, chat_prompt("hello"), 8)
    both = torch.tensor([[*prompt.encode(), *ids]])
    with torch.no_grad():
        expected_TV = MODEL(both).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    reply = ask(client, max_tokens=8, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert [entry.bytes for entry in content] == [[token] for token in ids]
    for entry, token, expected_V in zip(content, ids, expected_TV, strict=True):
        assert entry.logprob == pytest.approx(expected_V[token].item(), abs=1e-4)
        assert [top.bytes[0] for top in entry.top_logprobs] == expected_V.topk(3).indices.tolist()
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    parts = list(ask(client, max_tokens=8, logprobs=True, stream=True))
    streamed = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content])
    old = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=8, logprobs=2)
    logprobs = old.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([entry.logprob for entry in content])
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert (len(logprobs.tokens), logprobs.text_offset[0]) == (8, 0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_replies_in_json(client: openai.OpenAI, temperature: float):
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    reply = ask(client, max_tokens=200, temperature=temperature, seed=1, response_format=wanted)
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
    streamed = ask(client, max_tokens=200, temperature=temperature, seed=1, response_format=wanted, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in streamed)
    assert text == reply.choices[0].message.content
    if temperature == 0:
        prompt, grammars = chat_prompt("hello"), Grammars(TOKENIZER, [EOS])
        grammar = grammars.processor(grammars.compile(GrammarSource.of_schema(SCHEMA)), len(prompt))
        assert text == text_of(plain_ids(MODEL, prompt, 200, logits_processor=LogitsProcessorList([grammar])))


def test_any_object(client: openai.OpenAI):
    reply = ask(client, max_tokens=40, response_format={"type": "json_object"})
    assert reply.choices[0].message.content.lstrip().startswith("{")
    assert ask(client, max_tokens=4, response_format={"type": "text"}).choices[0].message.content


def test_errors_are_those_of_the_client_library(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="temperature: input should be less than or equal to 2") as caught:
        ask(client, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError, match="service_tier is not supported by this server"):
        ask(client, service_tier="flex")
    with pytest.raises(openai.BadRequestError, match="can have 512 tokens here") as caught:
        ask(client, messages=[{"role": "user", "content": "x" * 600}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_characters_are_whole_in_every_part(client: openai.OpenAI):
    """The model is made to say characters of several bytes, one byte a token and, as nothing is drafted, a round."""
    text = "é€😀" * 4
    wanted = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"const": text}}}
    plainly = {"extra_body": {"speculation": False}}
    parts = [
        part.choices[0].delta.content or "" for part in ask(client, response_format=wanted, stream=True, **plainly)
    ]
    assert json.loads("".join(parts)) == text
    assert len(parts) > 5
    assert not any("\ufffd" in part for part in parts)


def test_metrics(served: Running, client: openai.OpenAI):
    def read() -> dict[tuple[str, tuple[str, ...]], float]:
        answer = served.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.text)
        return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}

    before = read()
    ask(client, max_tokens=10)
    list(ask(client, max_tokens=10, stream=True))
    served.chat(temperature=9)
    served.http.get("/somewhere/else")
    after = read()

    def gained(name: str, *labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert gained("specdec_requests_total", "/v1/chat/completions", "200") == 2
    assert gained("specdec_requests_total", "/v1/chat/completions", "400") == 1
    assert gained("specdec_requests_total", "other", "404") == 1
    assert gained("specdec_generated_tokens_total") == 20
    assert gained("specdec_prompt_tokens_total") == 2 * len(chat_prompt("hello"))
    assert gained("specdec_time_to_first_token_seconds_count") == 2
    assert gained("specdec_time_per_token_seconds_count") == 2
    assert gained("specdec_unfinished_total") == 0
    assert gained("specdec_rounds_total") >= 2
    assert after["specdec_accepted_tokens_total", ()] <= after["specdec_drafted_tokens_total", ()]
    assert after["specdec_rows", ()] == after["specdec_queue_length", ()] == 0


def test_health(served: Running):
    assert served.http.get("/health").json() == {"status": "ok", "model": NAME}


def test_the_tokenizer_of_the_tests_spells_bytes():
    """What the log probabilities above take for granted."""
    assert TOKENIZER("hello", return_token_type_ids=False)["input_ids"] == list(b"hello")
