"""The pages for people: a chat at `/`, and the API at `/docs`. They are files, and load nothing from elsewhere.

A browser cannot send a key for a page, so these need none; what they ask the API for does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/docs.js": ("docs.js", "text/javascript"),
}
PAGE_PATHS = frozenset(_FILES)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    folder = resources.files("specdec.server") / "page"
    for path, (name, kind) in _FILES.items():
        content = (folder / name).read_bytes()
        app.get(path, include_in_schema=False)(_sender(content, f"{kind}; charset=utf-8"))


def _sender(content: bytes, media_type: str) -> Callable[[], Response]:
    def send() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send
