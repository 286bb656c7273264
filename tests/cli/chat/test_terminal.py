"""`specdec chat` in a real pseudo-terminal, as a person uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic

import pexpect
import pytest

from tests.support.tiny_models import WORDS

READY = "\x1b\\[\\?2004h"
"""The prompt reads pastes: it is there, and waits."""
SCRIPT = "from specdec.cli import main; main()"
TIMEOUT_S = 180
"""A busy machine takes long to start."""
NOT_INHERITED = ("NO_COLOR", "COLUMNS", "LINES")
"""The terminal has a size of its own; what runs the tests may have set another."""
LONG = 3000
"""Tokens of a reply that takes seconds."""


class Chat:
    """The command at work in a terminal."""

    def __init__(self, folder: str, home: Path, *options: str, term: str = "xterm-256color", **environment: str):
        names = {"XDG_STATE_HOME": str(home), "TERM": term, "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self.ready = "\n> " if term == "dumb" else READY
        self.terminal = pexpect.spawn(
            sys.executable,
            ["-c", SCRIPT, "chat", "-m", folder, "--threads", "1", *options],
            env={name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | names,
            cwd=home,
            encoding="utf-8",
            timeout=TIMEOUT_S,
            dimensions=(24, 80),
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background shell ignores Ctrl-C
        )
        self.wait()

    def wait(self) -> str:
        """Wait for the prompt; what was shown before it, without control sequences."""
        self.terminal.expect(self.ready)
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.terminal.before)

    def say(self, line: str) -> str:
        self.send(line)
        return self.wait()

    def send(self, line: str) -> None:
        self.terminal.send(line + "\r")

    def leave(self, keys: str = "\x04") -> None:
        self.terminal.send(keys)
        self.terminal.expect(pexpect.EOF)
        self.terminal.close()
        assert self.terminal.exitstatus == 0

    def saved(self, home: Path) -> list[str]:
        """What was said, by way of /save."""
        assert "saved" in self.say("/save talk")
        messages = json.loads((home / "talk.json").read_text())["messages"]
        return [message["content"] for message in messages]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the chat of this module runs in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def opened(words: str, home: Path) -> Iterator[Chat]:
    chat = Chat(words, home, "-n", str(LONG))
    yield chat
    chat.leave()
    history = home / "specdec" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0, "only the user reads it"


@pytest.fixture
def chat(opened: Chat) -> Chat:
    """Starting takes seconds, so the tests share one chat."""
    opened.say("/clear")
    opened.say(f"/set max_new_tokens {LONG}")
    return opened


def words_in(text: str) -> list[str]:
    return [word for word in text.split() if word in WORDS]


def test_a_conversation(chat: Chat, home: Path) -> None:
    assert "max_new_tokens 12" in chat.say("/set max_new_tokens 12")
    first = chat.say("ba be")
    assert "12 tokens, " in first
    assert "reading the prompt ..." in first
    again = chat.say("/regen")
    chat.send("/edit")
    chat.wait()
    chat.terminal.send("\x01bi \r")  # to the front of the old message
    edited = chat.wait()
    assert "12 tokens, " in edited
    question, reply = chat.saved(home)
    assert question == "bi ba be"
    for screen in (first, again):
        assert len(words_in(screen)) >= 12
    assert words_in(reply)[-1] in words_in(edited)

    assert "conversation forgotten" in chat.say("/clear")
    assert "nothing has been said yet" in chat.say("/regen")
    assert "loaded 2 messages from talk.json" in chat.say("/load talk")
    chat.say("bo")
    assert "saved 4 messages" in chat.say("/save")


def test_a_reply_streams_and_ctrl_c_stops_it(chat: Chat, home: Path) -> None:
    chat.send("ba be")
    chat.terminal.expect("|".join(WORDS[20:]))  # words come
    seen = chat.terminal.before + chat.terminal.after
    assert "tokens per round" not in seen, "while the reply goes on"
    chat.terminal.expect("|".join(WORDS[20:]))
    chat.terminal.sendintr()
    assert "stopped" in chat.wait()
    question, reply = chat.saved(home)
    assert question == "ba be"
    assert 2 <= len(reply.split()) < LONG
    chat.say("/set max_new_tokens 3")
    chat.say("bi")
    stats = chat.say("/stats")
    # all states were kept: read are the last word said, and "user: bi assistant:"
    assert f"4 tokens read, {3 + len(reply.split())} kept from before" in " ".join(stats.split())


def test_keys_at_the_prompt(chat: Chat, home: Path) -> None:
    chat.say("/set max_new_tokens 3")
    chat.terminal.send("half a mess\x03")
    assert "Ctrl-D or /exit to leave" in chat.wait()
    chat.terminal.send("ba\x1b\rbe\\\rbi\r")  # Alt-Enter, and Enter after a backslash
    chat.wait()
    chat.terminal.send("/sa")
    chat.terminal.expect("write the conversation")  # the menu has come
    chat.terminal.send("\t talk\r")
    chat.wait()
    assert json.loads((home / "talk.json").read_text())["messages"][0]["content"] == "ba\nbe\nbi"
    chat.terminal.send("\x1b[200~bo\nbu\x1b[201~\r")  # a paste
    chat.wait()
    assert chat.saved(home)[2] == "bo\nbu"
    assert "+bo\n+bu\n" in (home / "specdec" / "chat_history").read_text()


def test_a_resize_while_a_reply_comes(chat: Chat, home: Path) -> None:
    chat.send("ba be")
    chat.terminal.expect("|".join(WORDS[20:]))
    chat.terminal.setwinsize(10, 40)
    chat.terminal.expect("|".join(WORDS[20:]))
    chat.terminal.setwinsize(30, 30)
    until = monotonic() + 1  # words come faster than they are drawn
    while monotonic() < until:
        chat.terminal.expect("|".join(WORDS[20:]))
    chat.terminal.sendintr()
    shown = chat.wait()
    narrow = shown[: shown.index("stopped")].splitlines()[-4:]
    assert max(map(len, narrow)) <= 30
    chat.terminal.setwinsize(24, 80)
    chat.wait()  # for the prompt at its new width
    said = chat.saved(home)[1].split()
    last = words_in(next(line for line in reversed(narrow) if words_in(line)))  # lines above may be shown twice
    assert last == said[-len(last) :]


def test_drafted_tokens_are_tinted_on_request(chat: Chat) -> None:
    chat.say("/set max_new_tokens 40")
    assert "underlined" in chat.say("/show on")
    chat.send("ba be ba be ba be")
    chat.terminal.expect("40 tokens, .* ([0-9]+) of [0-9]+ drafted accepted")
    is_underlined = re.search(r"\x1b\[(\d+;)*4m", chat.terminal.before) is not None
    assert is_underlined == (int(chat.terminal.match[1]) > 0)
    chat.wait()
    assert "the rest is the model's own" in chat.say("/show")


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_without_colour(words: str, tmp_path: Path, term: str) -> None:
    chat = Chat(words, tmp_path, "-n", "5", term=term, NO_COLOR="1")
    chat.send("ba be")
    chat.terminal.expect("5 tokens, ")
    sent = chat.terminal.before
    if term == "dumb":
        assert "\x1b" not in sent
    assert not re.search(r"\x1b\[[\d;]*(3[1-7]|9[0-7]|4[1-7])m", sent)
    chat.wait()
    chat.leave("/exit\r")  # a dumb prompt is shown before it reads keys itself
