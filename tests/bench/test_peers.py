"""Who else decodes the prompts of `specdec bench`, and how it is told from specdec."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.building import Models, build_peers, llama_files
from specdec.bench.harness import BatchResult, Harness, Method, Settings, encode
from specdec.bench.peers import PeerSpec, choose_peers, llama_cpp
from specdec.bench.report import mismatches, summarise
from specdec.bench.running import Peer, Run
from specdec.drafters import Plain
from specdec.suites import Prompt, load_suite
from tests.support.references import with_noise

PROMPTS = [Prompt(text=text, category="few") for text in ("to be or not to be or not to", "one two one two")]


@pytest.fixture(scope="module")
def model(tiny: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny)


# Names


def test_a_bare_name_means_what_there_are_models_for() -> None:
    assert list(choose_peers("transformers", draft=None)) == ["transformers", "transformers/prompt-lookup"]
    assert list(choose_peers("transformers,llama.cpp", draft="small")) == [
        "transformers",
        "transformers/prompt-lookup",
        "transformers/assistant",
        "llama.cpp/plain",
        "llama.cpp/ngram-simple",
        "llama.cpp/draft",
    ]
    assert choose_peers(None, draft="small") == {}


def test_a_mode_brings_its_plain_decoding() -> None:
    peers = choose_peers("transformers/early-exit:exit_layer=8:num_tokens=3, llama.cpp/draft:n_max=4", draft="small")
    assert list(peers) == [
        "transformers",
        "transformers/early-exit:exit_layer=8:num_tokens=3",
        "llama.cpp/plain",
        "llama.cpp/draft:n_max=4",
    ]
    assert peers["llama.cpp/draft:n_max=4"].parameters == {"n_max": 4}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vllm", "unknown peer 'vllm'; choose from: transformers, llama.cpp"),
        ("transformers/medusa", "unknown mode of transformers 'medusa'; choose from: plain, prompt-lookup, assistant"),
        ("transformers/early-exit", "needs the layer at which it exits: transformers/early-exit:exit_layer=8"),
        ("transformers/early-exit:exit_layer=x", "exit_layer must be a whole number, got 'x'"),
        ("transformers/assistant", "transformers/assistant drafts with a smaller model: give it with --draft"),
        ("llama.cpp/draft", "llama.cpp/draft drafts with a smaller model: give it with --draft"),
        ("llama.cpp/ngram-mod:size_n=3", "has no parameter 'size_n'; it takes: n_match, n_min, n_max"),
    ],
)
def test_wrong_names_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_peers(name, draft=None)


# In the harness


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, peers: list[Method], **settings: Any
) -> tuple[list[BatchResult], Harness]:
    methods = [Method("plain", Plain()), *peers]
    harness = Harness(model, tokenizer, methods, Settings(max_new_tokens=12, repetitions=2, warmup=0, **settings))
    calls: list[None] = []
    expected = harness.num_calls(PROMPTS)
    results = list(harness.run(PROMPTS, on_call=lambda call: call.is_over and calls.append(None)))
    assert len(calls) == expected
    return results, harness


def test_transformers_modes_say_the_same_and_are_counted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    names = "transformers,transformers/assistant:num_tokens=3,transformers/early-exit:exit_layer=1"
    models = Models(target=model, tokenizer=tokenizer, draft=with_noise(model))
    peers = build_peers(choose_peers(names, draft="relative").values(), models, PROMPTS, 12)
    results, harness = run(model, tokenizer, peers)
    assert harness.missing == []
    assert not list(mismatches(results, of_peers=True))
    assert results[0].peers == {method.name for method in peers}
    reports = {report.name: report for report in summarise(results) if report.category == "all"}
    assert reports["transformers"].tokens_per_round is None
    assisted = reports["transformers/assistant:num_tokens=3"]
    assert 1 < assisted.tokens_per_round <= 4
    assert assisted.acceptance_rate is None
    assert assisted.draft_forwards_per_round is None
    for result in results:
        for one in result.runs[assisted.name]:
            counts = one.counts
            assert counts.num_new_tokens == one.num_tokens == 12
            assert len(set(one.token_seconds)) == counts.target_forwards == counts.num_rounds + 1
            assert counts.num_committed == sum(n * (accepted + 1) for accepted, n in counts.accepted_histogram.items())


def test_transformers_modes_take_one_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    models = Models(target=model, tokenizer=tokenizer)
    peers = build_peers(choose_peers("transformers", draft=None).values(), models, PROMPTS, 12)
    results, harness = run(model, tokenizer, peers, batch_size=2)
    assert list(results[0].runs) == ["plain", "transformers"]
    (missing,) = harness.missing
    assert (missing.name, missing.batch_size) == ("transformers/prompt-lookup", 2)
    assert "one prompt at a time" in missing.reason


def test_an_exit_must_be_below_the_last_layer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    spec = PeerSpec.parse("transformers/early-exit:exit_layer=2")
    with pytest.raises(ValueError, match="exit_layer must be from 1 to 1 for this model, got 2"):
        build_peers([spec], Models(target=model, tokenizer=tokenizer), PROMPTS, 12)


class Parrot(Peer):
    """Says prepared texts, one after the other; None fails."""

    family = "parrot"
    has_own_weights = True

    def __init__(self, *texts: str | None) -> None:
        self._texts: Iterator[str | None] = iter(texts)

    def decode(self, inputs: BatchEncoding, generation_kwargs: dict[str, Any]) -> Run:
        text = next(self._texts)
        if text is None:
            raise RuntimeError("no more crackers")
        return Run(seconds=1.0, tokens=[], token_seconds=[0.5] * len(text), text=text)


def test_a_family_with_weights_of_its_own_is_compared_with_itself(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    peers = [
        Method("parrot/plain", peer=Parrot("ab", "ab", "cd", "cd")),
        Method("parrot/draft", peer=Parrot("ab", "ab", "cd", "cx")),
    ]
    results, _ = run(model, tokenizer, peers)
    reports = {report.name: report for report in summarise(results) if report.category == "all"}
    assert (reports["parrot/plain"].identical_to_plain, reports["parrot/plain"].num_identical) == (True, 2)
    assert (reports["parrot/draft"].identical_to_plain, reports["parrot/draft"].num_identical) == (False, 1)
    assert reports["parrot/draft"].compared_with == "parrot/plain"
    assert not list(mismatches(results))
    (line,) = mismatches(results, of_peers=True)
    assert "parrot/draft differs from parrot/plain on few prompt 'one two" in line
    assert line.endswith("another text from character 1 on")


def test_a_peer_that_fails_is_left_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """It fails on the second prompt: the row over both prompts would be about another set of prompts than plain's."""
    results, harness = run(model, tokenizer, [Method("parrot", peer=Parrot("ab", "ab", "ab", None))])
    assert [list(result.runs) for result in results] == [["plain", "parrot"], ["plain"]]
    assert {report.name for report in summarise(results[:1])} == {"plain", "parrot"}
    assert {report.name for report in summarise(results)} == {"plain"}
    assert "RuntimeError: no more crackers" in harness.missing[0].reason


# llama.cpp


def piece(text: str, num_tokens: int, **more: Any) -> dict[str, Any]:
    timings = {"cache_n": 0, "predicted_n": num_tokens}
    return {"choices": [{"text": text}], "timings": timings | more.pop("timings", {}), **more}


USAGE = {"prompt_tokens": 3, "completion_tokens": 6}


def test_streamed_pieces_become_a_run() -> None:
    """The first token, a round of three, and one of two of which the last is the end of the sequence."""
    drafted = {"draft_n": 5, "draft_n_accepted": 3}
    last = piece("", 6, usage=USAGE, timings=drafted)
    stamped = [(0.5, "a", 1), (0.8, "b", 2), (0.81, "cd", 4), (0.9, "e", 5), (0.91, "", 6)]
    pieces = [(stamp, piece(text, num_tokens)) for stamp, text, num_tokens in stamped] + [(0.95, last)]
    run = llama_cpp._to_run(pieces, 1.0, num_prompt=3, is_plain=False)
    assert (run.text, run.num_tokens, run.seconds) == ("abcde", 6, 1.0)
    assert run.token_seconds == [0.5, 0.8, 0.8, 0.8, 0.9, 0.9]
    counts = run.counts
    assert (counts.num_rounds, counts.num_committed, counts.num_accepted, counts.num_drafted) == (2, 5, 3, 5)
    assert counts.target_forwards == 3


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_call_without_drafts_counts_its_rounds_unless_it_is_plain(is_plain: bool) -> None:
    pieces = [(0.5, piece("abcde", 5)), (0.6, piece("f", 6, usage=USAGE))]
    run = llama_cpp._to_run(pieces, 1.0, num_prompt=3, is_plain=is_plain)
    assert run.token_seconds == [0.5] * 5 + [0.6]
    assert run.counts is None if is_plain else (run.counts.num_rounds, run.counts.num_drafted) == (5, 0)


def test_an_answer_that_is_none_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="answered out of room"):
        llama_cpp._to_run([(0.1, {"error": "out of room"})], 1.0, num_prompt=3, is_plain=True)
    with pytest.raises(RuntimeError, match="was given 4 tokens and read"):
        llama_cpp._to_run([(0.5, piece("a", 6, usage=USAGE))], 1.0, num_prompt=4, is_plain=True)


def test_gguf_files_are_found_or_asked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "model.gguf"
    beside.touch()
    assert llama_cpp.find_gguf(None, str(tmp_path / "model")) == beside
    assert llama_cpp.find_gguf(None, str(beside)) == beside
    assert llama_cpp.find_gguf(None, str(tmp_path / "other")) is None
    with pytest.raises(ValueError, match="there is no file"):
        llama_cpp.find_gguf(tmp_path / "missing.gguf", None)
    peers = choose_peers("llama.cpp", draft=None).values()
    files = {"model": str(tmp_path / "other"), "draft": None, "gguf": None, "draft_gguf": None}
    if llama_cpp.xllamacpp is not None:
        with pytest.raises(ValueError, match="reads a GGUF file of the model: give it with --gguf"):
            llama_files(peers, **files)
    monkeypatch.setattr(llama_cpp, "xllamacpp", None)
    with pytest.raises(ValueError, match=r"pip install 'specdec-runtime\[peers\]'"):
        llama_files(peers, **files)
    with pytest.raises(ValueError, match="add it, or leave them out"):
        llama_files([], **(files | {"gguf": beside}))


@pytest.mark.slow  # with `make test-all`, which installs llama.cpp
@pytest.mark.network
def test_llama_cpp_decodes_the_demo_model(demo_folder: Path) -> None:
    """Plain and n-gram speculation say the same, and the n-grams of what is edited are found."""
    pytest.importorskip("xllamacpp")
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    peers = choose_peers("llama.cpp/ngram-simple:size_n=2:size_m=4", draft=None).values()
    llama = llama_files(peers, model="demo", draft=None, gguf=None, draft_gguf=None)
    models = Models(target=None, tokenizer=tokenizer, llama=llama)  # type: ignore[arg-type]  # not asked for anything
    prompts = load_suite().select(["edit"], limit=1).prompts
    plain, ngram = build_peers(peers, models, prompts, 16)
    inputs = encode(tokenizer, prompts)
    expected, drafted = (one.peer.decode(inputs, {"max_new_tokens": 16}) for one in (plain, ngram))
    assert drafted.text == expected.text
    assert drafted.num_tokens == expected.num_tokens == 16
    assert expected.counts is None
    assert drafted.counts.num_accepted > 0
    assert len(set(drafted.token_seconds)) == drafted.counts.num_rounds + 1
