"""Prefixes on disk: what was read once is known to the next process, and nothing else is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from specdec import prepare
from specdec.cli.chat.conversation import Conversation
from specdec.disk_cache.folders import PREFIXES
from specdec.drafters import Plain, PromptLookup
from specdec.engine import Engine, Generation
from specdec.errors import UnsupportedModelError
from specdec.kernels import native
from specdec.models import load
from specdec.testing import ByteTokenizer, tiny_model
from specdec.tree_model.prefix_files import BLOCK, PrefixFiles, TextFiles
from tests.support.commands import error_of, specdec_command
from tests.support.engine_requests import random_prompt, request_of
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import save_tiny_model, save_word_model

MAX_BYTES = 1 << 28
LONG = 2 * BLOCK + 44
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def save(folder: Path, family: str = "llama", seed: int = 0, **settings: object) -> str:
    tiny_model(family, seed=seed, max_position_embeddings=1024, **settings).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


def fresh(folder: str, weights: str | None = None) -> PreTrainedModel:
    """As a process that has just begun has it."""
    return prepare(load(folder, device="cpu", weights=weights).model, weights)


def run(model: PreTrainedModel, prompts: list[list[int]], max_bytes: int | None = MAX_BYTES, **options):
    """Generations of a batch: the last request is drawn."""
    drafter, num_rows = options.pop("drafter", "auto"), options.pop("max_rows", 4)
    engine = Engine(model, drafter=drafter, max_rows=num_rows, max_prefix_bytes=max_bytes, prefill_chunk=96)
    generations = [engine.submit(request_of(prompt, max_new_tokens=10)) for prompt in prompts[:-1]]
    generations.append(engine.submit(request_of(prompts[-1], max_new_tokens=10, do_sample=True, seed=5)))
    engine.run()
    assert all(generation.finish_reason == "length" for generation in generations)
    return generations


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def reused(generations: list[Generation]) -> list[int]:
    return [generation.stats.num_reused_tokens for generation in generations]


DOCUMENT = random_prompt(LONG, 1, vocab_size=250)
RAGGED = [
    [*DOCUMENT[: BLOCK + 40], 3, 1, 4],
    [*DOCUMENT, 7, 8],
    random_prompt(9, 2),
    [5, *DOCUMENT],
    [*DOCUMENT[: 2 * BLOCK], 9],
]
"""A part of the document, all of it, nothing, the same tokens elsewhere, whole blocks."""
KNOWN = [BLOCK, 2 * BLOCK, 0, 0, 2 * BLOCK]


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", None),
        ("mistral", None),
        ("gemma3_text", None),
        pytest.param("qwen3", "int8", marks=pytest.mark.skipif(native.library() is None, reason=native.describe())),
        pytest.param("llama", "int4", marks=pytest.mark.skipif(native.library() is None, reason=native.describe())),
    ],
)
def test_the_next_process_reads_the_rest_and_says_the_same(tmp_path, family, weights):
    wide = {**WIDE, "head_dim": 32} if weights and family == "qwen3" else WIDE if weights else {}
    folder = save(tmp_path, family, **wide)
    plain = fresh(folder, weights)
    expected = [tokens_of(run(plain, [prompt, [1]], None))[0] for prompt in RAGGED[:-1]]
    expected += tokens_of(run(plain, RAGGED[-1:], None))
    first = run(fresh(folder, weights), [DOCUMENT, [1]])
    assert reused(first) == [0, 0]
    assert len(PREFIXES.files()) == 2
    again = run(fresh(folder, weights), RAGGED, max_rows=5)
    assert reused(again) == KNOWN
    assert tokens_of(again) == expected
    # what has been read besides is kept too: of the fourth, whose tokens are those of the document
    assert len(PREFIXES.files()) == 4


def test_what_is_read_is_what_was_kept(tmp_path):
    folder = save(tmp_path, "mistral")
    model = fresh(folder)
    engine = Engine(model, drafter="auto", max_prefix_bytes=MAX_BYTES)
    kept = {}
    engine._keep = lambda tokens, states: kept.update(states=states.part(0, 2 * BLOCK))
    engine._loop.keep = engine._keep
    engine.submit(request_of(DOCUMENT, max_new_tokens=1))
    engine.run()
    states = PrefixFiles(fresh(folder), MAX_BYTES).of_text(DOCUMENT).extend(None)
    assert states is not None
    assert states.length == 2 * BLOCK
    for layer, own in zip(states.slots, kept["states"].slots, strict=True):
        assert all(map(torch.equal, layer, own))


def test_drafts_are_copied_from_what_was_not_read(tmp_path):
    folder = save(tmp_path)
    repeated = DOCUMENT[:BLOCK] * 3
    expected = tokens_of(run(fresh(folder), [repeated, [1]], None))
    run(fresh(folder), [repeated, [1]])
    again = run(fresh(folder), [repeated, [1]], drafter=PromptLookup())
    assert reused(again) == [2 * BLOCK, 0]
    assert tokens_of(again) == expected


@pytest.fixture
def a_decoding_row(tmp_path, monkeypatch):
    """An engine with a row that decodes, and what happens next: "read" of a file, tokens of that row."""
    folder, happened = save(tmp_path), list[object]()
    expected = tokens_of(run(fresh(folder), [[3, 1, 4], DOCUMENT]))
    engine = Engine(fresh(folder), drafter=Plain(), max_rows=3, max_prefix_bytes=MAX_BYTES)
    request = replace(request_of([3, 1, 4], max_new_tokens=10), on_tokens=happened.append)
    running = engine.submit(request)
    engine.step()
    read = TextFiles._read
    monkeypatch.setattr(TextFiles, "_read", lambda *arguments: (happened.append("read"), read(*arguments))[1])
    happened.clear()
    yield engine, happened
    engine.run()
    assert running.tokens == expected[0]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_others_decode_between_the_blocks_of_a_prompt(a_decoding_row, is_damaged):
    engine, happened = a_decoding_row
    if is_damaged:
        first = max(PREFIXES.files(), key=lambda file: file.stat().st_mtime_ns)
        first.write_bytes(damaged(first.read_bytes(), "flipped"))
    long = engine.submit(request_of(DOCUMENT, max_new_tokens=10, do_sample=True, seed=5))
    while not long.tokens:
        engine.step()
    reads = [index for index, what in enumerate(happened) if what == "read"]
    assert len(reads) == (1 if is_damaged else 2)
    assert all(isinstance(happened[index + 1], list) for index in reads), "a round comes after each"
    assert long.stats.num_reused_tokens == (0 if is_damaged else 2 * BLOCK)
    engine.run()
    assert long.tokens == tokens_of(run(engine.model, [DOCUMENT], None))[0]


def test_a_request_may_be_cancelled_while_its_prompt_is_loaded(a_decoding_row):
    engine, happened = a_decoding_row
    num_used = engine.num_cached_tokens
    long = engine.submit(request_of(DOCUMENT, max_new_tokens=10))
    engine.step()
    assert happened.count("read") == 1
    engine.cancel(long)
    assert long.finish_reason == "cancelled"
    assert engine.num_cached_tokens <= num_used + 1
    again = engine.submit(request_of(DOCUMENT, max_new_tokens=10))
    engine.run()
    assert again.tokens == tokens_of(run(engine.model, [DOCUMENT, [1]], None))[0]


def damaged(content: bytes, damage: str) -> bytes:
    flipped = bytearray(content)
    flipped[-70] ^= 1
    return {"flipped": bytes(flipped), "truncated": content[:-200], "empty": b""}[damage]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_told_of_and_made_again(tmp_path, caplog, damage):
    folder = save(tmp_path)
    expected = tokens_of(run(fresh(folder), [DOCUMENT, [1]]))
    contents = {file: file.read_bytes() for file in PREFIXES.files()}
    second = max(contents, key=lambda file: -file.stat().st_mtime_ns)  # the beginning was used last
    second.write_bytes(damaged(contents[second], damage))
    with caplog.at_level(logging.WARNING, "specdec"):
        again = run(fresh(folder), [DOCUMENT, [1]])
    assert [record.message.partition(" is damaged")[0] for record in caplog.records] == [str(second)]
    assert reused(again) == [BLOCK, 0]
    assert tokens_of(again) == expected
    assert {file: file.read_bytes() for file in PREFIXES.files()} == contents


def test_another_model_is_not_taken_for_it(tmp_path):
    folder = save(tmp_path)
    run(fresh(folder), [DOCUMENT, [1]])
    others = [fresh(folder, "int8"), load(folder, device="cpu", dtype="bfloat16").model]
    attention = fresh(folder)
    attention.set_attn_implementation("eager")
    settings = fresh(folder)
    settings.config.rms_norm_eps *= 2
    save(tmp_path, seed=3)
    for other in (*others, attention, settings, fresh(folder)):
        assert PrefixFiles(other, MAX_BYTES).of_text(DOCUMENT).extend(None) is None


def test_a_model_that_was_edited_has_no_files(tmp_path):
    folder = save(tmp_path)
    run(fresh(folder), [DOCUMENT, [1]])
    model = fresh(folder)
    files = PrefixFiles(model, MAX_BYTES)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert files.of_text(DOCUMENT).extend(None) is None
    with pytest.raises(UnsupportedModelError, match="has been changed since"):
        PrefixFiles(model, MAX_BYTES)


def test_models_whose_past_does_not_stay(tmp_path):
    with pytest.raises(UnsupportedModelError, match="was not loaded from a file"):
        Engine(tiny_model("llama"), max_prefix_bytes=MAX_BYTES)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    stretched = load(save(tmp_path, rope_parameters=rope), device="cpu").model
    with pytest.raises(UnsupportedModelError, match="changes its rotary embedding at"):
        PrefixFiles(stretched, MAX_BYTES)
    with pytest.raises(UnsupportedModelError, match="keeps states"):
        PrefixFiles(tiny_model("mamba", state_size=8, time_step_rank=4), MAX_BYTES)
    with pytest.raises(ValueError, match="max_prefix_bytes=0"):
        Engine(tiny_model("llama"), max_prefix_bytes=0)


def test_the_bound_holds_and_beginnings_stay(tmp_path):
    folder = save(tmp_path)
    run(fresh(folder), [DOCUMENT[: BLOCK + 9], [1]])
    size = PREFIXES.num_bytes()
    bound = 5 * size // 2
    texts = [random_prompt(4 * BLOCK, seed, vocab_size=250) for seed in (11, 12)]
    for text in texts:
        run(fresh(folder), [text, [1]], bound)
        assert size < PREFIXES.num_bytes() <= bound
    model = fresh(folder)
    known = [PrefixFiles(model, bound).of_text(text).extend(None) for text in (*texts, DOCUMENT)]
    assert [0 if states is None else states.length for states in known] == [0, 2 * BLOCK, 0]


def test_blocks_of_a_gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, size=256, types={})
    model = load(path, weights="gguf").model
    tokens = [token % 90 for token in DOCUMENT[:BLOCK]]
    text = PrefixFiles(model, MAX_BYTES).of_text(tokens)
    write_tiny_gguf(path, size=256, types={}, seed=1)
    other = PrefixFiles(load(path, weights="gguf").model, MAX_BYTES).of_text(tokens)
    assert len(text._names) == 1
    assert text._names != other._names


def reply(conversation: Conversation, text: str):
    return conversation.say(text, max_new_tokens=12, generation_kwargs={"do_sample": False}, show=lambda _: None)


@pytest.fixture
def words_folder(tmp_path) -> str:
    return save_word_model(tmp_path)


QUESTION = " ".join(["round", "tree", "token", "draft"] * 80)


def test_a_conversation_goes_on_in_the_next_process(words_folder):
    def converse(max_bytes: int | None, messages=()) -> Conversation:
        loaded = load(words_folder, device="cpu")
        return Conversation(loaded.model, loaded.tokenizer, messages=messages, max_prefix_bytes=max_bytes)

    first = converse(MAX_BYTES)
    assert reply(first, QUESTION).num_kept == 0
    plain = converse(None, first.messages)
    expected = [reply(plain, "tree"), reply(plain, "draft")]
    second = converse(MAX_BYTES, first.messages)
    actual = [reply(second, "tree"), reply(second, "draft")]
    assert [one.text for one in actual] == [one.text for one in expected]
    assert actual[0].num_kept == 2 * BLOCK
    assert actual[1].num_kept == expected[1].num_kept, "what is kept in memory is longer"
    # a text that begins as this one, in the middle of another conversation
    second.messages = []
    other = " ".join(QUESTION.split()[:200])
    assert reply(second, "tree").num_kept < BLOCK
    third = reply(second, other)
    assert reply(converse(None, second.messages[:-2]), other).text == third.text


def test_a_chat_begins_with_a_saved_conversation(words_folder, tmp_path):
    saved, options = tmp_path / "talk.json", ("-m", words_folder, "--prefix-cache", "0.2")
    first = specdec_command("chat", *options, "-n", "8", stdin=f"{QUESTION}\n/save {saved}\n")
    assert first.exit_code == 0, first.output
    assert len(PREFIXES.files()) == 2
    again = specdec_command("chat", *options, "--load", str(saved), stdin="tree\n/stats\n")
    plain = specdec_command("chat", *options[:2], "--load", str(saved), stdin="tree\n")
    assert again.stdout == plain.stdout != ""
    assert f"{2 * BLOCK} kept from before" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("chat", "--load", "talk.json", "--system", "x"), "--system is in the file that --load reads"),
        (("chat", "--load", "talk.json", "--sample", "--seed", "1"), "--sample is in the file that --load reads"),
        (("chat", "--load", "nowhere.json"), "nowhere.json"),
        (
            ("chat", "--url", "http://127.0.0.1:9", "--prefix-cache", "1"),
            "--prefix-cache is decided where the model is",
        ),
        (("serve", "--prefix-cache", "1", "--weights", "float", "--lora-modules", "a=b"), "--prefix-cache is for"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    command, *rest = options
    assert message in error_of(specdec_command(command, "-m", save_tiny_model(tmp_path), *rest))


def test_a_conversation_that_is_none_is_said_before_the_model_is_loaded(tmp_path):
    missing = str(tmp_path / "nowhere.json")
    assert missing in error_of(specdec_command("chat", "-m", str(tmp_path / "no-model"), "--load", missing))
