"""A headless Chromium, driven by what chromedriver understands: the W3C's WebDriver, JSON over HTTP."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER, ESCAPE, TAB, SPACE, SHIFT = "\ue007", "\ue00c", "\ue004", " ", "\ue008"


def missing() -> str | None:
    """Why there is no browser; None if there is one."""
    if shutil.which("chromedriver") is None:
        return "there is no chromedriver: apt-get install chromium chromium-driver"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return "there is no chromium: apt-get install chromium chromium-driver"
    return None


class Browser:
    """One window."""

    def __init__(self, http: httpx2.Client, session: str):
        self._http, self._session = http, session

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, f"/session/{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def resize(self, width: int, height: int) -> None:
        """The size of the page, not of the window around it."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.ask("POST", "/goog/cdp/execute", command)

    def find(self, css: str) -> str:
        return self.ask("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css: str) -> None:
        self.ask("POST", f"/element/{self.find(css)}/click", {})

    def press(self, keys: str) -> None:
        """On whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, css: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def wait(self, script: str, what: str, seconds: float = 60) -> Any:
        """Until a script returns something true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{seconds} s have passed, and still not: {what}"
            time.sleep(0.05)
        return value

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def complaints(self) -> list[str]:
        """What the browser itself has logged: scripts that fail, what the content security policy refuses."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browsing() -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    flags = ("headless=new", "no-sandbox", "no-zygote", "disable-gpu", "disable-dev-shm-usage", "disable-extensions")
    options = {"args": [f"--{flag}" for flag in flags]}
    capabilities = {
        "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}},
    }
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as http:
            deadline = time.monotonic() + 60
            while True:
                try:
                    answer = http.post("/session", json={"capabilities": capabilities})
                    break
                except httpx2.ConnectError:
                    assert time.monotonic() < deadline, "chromedriver does not start"
                    time.sleep(0.1)
            value = answer.json()["value"]
            assert answer.status_code == 200, value
            browser = Browser(http, value["sessionId"])
            try:
                yield browser
            finally:
                http.delete(f"/session/{value['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=30)
