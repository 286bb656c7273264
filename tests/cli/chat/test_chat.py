"""`specdec chat` with piped lines and for one prompt, on tiny models on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

import specdec
from specdec.cli.chat.commands import help_text
from tests.support.commands import CONTEXT_LENGTH, error_of, plain_text, specdec_command
from tests.support.tiny_models import save_tiny_model


def chat(folder: str, *lines: str, options: tuple[str, ...] = ("-n", "8")) -> Result:
    return specdec_command("chat", "-m", folder, *options, stdin="".join(f"{line}\n" for line in lines))


def brief_text(folder: str, prompt: str) -> str:
    """What transformers says after a prompt written by hand."""
    return plain_text(folder, prompt, max_new_tokens=8, raw=True)


def hello(folder: str) -> str:
    return brief_text(folder, "user: hello\nassistant: ")


def test_the_history_is_kept(tiny: str) -> None:
    first = hello(tiny)
    second = brief_text(tiny, f"user: hello\nassistant: {first}\nuser: again\nassistant: ")
    result = chat(tiny, "hello", "", "again")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr.count("tokens per round") == 2


def test_commands(tiny: str) -> None:
    plain, brief = hello(tiny), brief_text(tiny, "system: Be brief.\nuser: hello\nassistant: ")
    edited = brief_text(tiny, "user: bye\nassistant: ")
    lines = ("/regen", "hello", "/regen", "/clear", "/system Be brief.", "hello", "/system", "/regen", "/edit bye")
    result = chat(tiny, *lines, "/dance", "/clear all", "/load", "/edit", "/show", "/help", "/exit", "never read")
    assert result.stdout == "".join(f"{text}\n" for text in (plain, plain, brief, plain, edited))
    assert result.stderr.count("the same, because decoding is greedy") == 1
    for message in (
        "error: nothing has been said yet",
        "conversation forgotten",
        "system prompt set",
        "system prompt removed",
        "error: unknown command /dance",
        "error: /clear takes nothing after it, got 'all'",
        "error: /load needs its FILE",
        "error: the message cannot be edited here: /edit TEXT",
        "error: replies do not go to a terminal that shows styles",
        "/system [TEXT]           set the system prompt",
    ):
        assert message in result.stderr


def test_the_help_fits_a_terminal() -> None:
    assert max(map(len, help_text().splitlines())) < 80


def test_a_message_of_two_lines_and_one_that_starts_with_a_slash(tiny: str) -> None:
    result = chat(tiny, "hel\\", "lo", "/clear", "//hello")
    expected = [brief_text(tiny, f"user: {text}\nassistant: ") for text in ("hel\nlo", "/hello")]
    assert result.stdout == "".join(f"{text}\n" for text in expected)


def test_a_message_in_three_quotes(tiny: str) -> None:
    result = chat(tiny, '"""hel', "", 'lo"""', "/clear", '"""hello"""')
    expected = [brief_text(tiny, f"user: {text}\nassistant: ") for text in ("hel\n\nlo", "hello")]
    assert result.stdout == "".join(f"{text}\n" for text in expected)


@pytest.mark.parametrize("alias", ["/bye", "/quit", "/q"])
def test_commands_of_other_chats(tiny: str, alias: str) -> None:
    result = chat(tiny, "/?", alias, "never read")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "/help" in result.stderr


def test_the_model_is_named_as_an_argument(tiny: str) -> None:
    result = specdec_command("chat", tiny, "-n", "8", "-p", "hello")
    assert result.stdout == f"{hello(tiny)}\n"
    assert "there are two models" in error_of(specdec_command("chat", tiny, "-m", tiny, "-p", "hello"))


def test_a_model_that_is_meant_to_sample_does(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "sampling")
    file = Path(folder) / "generation_config.json"
    config = json.loads(file.read_text()) | {"do_sample": True, "temperature": 0.7}
    file.write_text(json.dumps(config))
    sampled = chat(folder, "/set")
    assert "sample          on\ntemperature     default\n" in sampled.stderr
    greedy = specdec_command("chat", folder, "-n", "8", "--greedy", "-p", "hello")
    assert greedy.stdout == f"{hello(folder)}\n"
    assert "exclude each other" in error_of(specdec_command("chat", folder, "--greedy", "--sample", "-p", "hello"))


def test_one_prompt(tiny: str) -> None:
    by_hand = "system: Be brief.\nuser: hello\nassistant: "
    for options, stdin in ((("--prompt", "hello"), "never read"), (("-p", "-"), "hello\n")):
        result = specdec_command("chat", "-m", tiny, "-n", "8", "--system", "Be brief.", *options, stdin=stdin)
        assert result.exit_code == 0, result.output
        assert result.stdout == brief_text(tiny, by_hand) + "\n"
        assert "tokens per round" in result.stderr


def test_one_prompt_stopped_before_its_reply(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(specdec, "generate", interrupted, raising=False)
    result = specdec_command("chat", "-m", tiny, "--prompt", "hello")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "stopped before the first token" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "hello", "--drafter", "small-model"], "give it with --draft"),
        (["--prompt", "hello", "--top-p", "0.5"], "--top-p needs --sample"),
        (["--prompt", "hello", "--sample", "-t", "0"], "temperature is a number above 0, got 0.0"),
    ],
)
def test_wrong_options(tiny: str, options: list[str], message: str) -> None:
    assert message in error_of(specdec_command("chat", "-m", tiny, *options))


def test_a_model_without_a_template(tiny_without_template: str) -> None:
    assert "specdec generate --raw" in error_of(chat(tiny_without_template, "hello"))


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tiny: str) -> None:
    long = "x" * (CONTEXT_LENGTH // 2)
    result = chat(tiny, long, long, "short", options=("-n", "4"))
    assert result.exit_code == 0, result.output
    assert "the context is full: forgot the oldest 2 messages" in result.stderr


def test_a_message_longer_than_the_context(tiny: str) -> None:
    result = chat(tiny, "x" * CONTEXT_LENGTH, "hello")
    assert "error: the message is too long" in result.stderr
    assert result.stdout == hello(tiny) + "\n"


def test_an_error_of_the_device_leaves_the_conversation(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, num_calls = specdec.generate, 0

    def fails_first(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(specdec, "generate", fails_first, raising=False)
    result = chat(tiny, "lost", "hello")
    assert "error: out of memory" in result.stderr
    assert result.stdout == hello(tiny) + "\n"


def test_settings(tiny: str) -> None:
    sampled = ("/clear", "/set seed 3", "hello")
    lines = ("/set top_k 5", "/set sample on", "/set max_new_tokens 5", "/set temperature 2", *sampled, *sampled)
    refused = ("/set top_p 2", "/set temperature nan", "/set seed -1", "/set max_new_tokens many", "/set mood good")
    result = chat(tiny, *lines, *refused, "/set mood", "/set", "/set sample off", "/set", "/set temperature")
    first, second = result.stdout[: len(result.stdout) // 2], result.stdout[len(result.stdout) // 2 :]
    assert first == second != ""
    for message in (
        "error: top_k has no effect on greedy decoding: /set sample on first",
        "error: top_p is a number above 0, at most 1, got 2.0",
        "error: temperature is a number above 0, got nan",
        "error: seed is a whole number, 0 or more, got -1",
        "error: max_new_tokens is a positive whole number, got 'many'",
        "temperature     2.0\ntop_p           default\n",
        "sample          off\ntemperature     default\n",
        "cut at the limit",
    ):
        assert message in result.stderr
    assert result.stderr.count("error: there is no setting 'mood'; choose from: max_new_tokens, sample") == 2


def test_stats_tell_what_was_read(words: str) -> None:
    result = chat(words, "/stats", "ba be", "bi bo", "/stats", "/draft plain", "/stats")
    assert "error: there is no reply yet" in result.stderr
    # kept: "user: ba be assistant:" and 7 of the 8 words said; read: the last of these, "user: bi bo assistant:"
    assert "its prompt    5 tokens read, 11 kept from before; first token after" in result.stderr
    assert "4 messages; the states of 23 tokens are kept, the context has 8192" in result.stderr
    assert "all replies   2: 16 tokens at" in result.stderr
    assert "drafter plain" in result.stderr


def test_saved_and_loaded(tiny: str, tmp_path: Path) -> None:
    first = chat(tiny, "/set sample on", "/set seed 5", "/set sample off", "hello", f"/save {tmp_path}/talk", "/save")
    assert first.stderr.count(f"saved 2 messages to {tmp_path}/talk.json") == 2
    document = json.loads((tmp_path / "talk.json").read_text())
    assert document["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": hello(tiny)},
    ]
    assert document["settings"]["max_new_tokens"] == 8
    assert document["drafter"] == "auto"
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]

    again = chat(tiny, "/save", "hello", f"/save {tmp_path}/talk", f"/load {tmp_path}/talk.json", "again", "/save")
    history = f"user: hello\nassistant: {hello(tiny)}\nuser: again\nassistant: "
    assert again.stdout == f"{hello(tiny)}\n{brief_text(tiny, history)}\n"
    assert "error: there is no file yet: /save FILE" in again.stderr
    assert f"error: {tmp_path}/talk.json exists: choose another name" in again.stderr
    assert f"loaded 2 messages from {tmp_path}/talk.json" in again.stderr
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 4


def test_another_model_and_another_drafter_go_on(tiny: str, tiny_draft: str, tiny_without_template: str) -> None:
    lines = (
        "/draft small-model",
        f"/draft small-model {tiny_draft}",
        "/draft plain",
        "/draft small-model:num_tokens=2",
        "hello",
        f"/model {tiny_draft}",
        f"/model {tiny_without_template}",
        "/model nowhere/to/be/found",
        "/regen",
        "/model",
    )
    result = chat(tiny, *lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hello(tiny)}\n{hello(tiny_draft)}\n"
    for message in (
        "error: small-model drafts with a smaller model: give it with --draft",
        "drafter small-model\n",
        "drafter plain\n",
        "drafter small-model:num_tokens=2\n",
        "error: this model has no chat template",
        "error: there is no folder nowhere/to/be/found",
    ):
        assert message in result.stderr
    assert result.stderr.count(f"model {Path(tiny_draft).name}, drafter auto") == 2
