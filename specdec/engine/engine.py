"""The engine: admits requests, reads their prompts in chunks, and runs rounds of the decoding loop over all of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.decoding.sequences import Sequences
from specdec.drafters import Drafter, Run
from specdec.drafters.composite.forced import Forced
from specdec.drafters.speculation import Speculation
from specdec.engine.chunking import ChunkSizer
from specdec.engine.earlier_replies import EarlierReplies
from specdec.engine.memory import GROWTH, GROWTH_OF_NEW, Held, KeyValueMemory, free_slots, page_pool
from specdec.engine.prefixes import PrefixCache
from specdec.engine.prepared import prepare
from specdec.engine.queue import TurnQueue
from specdec.engine.reading import PromptReader
from specdec.engine.request import FinishReason, Generation, Request
from specdec.engine.running_requests import (
    ContinuousBatchingLoop,
    RequestRecorder,
    RequestSampler,
    RequestStops,
    RunningRequest,
    RunningRequests,
)
from specdec.errors import CapacityError, DraftError, UnsupportedModelError
from specdec.hf import num_processes
from specdec.tree_model.cache import RowStates
from specdec.tree_model.compatibility import position_limit
from specdec.tree_model.prefix_files import PrefixFiles

_log = logging.getLogger(__name__)


class Engine:
    """A continuously batched decoding loop on one model. Not thread-safe: the thread that calls `step` owns it.

    Greedy output of a request equals `model.generate(do_sample=False)` for it alone, up to numerical ties; sampled
    output has exactly the target's processed distribution, and is a function of the request and its seed.

    Args:
        model: the target, as for `specdec.generate`; it is not changed.
        drafter: a `specdec.drafters` instance, a smaller model of the same tokenizer, None or "auto".
        tokenizer: needed for stop strings only.
        max_rows: requests that are decoded at once.
        max_waiting: requests that may wait besides; where `Request.client` differs, clients take turns.
        max_cached_tokens: slots of key/value memory, for rows and shared prefixes together. With int8 weights and
            native layers a row takes what it has written, in pages, and shares those of its prefix; others are padded
            to the longest. If rows outgrow it, those that came last wait again, and go on later where they were. None
            takes half of the memory that is free now.
        max_prefix_bytes: of the disk, in the user's cache: what prompts begin with is kept there, and known to the next
            process with the same model (`tree_model/prefix_files.py`). None: nothing is.
        prefill_chunk: prompt tokens that are read between two rounds, at most. While others decode they are as many as
            take about 1.7 times what a round takes (`chunking`); with int8 weights and native layers, they
            go through the model together with the round's own.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree, or its prefixes not be kept on disk.
        DraftError: the drafter does not fit the model, or cannot take rows that join.
        ValueError: a wrong argument.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        drafter: Drafter | PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_rows: int = 16,
        max_waiting: int = 1024,
        max_cached_tokens: int | None = None,
        max_prefix_bytes: int | None = None,
        prefill_chunk: int = 512,
    ):
        speculation = Speculation.of(drafter)
        limits = {"max_rows": max_rows, "max_waiting": max_waiting, "prefill_chunk": prefill_chunk}
        optional = {"max_cached_tokens": max_cached_tokens, "max_prefix_bytes": max_prefix_bytes}
        limits |= {name: value for name, value in optional.items() if value is not None}
        for name, value in limits.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it is a positive integer")
        speculation.check(model)
        if num_processes(model) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} is split over processes (tp_plan), whose requests would come in different "
                "orders: load it whole or with device_map='auto', or call specdec.generate() in every process"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_waiting, self.prefill_chunk = max_rows, max_waiting, prefill_chunk
        self.max_cached_tokens = max_cached_tokens or free_slots(model, max_rows)
        self.adapter: str | None = None
        """The LoRA adapter that its requests name (see `LoraEngine`); None: they name none."""
        self._drafter = speculation.drafter
        self._pool = page_pool(model)
        self._prefixes = PrefixCache(self.max_cached_tokens)
        self._replies = EarlierReplies()
        self._memory = KeyValueMemory(self.max_cached_tokens, self._prefixes, self._pool)
        self._waiting = TurnQueue(max_waiting)
        files = None if max_prefix_bytes is None else PrefixFiles(model, max_prefix_bytes)
        self._reader = PromptReader(model, self._prefixes, self._pool, files)
        self._chunks = ChunkSizer(prefill_chunk)
        self._clock = perf_counter
        self._admitted: deque[RunningRequest] = deque()
        self._open: dict[Generation, RunningRequest] = {}
        self._loop = self._start()

    @property
    def num_rows(self) -> int:
        """Requests that are being decoded, or whose prompt is being read."""
        return len(self._loop.requests) + len(self._admitted)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted yet."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open

    @property
    def num_cached_tokens(self) -> int:
        """Slots of key/value memory in use, those of prompts that are to be read next and shared prefixes included."""
        return self._memory.num_used(self._held())

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises:
            CapacityError: the queue is full, or the request needs more memory than there will ever be.
            UnsupportedOptionError: an option that is not possible here; it says what to use instead.
            ValueError: a wrong argument.
        """
        if request.adapter != self.adapter:
            raise ValueError(f"adapter={request.adapter!r}: this engine decodes with {self.adapter!r}; see LoraEngine")
        if not self._waiting.has_room(request.client):
            raise CapacityError(
                f"{self.num_waiting} requests wait, and no more may (max_waiting={self.max_waiting}): try again later"
            )
        generation = Generation(request)
        running = RunningRequest(prepare(self.model, request, self.tokenizer), generation)
        if running.need > self.max_cached_tokens:
            raise CapacityError(
                f"a prompt of {len(running.prompt)} tokens that may grow to {running.need} needs more than the "
                f"{self.max_cached_tokens} slots of key/value memory that there are (max_cached_tokens): shorten it or "
                "lower max_new_tokens"
            )
        self._open[generation] = running
        self._waiting.append(running)
        return generation

    @torch.no_grad()
    def step(self) -> bool:
        """Admit what fits, read a chunk of prompt, run one round for all rows.

        Returns:
            Whether anything is left to do.
        """
        self._suspend_some()
        self._admit()
        num_tokens = self._chunks.size(is_decoding=bool(self._loop.requests))
        if self._loop.requests and self._loop.target.can_read_along:
            self._round(self._next_prompt() if num_tokens else None, num_tokens)
        else:
            self._read_prompts(num_tokens)
            if self._loop.requests:
                self._round(None, 0)
        self._tell()
        return not self.is_idle

    def cancel(self, generation: Generation) -> None:
        """End a request now ("cancelled") and free what it holds; nothing happens if it is finished."""
        running = self._open.get(generation)
        if running is not None and not generation.is_finished:
            self._remove(running)
            self._finish(running, "cancelled")

    def run(self) -> None:
        """`step` until nothing is left to do."""
        while self.step():
            pass

    def close(self) -> None:
        """Cancel everything that is under way."""
        for generation in list(self._open):
            self.cancel(generation)
        self._loop.session.close()

    def _held(self) -> list[Held]:
        """What rows hold, and what prompts will when they are read."""
        admitted = [self._held_by(running) for running in self._admitted]
        return [*self._loop.held, *admitted]

    def _held_by(self, running: RunningRequest) -> Held:
        """What a request will hold whose prompt has not been read."""
        num_tokens = len(running.prompt)
        num_left = self._reader.num_left if running is self._reader.request else num_tokens
        return Held(length=num_tokens, most=running.need, num_unread=num_left)

    def _start(self) -> ContinuousBatchingLoop:
        """A loop without rows.

        Raises:
            DraftError: the drafter cannot take rows that join.
        """
        target = self._drafter.make_target(self.model)
        target.begin(pool=self._pool)
        nothing = torch.zeros((0, 0), dtype=torch.long, device=target.device)
        sequences, requests = Sequences(nothing, None, 0), RunningRequests()
        sampler = RequestSampler(requests, sequences)
        session = Forced(self._drafter).start(
            Run(
                target=target,
                vocab_size=target.vocab_size,
                sequences=sequences,
                sampler=sampler,
                tree=None,
                input_ids=nothing,
                attention_mask=None,
            )
        )
        self._reader.keep_states(target.kept_depths)
        if not session.takes_rows:
            session.close()
            raise DraftError(
                f"{type(self._drafter).__name__} cannot take rows that join a batch: an engine drafts with Auto, "
                "PromptLookup, SmallModel, DraftHead, QuantizedSelf or Plain"
            )
        return ContinuousBatchingLoop(
            target=target,
            session=session,
            sampler=sampler,
            stop=RequestStops(requests),
            sequences=sequences,
            recorder=RequestRecorder(requests),
            feed=None,
            context_length=position_limit(self.model),
            started=perf_counter(),
            requests=requests,
            keep=self._keep,
        )

    def _admit(self) -> None:
        """Let requests in, as their turns come, while there is memory; shared prefixes make room."""
        while self._waiting and self.num_rows < self.max_rows:
            held = [*self._held(), self._held_by(self._waiting.first)]
            if not self._memory.make_room(held, GROWTH_OF_NEW) and self.num_rows:
                return
            self._admitted.append(self._waiting.pop())

    def _suspend_some(self) -> None:
        """If rows may not have room for a round, let those wait again that came last; what they have said stays."""
        while not self._memory.make_room(self._held(), GROWTH) and self.num_rows > 1:
            running = self._admitted[-1] if self._admitted else self._loop.newest
            self._remove(running)
            self._waiting.give_back(running)

    def _read_prompts(self, left: int) -> None:
        """Read so many tokens, and let those join whose prompt has been read."""
        while left > 0 and (running := self._next_prompt()) is not None:
            with self._own_errors(running):
                started = self._clock()
                num_read = self._reader.read(left)
                seconds = self._clock() - started
                self._chunks.update_chunk(num_read, seconds)
                running.generation.stats.prefill_seconds += seconds
                left -= num_read
                if not self._reader.num_left:
                    self._join(running)

    def _next_prompt(self) -> RunningRequest | None:
        """The first admitted request with tokens to read; those before it, which are known already, join. None also
        while what is known is being loaded, a block at a time if others decode."""
        while self._admitted:
            running = self._admitted[0]
            with self._own_errors(running):
                self._reader.begin(running)
                while self._reader.load_block():
                    if self._loop.requests:
                        return None
                if self._reader.num_left:
                    return running
                self._join(running)
        return None

    @contextmanager
    def _own_errors(self, running: RunningRequest) -> Iterator[None]:
        """If reading its prompt fails, only this request ends."""
        try:
            yield
        except BaseException as error:
            self._remove(running)
            self._finish(running, "error", _as_exception(error))
            if not isinstance(error, Exception):
                raise

    def _join(self, running: RunningRequest) -> None:
        """The prompt that is being read has been, and its request is decoded from now on."""
        states = self._reader.states
        kind = running.generation.request.kind
        self._loop.admit(running, states, self._reader.hidden, self._replies.of(kind) if kind else None)
        if states is not None:
            self._keep(running.prompt[:-1], states)
        self._admitted.remove(running)
        self._reader.forget(running)

    def _keep(self, tokens: Sequence[int], states: RowStates) -> None:
        """Keep a text's states for whoever begins like it, in the memory that no row has reserved."""
        self._prefixes.add(tokens, states)
        self._memory.make_room(self._held(), 0)

    def _round(self, running: RunningRequest | None, num_tokens: int) -> None:
        """A round of all rows. One that breaks ends them all, for none can be trusted to be whole.

        Args:
            running: whose prompt is being read, of which so many tokens go along in the target's forward.
        """
        started, num_left = self._clock(), self._reader.num_left
        try:
            if running is None:
                self._loop.round()
            else:
                with self._reader.reading_along(self._loop.target, num_tokens):
                    self._loop.round()
        except BaseException as error:
            self._break_off(error)
            return
        seconds, num_read = self._clock() - started, num_left - self._reader.num_left
        if running is None or not num_read:
            self._chunks.update_round(seconds)
            return
        running.generation.stats.prefill_seconds += self._chunks.update_along(num_read, seconds)
        if not self._reader.num_left:
            with self._own_errors(running):
                self._join(running)

    def _break_off(self, error: BaseException) -> None:
        """A round has failed."""
        broken = self._loop
        for running in list(broken.requests.values()):
            self._finish(running, "error", _as_exception(error))
        broken.session.close()
        self._loop = self._start()
        if not isinstance(error, Exception):
            raise error
        _log.error("a round of %d requests has failed", len(broken.requests), exc_info=error)

    def _remove(self, running: RunningRequest) -> None:
        """Take a request out of wherever it is."""
        if running in self._waiting:
            self._waiting.remove(running)
        elif running in self._admitted:
            self._reader.forget(running)
            self._admitted.remove(running)
        elif running in self._loop.requests.values():
            self._loop.dismiss(running)

    def _finish(self, running: RunningRequest, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request that is nowhere any more."""
        running.fresh.clear()
        running.finish(reason, error)
        self._tell_end(running)

    def _tell(self) -> None:
        """Give callers what the round has brought; the state is whole, so they may submit and cancel."""
        finished, self._loop.finished = self._loop.finished, []
        for running in [*finished, *self._loop.requests.values()]:
            fresh, running.fresh = running.fresh, []
            told = running.generation.request.on_tokens
            if not fresh or told is None:
                continue
            try:
                told(fresh)
            except Exception as error:
                _log.exception("on_tokens has failed")
                if not running.generation.is_finished:
                    self._remove(running)
                    self._finish(running, "error", error)
        for running in finished:
            self._replies.add(running.generation)
            self._tell_end(running)

    def _tell_end(self, running: RunningRequest) -> None:
        if self._open.pop(running.generation, None) is None:
            return
        told = running.generation.request.on_finish
        if told is not None:
            try:
                told(running.generation)
            except Exception:
                _log.exception("on_finish has failed")


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"the engine was interrupted by {error!r}")
