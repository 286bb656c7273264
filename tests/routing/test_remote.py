"""Step-level routing where the target, the draft, or both are endpoints: every step is still its writer's.

The endpoint is a server of the standard library in a thread (`tests/support/completions_server.py`).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("openai", reason="the extra 'remote' is not installed")

import routers
import specdec
from routers import Arbitrage, DraftedStep, EarlyEscalation, Steps, TargetGrade, TargetLikelihood
from specdec import Endpoint, EndpointError, UnsupportedOptionError
from specdec.testing import ByteTokenizer, assert_same_tokens, random_prompts, tiny_model
from tests.support.completions_server import TOKENIZER, Completions, Fault, Spoken, saying
from tests.support.references import plain_alone, with_noise
from tests.support.routed_steps import NUM_NEW, PROMPTS, STEPS, Scripted, alternating, check_writers

ONE = random_prompts([9])
ENDLESS = ByteTokenizer(eos_token=None)
"""For models that never stop by themselves."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def draft(model: PreTrainedModel) -> PreTrainedModel:
    return with_noise(model, 0.03)


@pytest.fixture
def big(model: PreTrainedModel) -> Iterator[Completions]:
    spoken = Spoken(model)
    with Completions(spoken.answer, spoken.score).running() as server:
        yield server


@pytest.fixture
def small(draft: PreTrainedModel) -> Iterator[Completions]:
    spoken = Spoken(draft)
    with Completions(spoken.answer, spoken.score).running() as server:
        yield server


def at(server: Completions, **options) -> Endpoint:
    return Endpoint(server.url, **{"timeout": 20.0, "retries": 2, **options})


def routed(target, drafter, router, prompts: dict = PROMPTS, **options):
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "tokenizer": ENDLESS, **options}
    return specdec.generate(target, **prompts, drafter=drafter, router=router, return_dict_in_generate=True, **settings)


# whoever writes, and from where


@pytest.mark.parametrize("form", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("prompts", [PROMPTS, ONE], ids=["ragged", "one row"])
def test_full_escalation_is_the_target_alone(model, draft, big, form: str, prompts: dict):
    big.form = form
    out = routed(at(big), draft, routers.AlwaysTarget(steps=STEPS), prompts)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out.sequences, prompts["attention_mask"])
    assert not out.stats.is_lossy
    assert out.stats.target_requests >= len(out.stats.steps)
    assert out.stats.num_new_tokens == NUM_NEW * len(out.sequences)


def test_no_escalation_is_the_draft_alone(model, draft, small):
    out = routed(model, at(small), routers.AlwaysDraft(steps=STEPS))
    assert_same_tokens(draft, plain_alone(draft, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.target_forwards == 0
    assert out.stats.draft_requests >= len(out.stats.steps)


@pytest.mark.parametrize("peek", [None, 0, 2])
@pytest.mark.parametrize("remote", ["target", "draft", "both"])
def test_every_step_is_its_writers(model, draft, big, small, remote: str, peek: int | None):
    router = Scripted(alternating, peek=peek)
    out = routed(
        model if remote == "draft" else at(big), draft if remote == "target" else at(small), router, max_new_tokens=24
    )
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}
    check_writers(model, draft, out)


def test_a_rejected_step_of_a_remote_draft_is_a_draft_of_a_local_target(model, big):
    """The endpoint says what the target would: all of it is accepted."""
    out = routed(model, at(big), Scripted(lambda row, index: True), ONE)
    assert torch.equal(out.sequences, plain_alone(model, ONE, NUM_NEW))
    assert out.stats.num_accepted > 0.8 * NUM_NEW
    assert all(step.num_discarded == 0 for step in out.stats.steps)


def test_requests_are_the_text_so_far(model, draft, big):
    """Each begins with all of the one before, for the server's cache; greedy decoding is asked for as such."""
    out = routed(at(big), draft, routers.AlwaysTarget(steps=STEPS), ONE)
    streams = [request for request in big.requests if request.get("stream")]
    for before, after in itertools.pairwise(streams):
        assert after["prompt"][: len(before["prompt"])] == before["prompt"]
        assert len(after["prompt"]) > len(before["prompt"])
    assert {request["temperature"] for request in streams} == {0.0}
    assert {request["model"] for request in streams} == {"the-model"}
    assert max(request["max_tokens"] for request in streams) <= STEPS.max_tokens
    assert len(out.sequences[0]) == 9 + NUM_NEW


def test_sampling_is_asked_for_in_full(model, draft, big):
    """Servers have defaults of their own, so every value is sent; seeds follow torch's."""

    def seeds() -> list[int]:
        big.requests.clear()
        generator = torch.Generator().manual_seed(3)
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "generator": generator}
        routed(at(big), draft, routers.AlwaysTarget(steps=STEPS), ONE, **sampling)
        streams = [request for request in big.requests if request.get("stream")]
        assert {(item["temperature"], item["top_p"], item["top_k"], item["min_p"]) for item in streams} == {
            (0.7, 0.9, -1, 0.0)
        }
        return [item["seed"] for item in streams]

    first = seeds()
    assert len(set(first)) == len(first)
    assert seeds() == first


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 5}])
def test_a_server_that_refuses_what_it_does_not_know(model, draft, big, sampling: dict):
    big.form = "strict"
    prompts = TOKENIZER(["A problem."], return_tensors="pt", return_token_type_ids=False)
    out = routed(at(big), draft, routers.AlwaysTarget(steps=STEPS), prompts, max_new_tokens=8, **sampling)
    assert TOKENIZER.decode(out.sequences[0]).startswith("A problem.")
    assert out.stats.num_new_tokens == 8
    streams = [request for request in big.requests if request.get("stream")]
    assert {request.get("top_k") for request in streams} == {sampling.get("top_k") or None}


# texts


TEXT = "First, I add é and 1.\n\n```\na\n\nb\n```\n\nThen ☃ it is\n\n2."
STEPS_OF_TEXT = ["First, I add é and 1.\n\n", "```\na\n\nb\n```\n\n", "Then ☃ it is\n\n", "2."]


@pytest.mark.parametrize(("form", "prompts"), [("bare", "text"), ("bare", "ids"), ("llama.cpp", "text")])
def test_text_is_tokenized_here(model, form: str, prompts: str):
    asked = TOKENIZER(["A problem."], return_tensors="pt", return_token_type_ids=False)
    with Completions(saying(TEXT, "A problem."), form=form, eos=TOKENIZER.eos_token_id).running() as server:
        router = Scripted(lambda row, index: False, steps=Steps())
        out = routed(
            model, at(server, prompts=prompts), router, asked, max_new_tokens=99, eos_token_id=TOKENIZER.eos_token_id
        )
    assert [step.text.removesuffix("<|eos|>") for step in router.seen] == STEPS_OF_TEXT
    assert out.sequences[0, len("A problem.") :].tolist() == [*TEXT.encode(), TOKENIZER.eos_token_id]
    assert router.seen[-1].is_last
    assert all(isinstance(request["prompt"], str) == (prompts == "text") for request in server.requests)


def test_a_text_that_ends_without_an_end_token(model):
    """The call has none; the row ends all the same."""
    asked = TOKENIZER(["A problem."], return_tensors="pt", return_token_type_ids=False)
    with Completions(saying("Yes.", "A problem."), form="bare", eos=TOKENIZER.eos_token_id).running() as server:
        out = routed(model, at(server), routers.AlwaysDraft(), asked)
    assert TOKENIZER.decode(out.sequences[0]) == "A problem.Yes."


def test_a_server_that_writes_on_is_left(model, small):
    """Steps without separators end at their limit, and so does the request."""
    small.heeds_limit = False
    steps = Steps(separators=("no such text",), max_tokens=7)
    out = routed(model, at(small), routers.AlwaysDraft(steps=steps), ONE, max_new_tokens=28)
    assert [step.num_tokens for step in out.stats.steps] == [7, 7, 7, 7]
    streams = sum(1 for request in small.requests if request.get("stream"))
    time.sleep(0.2)
    assert small.num_sent < 28 + 40 * streams, "it still writes"


def test_stop_strings_and_criteria_are_applied_here(model, draft, small):
    plain = plain_alone(draft, ONE, NUM_NEW)
    eos = int(plain[0, -20])
    expected = draft.generate(**ONE, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=eos, pad_token_id=0)
    out = routed(model, at(small), routers.AlwaysDraft(steps=STEPS), ONE, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(out.sequences, expected)
    assert expected.shape[1] < plain.shape[1]


# what an endpoint can tell


def test_signals_are_the_endpoints(model, draft, small):
    small.form = "llama.cpp"
    router = Scripted(lambda row, index: False)
    router.needs = frozenset({"signals"})
    routed(model, at(small), router, ONE)
    last = router.seen[-1]
    num = len(last.tokens)
    text = torch.tensor([[*last.prompt, *(token for step in last.previous for token in step), *last.tokens]])
    p_TV = draft(text).logits[0, -num - 1 : -1].softmax(-1)
    chosen = p_TV.gather(1, text[0, -num:, None])[:, 0].log()
    torch.testing.assert_close(torch.from_numpy(last.signals.log_probs), chosen.detach(), atol=1e-4, rtol=1e-4)
    top = p_TV.topk(2).values
    margins = (top[:, 0] - top[:, 1]).detach()
    torch.testing.assert_close(torch.from_numpy(last.signals.margins), margins, atol=1e-4, rtol=1e-4)
    entropies = torch.special.entr(p_TV).sum(-1).detach().numpy()
    assert (last.signals.entropies <= entropies + 1e-4).all()
    assert (last.signals.entropies > 0.3 * entropies).all()


def test_nobody_is_asked_for_what_nobody_reads(model, small):
    small.form = "bare"
    routed(model, at(small), Scripted(lambda row, index: False), ONE)
    assert not any(request.get("logprobs") for request in small.requests if request.get("stream"))


class Asking(Scripted):
    needs = frozenset({"log_probs", "answers"})

    def decide(self, steps, target):
        self.log_probs, self.regrets = target.log_probs(steps), target.regrets(steps)
        self.answers = target.answers(steps, "good?", "it is ", ["\x00", "\x01", "\x02"])
        return super().decide(steps, target)


def test_a_remote_target_answers_as_a_local_one(model, draft, big):
    here, there = Asking(lambda row, index: False), Asking(lambda row, index: False)
    routed(model, draft, here, max_new_tokens=12)
    routed(at(big), draft, there, max_new_tokens=12)
    for name in ("log_probs", "regrets", "answers"):
        for expected, given in zip(getattr(here, name), getattr(there, name), strict=True):
            if not np.isnan(given).any():  # none of the choices is among the alternatives
                known = given > 0 if name == "answers" else slice(None)
                ratio = expected[known] / (expected[known].sum() if name == "answers" else 1)
                np.testing.assert_allclose(given[known], ratio, atol=1e-3)


def test_a_grade_that_the_server_does_not_list_is_none(model, draft, big):
    """Then the step is the target's, as wherever there is no score."""
    grade = TargetGrade(question="?", opening=".")
    out = routed(at(big), draft, routers.SelfScore(threshold=0, grade=grade, steps=STEPS), ONE, max_new_tokens=12)
    assert all(step.reason == "no score" for step in out.stats.steps if math.isnan(step.score))
    assert any(math.isnan(step.score) for step in out.stats.steps)


def test_an_oracle_of_two_endpoints(model, draft, big, small):
    out = routed(at(big), at(small), routers.Oracle(TargetLikelihood(), steps=STEPS), ONE)
    check_writers(model, draft, out, ONE)
    assert all(not math.isnan(step.score) for step in out.stats.steps)


class Untrained:
    needs = frozenset({"signals", "hidden"})

    def score(self, steps: Sequence[DraftedStep], target) -> list[float]:
        return [0.0] * len(steps)


@pytest.mark.parametrize(
    ("router", "form", "message"),
    [
        (Arbitrage(Untrained(), threshold=0.5), "vllm", "hidden states of the draft, which no endpoint gives"),
        (Arbitrage(routers.Shortfall(TargetLikelihood()), threshold=0.5), "llama.cpp", "probability of a given step"),
        (routers.Oracle(TargetLikelihood()), "strict", "probability of a given step"),
        (routers.SelfScore(threshold=5), "bare", "gives 0 of them"),
        (routers.RewardThreshold(TargetGrade(), threshold=0.5), "bare", "gives 0 of them"),
        (
            Arbitrage(routers.Shortfall(TargetGrade()), threshold=0.5, early=EarlyEscalation(entropy=1.0)),
            "bare",
            "gives 0 of them",
        ),
    ],
)
def test_a_router_that_needs_more_than_there_is(model, draft, big, small, router, form: str, message: str):
    big.form = small.form = form
    with pytest.raises(UnsupportedOptionError, match=message):
        routed(at(big), at(small), router)
    assert not any(request.get("stream") for request in [*big.requests, *small.requests]), "before any work"


def test_what_cannot_be_asked_of_an_endpoint(model, draft, big, small):
    with pytest.raises(ValueError, match="pass router="):
        specdec.generate(at(big), **ONE, drafter=draft)
    with pytest.raises(ValueError, match="a smaller model of the same tokenizer"):
        specdec.generate(model, **ONE, drafter=at(small))
    with pytest.raises(ValueError, match="pass tokenizer="):
        specdec.generate(at(big), **ONE, drafter=at(small), router=routers.AlwaysDraft())
    with pytest.raises(UnsupportedOptionError, match="RepetitionPenaltyLogitsProcessor cannot be sent"):
        routed(at(big), draft, routers.AlwaysDraft(), repetition_penalty=1.2)
    assert not [request for request in big.requests if request.get("stream")]


@pytest.mark.parametrize(
    "options",
    [{"prompts": "words"}, {"on_failure": "ignore"}, {"timeout": 0}, {"retries": -1}, {"max_parallel": 0}],
)
def test_endpoints_that_cannot_be(options: dict):
    with pytest.raises(ValueError, match=next(iter(options))):
        Endpoint("http://localhost:1/v1", **options)
    with pytest.raises(ValueError, match="such as 'http"):
        Endpoint("localhost:8000")


def test_the_tokenizer_is_another_one(model):
    asked = TOKENIZER(["A problem."], return_tensors="pt", return_token_type_ids=False)
    with Completions(saying("Yes.", "A problem.")).running() as server:
        server.shift = 1
        with pytest.raises(EndpointError, match="pass Endpoint\\(prompts='text'\\)"):
            routed(model, at(server), routers.AlwaysDraft(), asked)


# failures


FAULTS = [
    Fault("status", 500),
    Fault("status", 429),
    Fault("drop", 0),
    Fault("drop", 3),
    Fault("end", 2),
    Fault("garbage", 4),
    Fault("error", 1),
    Fault("stall", 2),
    Fault("html"),
    Fault("shape"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind} {fault.after}")
def test_a_request_that_fails_is_taken_up(model, draft, big, fault: Fault):
    """Once: the output is the same, and nothing that had come is asked for again."""
    big.faults.extend([None, fault])
    out = routed(at(big, timeout=0.5), draft, routers.AlwaysTarget(steps=STEPS), ONE)
    assert torch.equal(out.sequences, plain_alone(model, ONE, NUM_NEW))
    assert not big.faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", 500), "status 500"),
        (Fault("status", 401), "status 401"),
        (Fault("drop", 0), "has closed the connection"),
        (Fault("end", 0), "holds no completion"),
        (Fault("garbage", 0), "cannot be read"),
        (Fault("error", 0), "out of memory"),
        (Fault("stall", 0), "no answer within 0.5 s"),
        (Fault("html"), "holds no completion"),
        (Fault("shape"), "cannot be read"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_request_that_fails_for_good(model, draft, big, fault: Fault, message: str):
    big.faults.extend([None, None, *[fault] * 3])
    with pytest.raises(EndpointError, match=message) as raised:
        routed(at(big, timeout=0.5, retries=1), draft, routers.AlwaysTarget(steps=STEPS), ONE)
    partial = raised.value.partial
    length = partial.sequences.shape[1]
    assert 9 < length < 9 + NUM_NEW
    assert torch.equal(partial.sequences, plain_alone(model, ONE, NUM_NEW)[:, :length])
    assert partial.stats.num_new_tokens == length - 9
    assert sum(step.num_tokens for step in partial.stats.steps) == length - 9


def test_what_a_broken_stream_had_brought_is_part_of_what_is_left(model, draft, big):
    big.faults.extend([None, Fault("drop", 5), *[Fault("drop", 0)] * 2])
    with pytest.raises(EndpointError) as raised:
        routed(at(big, retries=1), draft, routers.AlwaysTarget(steps=Steps(max_tokens=8)), ONE)
    partial = raised.value.partial
    assert torch.equal(partial.sequences, plain_alone(model, ONE, 13))
    assert [(step.num_tokens, step.reason) for step in partial.stats.steps] == [(8, ""), (5, "broken off")]


@pytest.mark.parametrize("lost", ["draft", "target"])
def test_a_killed_endpoint(model, draft, big, small, lost: str):
    """What is left is a run's beginning: every step its writer's."""
    killed = {"draft": small, "target": big}[lost]
    killed.lives = 6
    with pytest.raises(EndpointError, match="cannot be reached") as raised:
        routed(at(big, retries=0), at(small, retries=0), Scripted(alternating))
    partial = raised.value.partial
    assert partial.stats.num_new_tokens > 0
    check_writers(model, draft, partial)


@pytest.mark.parametrize("peek", [None, 0, 3])
@pytest.mark.parametrize("lost", ["draft", "target", "remote draft of a local target"])
def test_the_other_writer_goes_on(model, draft, big, small, lost: str, peek: int | None):
    killed, reason = (big, "target lost") if lost == "target" else (small, "draft lost")
    killed.lives = 3
    options = {"retries": 0, "on_failure": "continue"}
    target = model if lost.startswith("remote") else at(big, **options)
    out = routed(target, at(small, **options), Scripted(alternating, peek=peek), max_new_tokens=24)
    assert out.stats.num_new_tokens == 4 * 24
    check_writers(model, draft, out)
    for row in range(4):
        steps = [step for step in out.stats.steps if step.row == row]
        rest = steps[[step.reason for step in steps].index(reason) :]
        assert {(step.writer, step.reason) for step in rest} == {("draft" if lost == "target" else "target", reason)}


def test_a_question_to_a_target_that_is_gone(model, draft, big):
    big.lives = 6
    endpoint = at(big, retries=0, on_failure="continue")
    out = routed(endpoint, draft, Asking(lambda row, index: True, peek=None), ONE)
    assert out.stats.steps[-1].reason == "target lost"
    check_writers(model, draft, out, ONE)


def test_when_both_are_gone(model, big, small):
    big.lives = small.lives = 4
    options = {"retries": 0, "on_failure": "continue"}
    with pytest.raises(EndpointError) as raised:
        routed(at(big, **options), at(small, **options), Scripted(alternating), ONE)
    assert raised.value.partial.stats.num_new_tokens > 0


def test_nobody_is_there(draft):
    started = time.perf_counter()
    with pytest.raises(EndpointError, match="cannot be reached") as raised:
        routed(Endpoint("http://127.0.0.1:9/v1", retries=0), draft, routers.AlwaysTarget())
    assert raised.value.partial is None
    assert time.perf_counter() - started < 10


def test_a_server_without_a_list_of_models(model, draft, big):
    big.models = None
    with pytest.raises(EndpointError, match="pass model="):
        routed(at(big), draft, routers.AlwaysTarget(steps=STEPS), ONE)
    out = routed(at(big, model="mine"), draft, routers.AlwaysTarget(steps=STEPS), ONE, max_new_tokens=8)
    assert torch.equal(out.sequences, plain_alone(model, ONE, 8))
    assert {request["model"] for request in big.requests} == {"mine"}


def test_the_key_is_sent_and_never_shown(draft, big, caplog, monkeypatch):
    key = "sk-quite-secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    endpoint = at(big, retries=0)
    big.faults.append(Fault("status", 403))
    with pytest.raises(EndpointError, match="you sent Bearer \\*\\*\\*") as raised:
        routed(endpoint, draft, routers.AlwaysTarget(steps=STEPS), ONE)
    assert big.keys == {f"Bearer {key}"}
    assert key not in f"{raised.value} {endpoint} {raised.value!r} {caplog.text}"
    assert "user:pass" not in repr(Endpoint("http://user:pass@localhost:1/v1"))


def test_an_interrupted_run_asks_no_more(model, draft, big):
    class Interrupt(Scripted):
        def decide(self, steps, target):
            if steps[0].index == 2:
                raise KeyboardInterrupt
            return super().decide(steps, target)

    with pytest.raises(KeyboardInterrupt):
        routed(at(big), draft, Interrupt(alternating))
    num_requests = len(big.requests)
    check_writers(model, draft, routed(at(big), draft, Scripted(alternating)))
    assert num_requests > 0


# a real server


@pytest.fixture(scope="module")
def llama_cpp(demo_folder: Path) -> Iterator[tuple[str, PreTrainedTokenizerBase]]:
    """llama.cpp's server with the demo model, and its tokenizer."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the extra 'peers' is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = f"{demo_folder}.gguf"
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 512, 1, 0, 0
    params.fit_params, params.cache_ram_mib, params.verbosity, params.warmup = False, 0, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1", AutoTokenizer.from_pretrained(demo_folder)
    del server  # until here, or nobody holds it


@pytest.mark.slow  # with `make test-all`, which installs llama.cpp
@pytest.mark.network
def test_llama_cpp(llama_cpp):
    """It writes both kinds of steps, so the text is its own, and says what it thought; it cannot score a given step."""
    url, tokenizer = llama_cpp
    prompts = tokenizer(["The capital of France is"], return_tensors="pt", return_token_type_ids=False)
    steps = Steps(max_tokens=5)
    router = Scripted(alternating, steps=steps)
    router.needs = frozenset({"signals"})
    options = {"tokenizer": tokenizer, "max_new_tokens": 16}
    out = routed(Endpoint(url), Endpoint(url), router, prompts, **options)
    assert tokenizer.decode(out.sequences[0]).startswith("The capital of France is Paris.")
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}
    alone = routed(Endpoint(url), Endpoint(url, prompts="text"), routers.AlwaysTarget(steps=steps), prompts, **options)
    assert torch.equal(out.sequences, alone.sequences)
    assert all(len(step.signals.log_probs) == len(step.tokens) for step in router.seen)
    assert all((step.signals.entropies > 0).all() for step in router.seen)
    with pytest.raises(UnsupportedOptionError, match="probability of a given step"):
        routed(Endpoint(url), Endpoint(url), routers.Oracle(TargetLikelihood()), prompts, **options)
