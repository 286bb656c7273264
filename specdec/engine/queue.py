"""Requests that wait for a row: clients take turns, so that one request does not wait behind two hundred of another."""

from __future__ import annotations

import threading
from collections import OrderedDict

from specdec.engine.running_requests import RunningRequest


class TurnQueue:
    """Takes one request of each client in turn, the oldest first; of a single client that is first in, first out.

    A client that comes anew, or has had its turn, is behind all others that wait. Every operation takes constant time.
    Requests may be appended in another thread than the one that takes them.

    Args:
        max_length: requests that may wait. A named client of which none waits still gets one place in a full queue, so
            that no client can keep the others out; twice as many never wait.
    """

    def __init__(self, max_length: int):
        self._max_length = max_length
        self._length = 0
        self._clients: OrderedDict[str, OrderedDict[RunningRequest, None]] = OrderedDict()
        """Of each client, in the order of their turns, what waits, the oldest first."""
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __contains__(self, running: RunningRequest) -> bool:
        return running in self._clients.get(_client(running), ())

    @property
    def first(self) -> RunningRequest:
        """Whose turn it is; nothing that is appended changes it."""
        with self._changing:
            return next(iter(next(iter(self._clients.values()))))

    def has_room(self, client: str) -> bool:
        """Whether one more request of a client may wait."""
        if self._length < self._max_length:
            return True
        return bool(client) and client not in self._clients and self._length < 2 * self._max_length

    def append(self, running: RunningRequest) -> None:
        with self._changing:
            self._clients.setdefault(_client(running), OrderedDict())[running] = None
            self._length += 1

    def pop(self) -> RunningRequest:
        """Take the first; its client is the last in turn."""
        first = self.first
        self.remove(first)
        with self._changing:
            if _client(first) in self._clients:
                self._clients.move_to_end(_client(first))
        return first

    def give_back(self, running: RunningRequest) -> None:
        """Make one the first that was the first before."""
        with self._changing:
            of_client = self._clients.setdefault(_client(running), OrderedDict())
            of_client[running] = None
            of_client.move_to_end(running, last=False)
            self._clients.move_to_end(_client(running), last=False)
            self._length += 1

    def remove(self, running: RunningRequest) -> None:
        """Take one out of turn; its client keeps its place. `KeyError`: it does not wait."""
        with self._changing:
            of_client = self._clients[_client(running)]
            del of_client[running]
            self._length -= 1
            if not of_client:
                del self._clients[_client(running)]


def _client(running: RunningRequest) -> str:
    return running.generation.request.client
