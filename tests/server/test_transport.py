"""The server and what comes over the wire: slow, broken and endless requests, clients that do not read, and turns."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
    pytest.importorskip(extra, reason=f"{extra} is not installed: pip install -e .[serve,dev]")

import httpx2

from specdec.server.access import client_of
from specdec.server.connection import LEAST_READ_BYTES, Lag
from specdec.server.options import ServerOptions
from tests.support.serving import EOS, NAME, Running, running, served_model, wait_until

MODEL = served_model(max_position_embeddings=1 << 16)
MAX_BODY = 20_000
SHORT = 1.0
"""Seconds: the limits under test."""
LONG = 60.0
"""Seconds in which anything that ends at all has ended, on however busy a machine."""
PATH = "/v1/chat/completions"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    limits = {"header_timeout": SHORT, "body_timeout": SHORT, "write_timeout": SHORT}
    with running(MODEL, max_body_bytes=MAX_BODY, max_new_tokens=50_000, grace=0, send_buffer=4096, **limits) as server:
        yield server


def chat(**options: Any) -> bytes:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 3}
    return json.dumps({**body, **options}).encode()


ENDLESS = {"max_tokens": 50_000, "logit_bias": {str(EOS): -100}}


def request(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def connected(served: Running, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(LONG)
        connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes; a reset is a failure."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def drip(connection: socket.socket, data: bytes) -> float:
    """Send a byte now and then until the server has closed; seconds that it took."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for byte in data:
            assert time.monotonic() - started < LONG, "the connection is still open"
            connection.sendall(bytes([byte]))
            time.sleep(SHORT / 10)
    return time.monotonic() - started


def assert_idle(served: Running) -> None:
    wait_until(lambda: served.engine.num_rows + served.engine.num_waiting == 0, "nothing is under way")
    assert served.chat(max_tokens=2, temperature=0).status_code == 200


# what comes in slowly


def test_a_body_that_keeps_coming_but_slowly(served: Running):
    """Each byte came in time, so the connection was held for months: the limit is for the whole body."""
    with connected(served) as connection:
        connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n")
        dripping = threading.Thread(target=drip, args=(connection, b" " * 5000))
        dripping.start()
        answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        dripping.join(timeout=LONG)
        assert not dripping.is_alive(), "the connection is closed, though bytes still come"
    assert_idle(served)


@pytest.mark.parametrize("first", [b"", b"GET /hea", HEALTH + b"GET"], ids=["nothing", "a part", "a second request"])
def test_a_head_that_does_not_come(served: Running, first: bytes):
    with connected(served) as connection:
        connection.sendall(first)
        answer = everything(connection)
        assert answer.count(b"HTTP/1.1 200") == first.count(HEALTH)


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first", "second"])
def test_a_head_that_keeps_coming_but_slowly(served: Running, before: bytes):
    with connected(served) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        drip(connection, b"GET /health HTTP/1.1\r\nX: " + b"y" * 20_000)
    assert_idle(served)


@pytest.mark.parametrize("path", ["/nothing", "/health"])
def test_a_body_that_nobody_reads(served: Running, path: str, monkeypatch: pytest.MonkeyPatch):
    """Any byte after the answer stopped uvicorn's clock, and nothing started it again."""
    monkeypatch.setattr("specdec.server.body.DISCARD_SECONDS", SHORT)
    with connected(served) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 40")
        drip(connection, b"x" * 8000)


# what is too much, or wrong


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_client_that_sends_everything_before_it_reads_gets_its_413(served: Running, framing: str):
    """The socket was closed with unread data: one of four clients got a reset instead of the answer."""
    size = 3_000_000
    if framing == "length":
        sent = HEAD + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    else:
        chunk = b"%x\r\n" % 10_000 + b"x" * 10_000 + b"\r\n"
        sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (size // 10_000) + b"0\r\n\r\n"
    for _ in range(12):
        with connected(served) as connection:
            connection.sendall(sent)
            answer = everything(connection)
            assert answer.startswith(b"HTTP/1.1 413 "), answer[:100]
            assert f"at most {MAX_BODY} bytes".encode() in answer
    assert_idle(served)


def test_a_body_announced_as_too_large_is_refused_before_it_is_sent(served: Running):
    with connected(served) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_end_is_not_read_for_ever(served: Running):
    with connected(served) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % 100_000 + b"x" * 100_000 + b"\r\n"
        started, num_bytes = time.monotonic(), 0
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < LONG:
                num_bytes += connection.send(chunk)
        assert time.monotonic() - started < LONG
    assert_idle(served)


@pytest.mark.parametrize("names", [("Transfer-Encoding", "Content-Length"), ("content-length", "TRANSFER-ENCODING")])
def test_two_lengths_of_one_body(served: Running, names: tuple[str, str]):
    """A proxy that believes the other one sees another request behind it."""
    values = {"transfer-encoding": "chunked", "content-length": "5"}
    head = "".join(f"{name}: {values[name.lower()]}\r\n" for name in names)
    with connected(served) as connection:
        connection.sendall(HEAD + f"{head}\r\n0\r\n\r\n".encode() + HEALTH)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"both Transfer-Encoding and Content-Length" in answer
    assert answer.count(b"HTTP/1.1") == 1, "what follows is not taken for a request"


def test_chunks_that_break_off_after_the_answer(served: Running, caplog: pytest.LogCaptureFixture):
    with connected(served) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        connection.sendall(b"no number\r\n")
        assert b"HTTP/1.1" not in everything(connection), "there is one answer"
    assert "Fatal error" not in caplog.text


# what is not read


def wait_for_end(connection: socket.socket) -> None:
    """Until the server has cut the connection off, without reading from it."""

    def is_cut() -> bool:
        try:
            connection.sendall(b"x")
        except ConnectionError:
            return True
        time.sleep(0.05)
        return False

    wait_until(is_cut, "the connection is cut")


def test_a_stream_that_is_not_read(served: Running):
    with connected(served, receive_buffer=4096) as connection:
        connection.sendall(request(chat(stream=True, logprobs=True, top_logprobs=20, **ENDLESS)))
        wait_until(lambda: served.engine.num_rows == 1, "the stream has begun")
        wait_until(lambda: served.engine.num_rows == 0, "the work is cancelled, long before 50,000 tokens")
        wait_for_end(connection)
    assert_idle(served)


def test_a_complete_answer_that_is_not_read(served: Running):
    """It was kept, with its connection, for as long as the client liked."""
    with connected(served, receive_buffer=4096) as connection:
        connection.sendall(request(chat(logprobs=True, top_logprobs=20, **ENDLESS | {"max_tokens": 200})))
        wait_until(lambda: served.engine.num_rows == 1, "it has begun")
        wait_for_end(connection)
    assert_idle(served)


def test_a_stream_that_is_read_by_drops(served: Running):
    """Some room in the buffers now and then is not enough: it would last for hours."""
    with connected(served, receive_buffer=4096) as connection:
        connection.sendall(request(chat(stream=True, logprobs=True, top_logprobs=20, **ENDLESS)))
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while connection.recv(512):
                time.sleep(SHORT / 10)
                assert time.monotonic() - started < LONG
    assert_idle(served)


def test_an_answer_that_is_read_slowly_but_steadily_comes_whole():
    """A client must read something in each span of the limit, not everything."""
    limit = 2 * SHORT
    with (
        running(MODEL, send_buffer=4096, write_timeout=limit) as served,
        connected(served, receive_buffer=1 << 14) as connection,
    ):
        sent = request(chat(logprobs=True, top_logprobs=20, **ENDLESS | {"max_tokens": 300}))
        connection.sendall(sent.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        parts = [connection.recv(1 << 14)]
        started = time.monotonic()
        while parts[-1]:
            parts.append(connection.recv(1 << 14))
            time.sleep(0.1)
        assert time.monotonic() - started > limit
    document = json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])
    assert document["usage"]["completion_tokens"] == 300


def test_how_far_behind_a_client_is():
    now = 0.0
    lag = Lag(lambda: now)
    lag.begin(1000)
    now = 5.0
    lag.update(400)
    assert lag.seconds == 5
    now = 7.0
    lag.update(0)
    assert lag.seconds == 7, "it has read everything, but that was little"
    now = 100.0
    lag.begin(LEAST_READ_BYTES)
    assert lag.seconds == 7, "meanwhile nothing waited for it"
    now = 101.0
    lag.update(500)
    assert lag.seconds == 0
    now = 103.0
    lag.update(500)
    assert lag.seconds == 2


# what must go on working


def test_pipelined_requests_are_answered_in_order(served: Running):
    with connected(served) as connection:
        bodies = [chat(max_tokens=number) for number in (1, 2, 3)]
        last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        connection.sendall(b"".join(map(request, bodies)) + last)
        answer = everything(connection)
    assert answer.count(b"HTTP/1.1 200") == 4
    numbers = [answer.index(b'"completion_tokens":%d' % number) for number in (1, 2, 3)]
    assert numbers == sorted(numbers)


def test_a_connection_is_kept_for_the_next_request(served: Running):
    """After answers of every kind, those included that do not read the body that came with them."""
    ask = [
        (request(chat()), b"200"),
        (request(b"{}"), b"400"),
        (request(b"{}").replace(PATH.encode(), b"/nothing"), b"404"),
        (request(b"{}").replace(b"POST", b"DELETE", 1), b"405"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"400"),
        (HEALTH, b"200"),
    ]
    with connected(served) as connection:
        for sent, status in ask * 2:
            connection.sendall(sent)
            answer = b""
            while b"}" not in answer[-2:]:
                part = connection.recv(1 << 16)
                assert part, (sent, answer)
                answer += part
            assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_stream_with_little_to_say_outlives_every_limit(served: Running, monkeypatch: pytest.MonkeyPatch):
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: (time.sleep(1.5 * SHORT), step())[1])
    body = json.loads(chat(stream=True, max_tokens=3, logit_bias={str(EOS): -100}))
    started = time.monotonic()
    with served.http.stream("POST", PATH, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert time.monotonic() - started > 3 * SHORT


# turns


def test_one_request_behind_many_of_another_address():
    """It waited for all of them, 59 of 62 seconds."""
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.2", 0))
        except OSError:
            pytest.skip("this machine has one loopback address only")
    body = json.loads(chat(max_tokens=16, logit_bias={str(EOS): -100}))
    order: list[str] = []

    def ask(http: httpx2.Client, name: str, **more: Any) -> None:
        assert http.post(PATH, json={**body, **more}, headers={"X-Forwarded-For": name}).status_code == 200
        order.append(name)

    with running(MODEL, engine_options={"max_rows": 1}) as served, contextlib.ExitStack() as clients:
        limits = httpx2.Limits(max_connections=100)
        many = clients.enter_context(httpx2.Client(base_url=served.url, limits=limits, timeout=LONG))
        local = httpx2.HTTPTransport(local_address="127.0.0.2")
        other = clients.enter_context(httpx2.Client(base_url=served.url, transport=local, timeout=LONG))
        # neither a header nor the `user` of a body gains a turn
        threads = [
            threading.Thread(target=ask, args=(many, f"10.0.0.{number}"), kwargs={"user": str(number)})
            for number in range(40)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: served.engine.num_waiting + len(order) >= 39, "all wait")
        before = len(order)
        ask(other, "other")
        assert order.index("other") - before <= 5
        for thread in threads:
            thread.join(timeout=LONG)
        assert len(order) == 41


@pytest.mark.parametrize(
    ("proxy", "clients"),
    [("127.0.0.1", ["192.0.2.7", "192.0.2.8"]), ("127.0.0.9", ["127.0.0.1"] * 2), (None, ["127.0.0.1"] * 2)],
)
def test_a_proxy_is_believed_and_nobody_else(proxy: str | None, clients: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own setting
    seen: list[str] = []
    with running(MODEL, proxy=proxy) as served:
        submit = served.engine.submit
        monkeypatch.setattr(served.engine, "submit", lambda request: (seen.append(request.client), submit(request))[1])
        for told in ("192.0.2.7", "10.9.9.9, 192.0.2.8"):  # what a client sends, a proxy leaves before its own word
            served.http.post(
                PATH, content=chat(), headers={"Content-Type": "application/json", "X-Forwarded-For": told}
            )
    assert seen == clients


def test_a_proxy_that_is_no_address():
    with pytest.raises(ValueError, match="proxy is the address that a reverse proxy connects from"):
        ServerOptions(proxy="*")


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_who_a_client_is(host: str, client: str):
    assert client_of({"client": (host, 5)}) == client
    assert client_of({"client": None}) == ""


@pytest.mark.parametrize("name", ["header_timeout", "body_timeout", "write_timeout"])
def test_limits_that_make_no_sense(name: str):
    for value in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name} is a positive number"):
            ServerOptions(**{name: value})
