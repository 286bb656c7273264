"""The page at `/`, in a real browser: it types, streams, toggles, and reads the figures."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

from specdec.drafters import SmallModel
from specdec.server.pages import PAGE_PATHS
from specdec.testing import ByteTokenizer
from tests.support import browser as browsers
from tests.support.browser import ENTER, ESCAPE, SPACE, TAB, Browser, browsing
from tests.support.serving import Running, running, served_model

MODEL = served_model(max_position_embeddings=2048)
needs_browser = pytest.mark.skipif(browsers.missing() is not None, reason=str(browsers.missing()))
HTML = "<img src=x onerror=\"document.title='owned'\">"
SAYS_HTML = """{% for message in messages %}{{ message.content }}{% endfor %}"""
IDLE = "return !document.querySelector('#send').hidden"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """With a draft that is the model itself, so that drafted tokens are kept."""
    with running(MODEL, max_new_tokens=60, engine_options={"drafter": SmallModel(MODEL, num_tokens=4)}) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as window:
        yield window


def test_pages_load_nothing_from_elsewhere_and_run_nothing_inline(served: Running):
    for path in PAGE_PATHS:
        answer = served.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|eval\(|<script>|style=|\son\w+=", answer.text)


def say(browser: Browser, text: str) -> None:
    browser.click("#message")
    browser.press(text + ENTER)


@needs_browser
def test_a_chat_by_keyboard(served: Running, browser: Browser):
    browser.resize(900, 700)
    browser.open(f"{served.url}/")
    browser.wait("return document.querySelector('#model').textContent === 'tiny'", "the model's name")
    assert browser.run("return document.activeElement.id") == "message"
    browser.press("hello" + ENTER)
    browser.wait("return document.querySelectorAll('.note').length === 1", "an answer")
    told = served.chat(max_tokens=60, temperature=0).json()["choices"][0]["message"]["content"]
    assert browser.text(".user") == "hello"
    assert browser.text(".said")
    assert len(told) > 0
    assert browser.run("return document.querySelectorAll('.drafted').length") > 0
    assert re.fullmatch(r"\d+%", browser.text("#acceptance"))
    assert float(browser.text("#length")) > 1
    assert browser.wait("return document.querySelector('#rows').textContent !== '-'", "the load")
    assert "speculation on: " in browser.text(".note")
    assert browser.run("return document.activeElement.id") == "message", "one can go on typing"

    for _ in range(2):  # past the button
        browser.press(TAB)
    browser.run("document.querySelector('#speculation').focus()")
    browser.press(SPACE)
    assert browser.run("return document.querySelector('#speculation').checked") is False
    say(browser, "hello")
    browser.wait("return document.querySelectorAll('.note').length === 2", "another answer")
    last = "return [...document.querySelectorAll('.assistant')].at(-1)"
    assert "speculation off: " in browser.run(f"{last}.textContent")
    assert browser.run(f"{last}.querySelectorAll('.drafted').length") == 0

    assert browser.run("return document.querySelector('#tree').hidden")
    browser.click("#show-tree")
    browser.click("#speculation")
    assert not browser.run("return document.querySelector('#tree').hidden")
    say(browser, "again")
    browser.wait("return document.querySelectorAll('.note').length === 3", "a third answer")
    assert "kept" in browser.text("#nodes")
    colour = "return getComputedStyle(document.querySelector('.drafted')).backgroundColor"
    tinted = browser.run(colour)
    browser.click("#tint")
    assert browser.run(colour) != tinted
    browser.click("#clear")
    assert browser.text("#chat") == ""
    assert not [message for message in browser.complaints() if "favicon" not in message]


@needs_browser
def test_it_fits_a_phone(served: Running, browser: Browser):
    browser.resize(360, 640)
    browser.open(f"{served.url}/")
    browser.wait("return document.querySelector('#model').textContent === 'tiny'", "the model's name")
    say(browser, "a" * 120)
    browser.wait("return document.querySelectorAll('.note').length === 1", "an answer")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    browser.open(f"{served.url}/docs")
    browser.wait("return document.querySelectorAll('#paths section').length > 3", "the paths")
    assert "messages" in browser.text("#paths")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_what_is_said_is_no_html(browser: Browser):
    """What the user writes and what the model says, here by a template that asks it to go on with HTML."""
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = SAYS_HTML
    with running(MODEL, tokenizer=tokenizer, max_new_tokens=8) as server:
        browser.open(f"{server.url}/")
        browser.wait("return document.querySelector('#model').textContent === 'tiny'", "the model's name")
        browser.run("const reply = new Reply(true); reply.take({choices: [{delta: {content: arguments[0]}}]});", HTML)
        say(browser, HTML)
        browser.wait(IDLE, "the end")
        assert browser.text(".user") == HTML
        assert browser.text(".said") == HTML
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert browser.run("return document.title") == "specdec"


@needs_browser
def test_a_key_is_asked_for_and_a_long_answer_can_be_stopped(browser: Browser):
    with running(MODEL, api_key="secret-key", max_new_tokens=1500) as server:
        browser.open(f"{server.url}/")
        browser.wait("return !document.querySelector('#key-label').hidden", "the field for the key")
        browser.wait("return document.querySelector('#problem').textContent.includes('API key')", "what is wrong")
        browser.click("#key")
        browser.press("secret-key" + TAB)
        browser.wait("return document.querySelector('#model').textContent === 'tiny'", "the model's name")
        say(browser, "hello")
        browser.wait("return document.querySelector('.said')?.textContent", "the first words")
        browser.press(ESCAPE)
        browser.wait(IDLE, "the end")
        assert browser.run("return messages.length") == 2
        assert browser.text("#problem") == ""
