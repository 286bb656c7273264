"""`python -m tests.support.page_pictures`: takes the pictures of the page in docs/server.md, with the demo model."""

from __future__ import annotations

from pathlib import Path

from specdec import prepare
from specdec.drafters import PromptLookup
from specdec.models import load
from tests.support.browser import ENTER, Browser, browsing
from tests.support.serving import running

FOLDER = Path(__file__).parents[2] / "docs" / "images"
TEXT = "Count from 1 to 20, each number once."
SIZES = {"wide": (900, 640), "narrow": (360, 640)}


def converse(browser: Browser) -> None:
    for count, is_switched in enumerate((False, True), start=1):
        if is_switched:
            browser.click("#speculation")
        browser.click("#message")
        browser.press(TEXT + ENTER)
        browser.wait(f"return document.querySelectorAll('.note').length === {count}", "an answer", 300)
        if count == 1:
            browser.click("#show-tree")
    browser.click("#speculation")


def main() -> None:
    loaded = load("demo")
    prepare(loaded.model, weights="int8")
    FOLDER.mkdir(exist_ok=True)
    options = {"engine_options": {"drafter": PromptLookup(num_tokens=6)}, "max_new_tokens": 60}
    with running(loaded.model, name="demo", tokenizer=loaded.tokenizer, **options) as server, browsing() as browser:
        browser.resize(*SIZES["wide"])
        browser.open(f"{server.url}/")
        browser.wait("return document.querySelector('#model').textContent === 'demo'", "the model's name")
        converse(browser)
        for name, size in SIZES.items():
            browser.resize(*size)
            browser.run("document.querySelector('#chat').scrollTop = 0")
            browser.wait("return document.querySelector('#rows').textContent !== '-'", "the load")
            (FOLDER / f"page-{name}.png").write_bytes(browser.picture())


if __name__ == "__main__":
    main()
