"""Each row of the batch with settings of its own: processors, seed, stopping criteria, what its caller gets.

Shape legend: B rows, T slots, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from specdec.acceptance import Acceptance, follow
from specdec.decoding.earlier import EarlierTexts
from specdec.decoding.loop import Committed, DecodingLoop
from specdec.decoding.recording import Recorder
from specdec.decoding.sampling import Prefixes, Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stopping import Scores, StopChecker
from specdec.engine.memory import GROWTH_OF_NEW, Held
from specdec.engine.noise import GumbelNoise
from specdec.engine.prepared import PreparedRequest
from specdec.engine.request import FinishReason, Generation, RoundReport, TokenLogprobs
from specdec.errors import NumericalError
from specdec.tree_model.cache import RowStates
from trees import Draft, Ragged, TreeBatch


class RunningRequest:
    """A request in the engine: what its settings amount to, and what has become of it.

    Attributes:
        prompt: what is read before it is decoded: if it has been decoded before, with what it has said.
        need: slots that it may come to hold.
        error: what its processors or criteria raised; it ends with this round.
        fresh: tokens that its caller has not been told of.
    """

    def __init__(self, prepared: PreparedRequest, generation: Generation):
        self.generation = generation
        self.stop = StopChecker(prepared.criteria)
        self.sampler = Sampler(prepared.processors, do_sample=False)
        self.seed = prepared.seed
        self.prompt = list(generation.request.prompt)
        self.need = max(self.stop.max_length, len(self.prompt) + 1)
        self.error: Exception | None = None
        self.fresh: list[int] = []
        self._submitted = perf_counter()
        self._logprobs_KV: Tensor | None = None

    def begin(self, num_reused: int) -> None:
        """Its prompt is read from now on."""
        if not self.generation.tokens:  # else it has been before
            self.generation.stats.queued_seconds = perf_counter() - self._submitted
            self.generation.stats.num_reused_tokens = num_reused

    def record(self, logits_KV: Tensor) -> None:
        """The target's logits at the slots of a path."""
        if self.generation.logprobs is not None:
            self._logprobs_KV = logits_KV.float().log_softmax(-1)

    def append(self, tokens: Sequence[int], path: Sequence[int], trees: TreeBatch, index: int) -> None:
        """Tokens that a round has committed, of them the accepted nodes of its tree.

        Args:
            path: cut where the row stops.
            trees: what was drafted for all rows, of which the row is that of this index.
        """
        generation, stats = self.generation, self.generation.stats
        stats.rounds += 1
        stats.drafted += trees.sizes[index]
        stats.accepted += len(path)
        stats.accepted_histogram += [0] * (len(path) + 1 - len(stats.accepted_histogram))
        stats.accepted_histogram[len(path)] += 1
        if generation.rounds is not None:
            generation.rounds.append(RoundReport(tree=trees.row(index), path=tuple(path), num_tokens=len(tokens)))
        stats.seconds = perf_counter() - self._submitted
        if stats.first_token_seconds is None:
            stats.first_token_seconds = stats.seconds
        if generation.logprobs is not None:
            generation.logprobs.extend(self._logprobs(tokens))
        generation.tokens.extend(tokens)
        self.fresh.extend(tokens)

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        generation = self.generation
        generation.stats.seconds = perf_counter() - self._submitted
        generation.error = error
        generation.finish_reason = reason  # last, for those who read in other threads

    def stop_reason(self, alone: Sequences) -> FinishReason:
        """Why the row, seen alone, has stopped."""
        return "stop" if self.stop.stops_early(alone) else "length"

    def _logprobs(self, tokens: Sequence[int]) -> list[TokenLogprobs]:
        count = self.generation.request.num_logprobs
        assert self._logprobs_KV is not None
        assert count is not None
        logprobs_KV = self._logprobs_KV[: len(tokens)]
        chosen = logprobs_KV.gather(1, torch.tensor(tokens, device=logprobs_KV.device).unsqueeze(1))[:, 0].tolist()
        top = logprobs_KV.topk(min(count, logprobs_KV.shape[1]), -1)
        rows = zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            TokenLogprobs(logprob=logprob, top_ids=tuple(ids), top_logprobs=tuple(values))
            for logprob, ids, values in rows
        ]


class RunningRequests(dict[int, RunningRequest]):
    """The rows of the batch, by their number in `Sequences.rows`."""

    @contextmanager
    def own_errors(self, row: int) -> Iterator[None]:
        """Code of a request runs here: if it raises, only this request ends."""
        try:
            yield
        except Exception as error:  # whatever a caller's processor or criterion raises
            self[row].error = error


class RequestSampler(Sampler):
    """Applies to every row its own processors, and its own noise if it is sampled: what is left is greedy."""

    def __init__(self, requests: RunningRequests, sequences: Sequences):
        super().__init__(LogitsProcessorList(), do_sample=False)
        self._requests = requests
        self._sequences = sequences
        self._noise = GumbelNoise()

    @property
    def reads_no_tokens(self) -> bool:
        running = [self._requests[row] for row in self._sequences.rows]
        return not any(each.sampler.processors or each.seed is not None for each in running)

    def process(self, logits_BTV: Tensor | Ragged, prefixes: Prefixes) -> Tensor | Ragged:  # type: ignore[override]
        requests = [self._requests[row] for row in prefixes.sequences.rows]
        is_changed = any(running.sampler.processors or running.seed is not None for running in requests)
        scores_BTV: Tensor | Ragged
        if isinstance(logits_BTV, Ragged):
            scores_BTV = logits_BTV.map(lambda flat_RV: flat_RV.to(torch.float32, copy=is_changed))
        else:
            scores_BTV = logits_BTV.to(torch.float32, copy=is_changed)
        together: dict[Hashable, list[int]] = defaultdict(list)
        for index, running in enumerate(requests):
            if running.sampler.processors and running.error is None:
                settings = running.sampler.shared_settings
                together[index if settings is None else settings].append(index)
        for indices in together.values():
            self._process(scores_BTV, prefixes, indices)
        for index, running in enumerate(requests):
            if running.seed is not None and running.error is None:
                self._add_noise(scores_BTV[index], prefixes, index, running.seed)
        return scores_BTV

    def forced(self, row: int, sequences: Sequences) -> list[int]:
        number = sequences.rows[row]
        running, tokens = self._requests[number], list[int]()
        if running.error is None and running.sampler.forces_tokens:
            with self._requests.own_errors(number):
                tokens = running.sampler.forced(row, sequences)
        return tokens

    def rule(self, draft: Draft, *, keeps_scores: bool) -> None:
        """None: rows have processors and errors of their own."""

    def accept(self, scores_BTV: Tensor | Ragged, draft: Draft) -> Acceptance:
        """As `Sampler.accept`; a row whose scores are no numbers ends without the others."""
        accepted = follow(draft.trees, scores_BTV)
        if not accepted.has_next:
            for row, next_token in zip(self._sequences.rows, accepted.next_B.tolist(), strict=True):
                if next_token < 0 and self._requests[row].error is None:
                    self._requests[row].error = NumericalError("the target's scores for this row are not numbers (NaN)")
            next_B = accepted.next_B.clamp(min=0)
            accepted = Acceptance(path_BD=accepted.path_BD, counts_B=accepted.counts_B, next_B=next_B)
        return accepted

    def _process(self, scores_BTV: Tensor | Ragged, prefixes: Prefixes, indices: Sequence[int]) -> None:
        """Rows of equal processors; if those take only one row at a time, a single one."""
        running = [self._requests[prefixes.sequences.rows[index]] for index in indices]
        sampler = running[0].sampler
        try:
            if sampler.shared_settings is not None:
                rows_TV = [scores_BTV[index] for index in indices]
                sampler.process_rows(rows_TV, [prefixes.of_row(index) for index in indices])
            else:
                (index,) = indices
                own = Prefixes(prefixes.sequences.single_row(index), prefixes.trees.single_row(index), prefixes.slots)
                scores_BTV[index].copy_(sampler.process(scores_BTV[index].unsqueeze(0), own)[0])
        except Exception as error:  # whatever a caller's processor raises
            for each in running:
                each.error = error

    def _add_noise(self, scores_TV: Tensor, prefixes: Prefixes, index: int, seed: int) -> None:
        used = [slot for slot in prefixes.slots if slot <= prefixes.trees.sizes[index]]
        depths, length = prefixes.trees.host_depths_BT[index], prefixes.sequences.lengths[index]
        self._noise.add(scores_TV[: len(used)], seed, [length + int(depths[slot]) for slot in used])


class RequestStops(StopChecker):
    """Stops every row by its own criteria."""

    def __init__(self, requests: RunningRequests):
        super().__init__(StoppingCriteriaList())
        self._requests = requests

    def limits(self, sequences: Sequences) -> list[int]:
        return [self._requests[row].stop.max_length for row in sequences.rows]

    def cut(
        self, sequences: Sequences, candidates: Sequence[Sequence[int]], scores_of: Callable[[int], Scores]
    ) -> tuple[list[int], list[bool]]:
        """As `StopChecker.cut`; a row whose criteria raise stops."""
        counts, stopped = [1] * len(candidates), [True] * len(candidates)
        for index, row in enumerate(sequences.rows):
            stop = self._requests[row].stop
            if self._requests[row].error is not None:
                continue
            if not stop.calls_criteria:
                counts[index], stopped[index] = stop.cut_by_token(sequences.lengths[index], candidates[index])
            else:
                with self._requests.own_errors(row):
                    own = stop.cut(sequences.single_row(index), [candidates[index]], scores_of)
                    (counts[index],), (stopped[index],) = own
        return counts, stopped


class RequestRecorder(Recorder):
    """Keeps nothing but what requests ask for."""

    def __init__(self, requests: RunningRequests):
        super().__init__(0, scores=False, logits=False, states=False)
        self._requests = requests

    def keeps(self, row: int) -> bool:
        return self._requests[row].generation.logprobs is not None

    def record(self, row: int, slots: Sequence[int], scores_TV: Tensor, logits_TV: Tensor) -> None:
        self._requests[row].record(logits_TV[list(slots)])


@dataclass(kw_only=True, eq=False)
class ContinuousBatchingLoop(DecodingLoop):
    """A `DecodingLoop` whose rows are requests: they join and leave, and there may be none.

    Args:
        keep: called with the committed tokens but the last, and their states, of a row that has stopped by itself.
    """

    requests: RunningRequests
    keep: Callable[[Sequence[int], RowStates], None]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.finished: list[RunningRequest] = []

    def admit(
        self,
        running: RunningRequest,
        states: RowStates | None,
        hidden: dict[int, Tensor],
        earlier: EarlierTexts | None,
    ) -> None:
        """Let a request join; arguments as of `join`. What it is to hold soon is allocated now."""
        capacity = Held(length=len(running.prompt), most=running.need).grown(GROWTH_OF_NEW)
        self.target.cache.reserve(len(self.requests) + 1, capacity)
        self.requests[self.join(running.prompt, states, hidden, earlier)] = running

    @property
    def held(self) -> list[Held]:
        """What every row takes, but those that are about to leave."""
        rows = zip(self.sequences.rows, self.target.cache.lengths, strict=True)
        return [Held(length=length, most=self.requests[row].need) for row, length in rows if row in self.requests]

    @property
    def newest(self) -> RunningRequest:
        """The request that has joined last."""
        return self.requests[max(self.requests)]

    def dismiss(self, running: RunningRequest) -> None:
        """Let a request go, in whatever state it is; it may join again, and goes on where it was."""
        (row,) = (row for row, other in self.requests.items() if other is running)
        del self.requests[row]
        index = self.sequences.rows.index(row)
        running.prompt = list(self.sequences.tokens[index])
        self.leave({index})

    def _report(self, committed: Committed) -> None:
        for index, row in enumerate(self.sequences.rows):
            tokens = committed.tokens[index]
            if self.requests[row].error is None:
                path = committed.paths[index][: len(tokens)]
                self.requests[row].append(tokens, path, committed.trees, index)

    def _max_depths(self) -> list[int]:
        """No deeper than each request allows."""
        most = [self.requests[row].generation.request.max_drafted for row in self.sequences.rows]
        depths = super()._max_depths()
        return [depth if limit is None else min(depth, limit) for depth, limit in zip(depths, most, strict=True)]

    def _let_go(self, stopped: Sequence[bool]) -> None:
        rows = list(self.sequences.rows)
        gone = {index for index, row in enumerate(rows) if stopped[index] or self.requests[row].error is not None}
        for index in sorted(gone):
            self._finish(index, rows[index])
        if gone:
            self.leave(gone)

    def _finish(self, index: int, row: int) -> None:
        running = self.requests[row]
        alone = self.sequences.single_row(index)
        if running.error is None:
            with self.requests.own_errors(row):
                running.finish(running.stop_reason(alone))
        if running.error is not None:
            running.finish("error", running.error)
            self.target.cache.clear_row(index)
        else:
            self.keep(alone.tokens[0][:-1], self.target.cache.row_views(index))
        self.finished.append(self.requests.pop(row))
