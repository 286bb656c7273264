"""What is asked of an engine, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from trees import TokenTree

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt, and how it is to be continued. What other requests are at work changes nothing of the result.

    Args:
        prompt: real token ids, at least one, without padding.
        config: as for `model.generate()`: max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty,
            eos_token_id, stop_strings (the engine then needs a tokenizer), ... Fields that are not set are the model's
            own. One continuation a request: `num_return_sequences` is refused.
        seed: sampled output depends on nothing but the request and this; None takes a fresh one.
        logits_processor: the request's own, a grammar for example. They are called with one row, [1, L] and [1, V],
            and must be functions of their arguments: they also see prefixes that are drafted and then dropped.
        stopping_criteria: the request's own, called with one row.
        client: whose request it is. While more requests wait than there are rows, clients take turns; of one client the
            order is that of arrival.
        max_drafted: most tokens that a round may draft one after the other; 0 drafts nothing, None leaves it to the
            drafter.
        keeps_rounds: whether `Generation.rounds` tells what each round drafted and kept.
        kind: names requests whose replies are alike: those of a client, or of a job. Drafts are then also copied from
            earlier replies of the same kind, the latest 16,384 tokens of them at least. Empty: from the text itself
            alone. Only the time that a request takes depends on it.
        adapter: the LoRA adapter to decode with, by its name in a `LoraEngine`; None: the base.
        num_logprobs: None for none; k: of every committed token its log-probability, and the k likeliest.
        on_tokens: called with the new tokens, in the engine's thread, after every round that committed some.
        on_finish: called in the engine's thread, exactly once, when nothing more comes.
    """

    prompt: Sequence[int]
    config: GenerationConfig
    seed: int | None = None
    logits_processor: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    stopping_criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    client: str = ""
    max_drafted: int | None = None
    keeps_rounds: bool = False
    kind: str = ""
    adapter: str | None = None
    num_logprobs: int | None = None
    on_tokens: Callable[[Sequence[int]], None] | None = None
    on_finish: Callable[[Generation], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the target itself, before any processor.

    Args:
        logprob: of the committed token.
        top_ids: the likeliest tokens, the likeliest first.
        top_logprobs: theirs.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundReport:
    """What became of one round of a request.

    Args:
        tree: what was drafted.
        path: its accepted nodes, from the root down; cut where the request stopped.
        num_tokens: committed, the accepted ones included.
    """

    tree: TokenTree
    path: tuple[int, ...]
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class GenerationStats:
    """Counts and times of one request; times in seconds.

    Attributes:
        num_reused_tokens: of the prompt, whose keys and values were known.
        rounds: that the request took part in.
        drafted, accepted: tokens, in these rounds.
        accepted_histogram: rounds by how many tokens each of them accepted: the first entry counts those with none.
        queued_seconds: from `submit` until the prompt began to be read.
        prefill_seconds: spent on reading the prompt.
        first_token_seconds: from `submit` to the first token; None before.
        seconds: from `submit` to the end (until now, while it goes on).
    """

    num_prompt_tokens: int
    num_reused_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_histogram: list[int] = field(default_factory=list)
    queued_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_token_seconds: float | None = None
    seconds: float = 0.0


class Generation:
    """A request under way, or done. Written by the engine's thread; others may read.

    Attributes:
        request: what was asked.
        tokens: new tokens so far; an end-of-sequence token is the last of them.
        finish_reason: None while it goes on; "stop" (end of sequence, stop string, criterion), "length" (no more tokens
            were allowed), "cancelled", or "error".
        error: what went wrong, if that is the reason.
        logprobs: one entry a token, None if they were not asked for.
        rounds: one entry a round, None if they were not asked for.
        stats: counts and times.
    """

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.logprobs: list[TokenLogprobs] | None = None if request.num_logprobs is None else []
        self.rounds: list[RoundReport] | None = [] if request.keeps_rounds else None
        self.stats = GenerationStats(num_prompt_tokens=len(request.prompt))

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
