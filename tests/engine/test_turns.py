"""Clients take turns for rows: one request behind many of another client waits for a few of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec import CapacityError
from specdec.drafters import Plain
from specdec.engine import Engine, Request
from tests.support.engine_requests import model_of, random_prompt, request_of

REQUEST = request_of(random_prompt(5), max_new_tokens=3)


def asked(engine: Engine, order: list[str], clients: str) -> list[str]:
    """Submit a request of each client; `order` gets "client + number" as they end."""
    names = [f"{client}{clients[:index].count(client)}" for index, client in enumerate(clients)]
    for client, name in zip(clients, names, strict=True):
        engine.submit(replace(REQUEST, client=client, on_finish=lambda _, name=name: order.append(name)))
    return names


def one_row(**options: int) -> Engine:
    return Engine(model_of(), drafter=Plain(), max_rows=1, **options)


def test_one_request_behind_two_hundred():
    engine, order = one_row(), list[str]()
    asked(engine, order, "a" * 200 + "b")
    while "b0" not in order:
        assert engine.step()
    assert order == ["a0", "b0"]
    engine.close()


def test_turns_go_round_and_each_client_keeps_its_order():
    engine, order = one_row(), list[str]()
    asked(engine, order, "aaaabbcb")
    engine.run()
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3"]


def test_a_client_that_comes_back_is_last_in_turn():
    """Sending one request after the other gains no turn over those who have sent all of theirs."""
    engine, order = one_row(), list[str]()
    asked(engine, order, "aab")
    while order != ["a0", "b0"]:
        assert engine.step()
    asked(engine, order, "b")
    engine.run()
    assert order == ["a0", "b0", "a1", "b0"]


def test_without_clients_the_first_come_is_the_first_served():
    engine, order = one_row(), list[int]()
    for number in range(6):
        engine.submit(replace(REQUEST, on_finish=lambda _, number=number: order.append(number)))
    engine.run()
    assert order == list(range(6))


def test_who_is_cancelled_while_it_waits_takes_nobody_s_turn():
    engine, order = one_row(), list[str]()
    generations = [engine.submit(replace(REQUEST, client=client)) for client in "ab"]
    asked(engine, order, "abc")
    engine.cancel(generations[1])
    engine.cancel(generations[0])
    assert engine.num_waiting == 3
    engine.run()
    assert order == ["a0", "b0", "c0"]
    assert [generation.finish_reason for generation in generations] == ["cancelled", "cancelled"]


def test_a_client_cannot_keep_the_others_out_of_the_queue():
    """A full queue has a place for whoever has none in it, but not for any number of such clients."""
    engine, order = one_row(max_waiting=3), list[str]()
    asked(engine, order, "aaa")
    for full in ("a", ""):
        with pytest.raises(CapacityError, match="max_waiting=3"):
            engine.submit(replace(REQUEST, client=full))
    asked(engine, order, "bcd")
    for full in ("b", "e"):
        with pytest.raises(CapacityError, match="6 requests wait"):
            engine.submit(replace(REQUEST, client=full))
    engine.run()
    assert order == ["a0", "b0", "c0", "d0", "a1", "a2"]


def test_a_request_has_no_client_unless_one_is_named():
    assert Request(prompt=[1], config=REQUEST.config).client == ""
