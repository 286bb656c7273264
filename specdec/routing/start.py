"""Sets up a routed run: two writers around the target and the draft, models or endpoints, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from routers import Need, Router, Segmenter
from specdec.decoding.drafter import DraftSession
from specdec.decoding.recording import Recorder
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stats import SpeculativeOutput
from specdec.decoding.stopping import StopChecker
from specdec.drafters import Auto, Drafter, PromptLookup, Run, SmallModel
from specdec.drafters.speculation import Speculation
from specdec.errors import EndpointError, UnsupportedOptionError
from specdec.routing.loop import AnyWriter, StepLoop
from specdec.routing.options import (
    ModelDrafter,
    check_is_text,
    check_routing,
    check_shared_cache,
    check_speculation,
    writer_of,
)
from specdec.routing.remote.endpoint import Endpoint
from specdec.routing.remote.writer import RemoteWriter, as_prompt
from specdec.routing.session import StepDrafter
from specdec.routing.stop import StepStop
from specdec.routing.writer import StepWriter
from specdec.streaming import StreamFeed
from specdec.tree_model.compatibility import check_positions, position_limit
from specdec.tree_model.model import TreeModel
from trees import Chain

_COPIED = PromptLookup(num_tokens=4, min_match=3)
"""Speeds a writer's own writing up; short, because a wrong copy costs a wider forward."""
_WIDEST_COPY, _WIDEST_DRAFT = 8, 16
"""See `StepWriter.widest`. What is copied is right less often than what the draft has written."""
_TURN = "\x01"
"""Stands for the text of a turn while the chat template is looked at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedCall:
    """A call whose prompt and options transformers has prepared.

    Args:
        input_ids, attention_mask: [B, P].
        others: further inputs of the target's prefill, [B, ...] each.
        capacity: tokens to make room for at the start.
        recorder: takes the rows that stop.
        feed: gets tokens by step.
        started: `perf_counter()` when the call began.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    others: dict[str, Any]
    sampler: Sampler
    criteria: StoppingCriteriaList
    capacity: int
    config: GenerationConfig
    recorder: Recorder
    feed: StreamFeed | None
    started: float

    def sequences(self) -> Sequences:
        """The text as a writer holds it: each has its own."""
        return Sequences(self.input_ids, self.attention_mask, self.capacity)

    def run(self, reader: TreeModel, vocab_size: int) -> Run:
        """What a session of a writer knows."""
        return Run(
            target=reader,
            vocab_size=vocab_size,
            sequences=self.sequences(),
            sampler=self.sampler,
            tree=None,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """How a call is routed.

    Args:
        router: decides.
        target: an endpoint; None for the model of the call.
        draft: an endpoint, or holds the draft model and how many tokens of it the target verifies at a time in steps of
            its own.
        tokenizer: of the text; steps are found by what its tokens spell.
        chooses: whether the target's own writing is drafted for by whatever is quickest (`Auto`), which may be the
            draft, prompt lookup or nobody; otherwise always by the draft.
    """

    router: Router
    target: Endpoint | None
    draft: ModelDrafter | Endpoint
    tokenizer: PreTrainedTokenizerBase
    chooses: bool = False

    def start(self, model: PreTrainedModel, call: RoutedCall) -> StepLoop:
        """The loop of a call.

        Args:
            model: that transformers has prepared the call for: the target, if it is no endpoint.

        Raises:
            DraftError: the draft model does not fit the target.
            EndpointError: an endpoint does not answer.
            UnsupportedOptionError: the draft model has too few positions, or an endpoint cannot do what the call or the
                router asks for.
        """
        target = None if self.target else TreeModel(model)
        if self.router.shares_cache:
            assert isinstance(self.draft, ModelDrafter), "`check_routing` has looked"
            check_shared_cache(self.draft, model)
        draft = self._draft(target, call)
        writer = self._target(target, draft, call)
        if self.router.shares_cache and isinstance(draft, StepWriter) and isinstance(writer, StepWriter):
            draft.share_cache_of(writer)
        return StepLoop(
            self.router,
            draft,
            writer,
            decode=self.decode,
            ask=self.ask,
            token_of=self.token_of,
            recorder=call.recorder,
            feed=call.feed,
            started=call.started,
        )

    def generate(self, model: PreTrainedModel, call: RoutedCall) -> SpeculativeOutput:
        """Run the loop of a call to its end; arguments and errors as of `start`.

        Raises:
            UnsupportedOptionError: the prompt is more than text.
            EndpointError: an endpoint has failed for good; its `partial` holds what was generated until then.
        """
        check_is_text(call.others)
        loop = self.start(model, call)
        try:
            loop.run()
        except EndpointError as error:
            loop.keep_partial()
            error.partial = self._output(loop, call)
            raise
        finally:
            loop.close()
        return self._output(loop, call)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def token_of(self, text: str) -> int:
        """The id of a text of one token.

        Raises:
            ValueError: it has more.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens here: a router can ask for answers of one token only")
        return ids[0]

    def ask(self, question: str, opening: str) -> list[int]:
        """What follows a step to put a question about it: in a turn of its own, where the tokenizer has turns."""
        text = f"\n\n{question}\n{opening}"
        if self.tokenizer.chat_template is not None:
            turns = [{"role": role, "content": _TURN} for role in ("user", "assistant")]
            turns.append({"role": "user", "content": question})
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            text = rendered.split(_TURN)[-1] + opening
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _output(self, loop: StepLoop, call: RoutedCall) -> SpeculativeOutput:
        return loop.recorder.output(loop.stats, call.config, device=call.input_ids.device)

    def _draft(self, target: TreeModel | None, call: RoutedCall) -> AnyWriter:
        if isinstance(self.draft, Endpoint):
            if "hidden" in self.router.needs:
                raise UnsupportedOptionError(
                    f"{type(self.router).__name__} reads hidden states of the draft, which no endpoint gives: take a "
                    "router that was trained without them, or draft with a model here"
                )
            return self._remote(self.draft, call, needs=self.router.needs & {"signals"})
        reader = TreeModel(self._draft_model(self.draft, target))
        run = call.run(reader, (target or reader).vocab_size)
        if target is not None and isinstance(self.draft, SmallModel):
            self.draft.check_fit(run)
        _check_draft_positions(reader.model, call.input_ids.shape[1], StopChecker(call.criteria).max_length)
        return self._local(run, _COPIED.start(run), call, wants_hidden="hidden" in self.router.needs, is_draft=True)

    @staticmethod
    def _draft_model(draft: ModelDrafter, target: TreeModel | None) -> PreTrainedModel:
        if isinstance(draft, SmallModel):
            return draft.model
        assert target is not None
        return draft.copy_of(target.model)

    def _target(self, target: TreeModel | None, draft: AnyWriter, call: RoutedCall) -> AnyWriter:
        if self.target is not None:
            return self._remote(self.target, call, needs=self.router.needs & {"log_probs", "answers"})
        assert target is not None
        run = call.run(target, target.vocab_size)
        session: DraftSession = _COPIED.start(run)
        if isinstance(draft, StepWriter):
            assert isinstance(self.draft, ModelDrafter)
            assert isinstance(self.draft.policy, Chain)
            drafter = StepDrafter(draft, self.draft.policy.length)
            session = (_choice_of(drafter) if self.chooses else drafter).start(run)
        return self._local(run, session, call)

    def _local(
        self, run: Run, session: DraftSession, call: RoutedCall, *, wants_hidden: bool = False, is_draft: bool = False
    ) -> StepWriter:
        return StepWriter(
            target=run.target,
            session=session,
            sampler=call.sampler,
            stop=self._stop(run.sequences, call),
            sequences=run.sequences,
            recorder=call.recorder,
            feed=None,
            context_length=position_limit(run.target.model),
            started=call.started,
            prefill=_prefill(call, {} if is_draft else call.others),
            vocab_size=run.vocab_size,
            widest=_WIDEST_COPY if is_draft else _WIDEST_DRAFT,
            reads_first=self.chooses and not is_draft,
            wants_signals=is_draft,
            wants_hidden=wants_hidden,
        )

    def _remote(self, endpoint: Endpoint, call: RoutedCall, *, needs: frozenset[Need]) -> RemoteWriter:
        if call.input_ids.shape[1] == 0:
            raise UnsupportedOptionError("an endpoint reads token ids or text, no inputs_embeds: pass input_ids")
        sequences, ends = call.sequences(), call.config.eos_token_id
        writer = RemoteWriter(
            endpoint,
            self.tokenizer,
            sequences=sequences,
            stop=self._stop(sequences, call),
            sampler=call.sampler,
            vocab_size=len(self.tokenizer),
            end_token=ends[0] if isinstance(ends, list) else ends,
        )
        endpoint.connect()
        prompt = as_prompt(endpoint, self.tokenizer, sequences.tokens[0])
        writer.num_alternatives = self._agree(endpoint, prompt, needs)
        writer.fields = endpoint.accepted(prompt, writer.fields)
        return writer

    def _agree(self, endpoint: Endpoint, prompt: list[int] | str, needs: frozenset[Need]) -> int:
        """How many log-probabilities to ask for at each token: none where nobody reads them, or the ids beside them.

        Raises:
            UnsupportedOptionError: the endpoint does not give what the router needs.
        """
        name, listed = type(self.router).__name__, 0
        if needs or endpoint.prompts == "ids":
            listed = endpoint.num_alternatives(prompt)
        if needs & {"signals", "answers"} and listed < 2:
            raise UnsupportedOptionError(
                f"{name} reads probabilities of the next token, and {endpoint} gives {listed} of them: take a router "
                "that reads texts, or a server that answers logprobs="
            )
        if "log_probs" in needs and not endpoint.scores_prompts(prompt):
            raise UnsupportedOptionError(
                f"{name} asks for the probability of a given step, and {endpoint} gives none (echo= with logprobs=, on "
                "token ids): take a router that does not ask the target, or another server"
            )
        return listed if "signals" in needs else min(listed, 1)

    def _stop(self, sequences: Sequences, call: RoutedCall) -> StepStop:
        segmenter = Segmenter(self.router.steps, self.decode)
        return StepStop(call.criteria, segmenter, [len(tokens) for tokens in sequences.tokens])


def local_model(target: Endpoint, drafter: Any, router: Router | None, tokenizer: Any) -> PreTrainedModel:
    """The model that the arguments are prepared for, where the target is remote: the draft's, if that is here.

    Raises:
        ValueError: there is no router.
    """
    if router is None:
        raise ValueError("an endpoint writes whole steps: pass router= (routers.AlwaysTarget() for its steps alone)")
    writer = writer_of(drafter)
    if isinstance(writer, SmallModel):
        return writer.model
    check_routing(router, target, drafter, tokenizer)
    return stand_in(tokenizer)


def as_routing(
    router: Router,
    target: Endpoint | None,
    drafter: Drafter | PreTrainedModel | Endpoint | str | None,
    speculation: Speculation,
    arguments: Mapping[str, Any],
) -> Routing:
    """What a router needs besides.

    Raises:
        UnsupportedOptionError: an option that does not go with a router.
        ValueError: the draft model or the tokenizer is missing.
    """
    tokenizer = arguments.get("tokenizer")
    draft, chooses = check_routing(router, target, drafter, tokenizer), not isinstance(drafter, ModelDrafter)
    check_speculation(speculation)
    return Routing(router=router, target=target, draft=draft, tokenizer=tokenizer, chooses=chooses)


def stand_in(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that never runs, for calls without one: transformers prepares arguments for models only."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2**31 - 1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval()
    model.config.vocab_size = len(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _choice_of(drafter: Drafter) -> Auto:
    """Of the draft's writer, prompt lookup and nobody: the copy of the target may be the draft itself."""
    auto = Auto(drafter)
    auto.brings_own = False
    return auto


def _prefill(call: RoutedCall, inputs: dict[str, Any]) -> Callable[[TreeModel, Sequence[int]], None]:
    def prefill(model: TreeModel, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=call.input_ids.device)
        mask = None if call.attention_mask is None else call.attention_mask[chosen].to(model.device)
        readable = call.input_ids[chosen].clamp(max=model.vocab_size - 1).to(model.device)
        others = {name: value[chosen].to(model.device) for name, value in inputs.items() if value is not None}
        model.prefill(readable, attention_mask=mask, generation_config=call.config, capacity=call.capacity, **others)

    return prefill


def _check_draft_positions(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """A draft that only proposes tokens may do so past its positions; one that writes may not."""
    limit = position_limit(model)
    if max_length > limit:
        raise UnsupportedOptionError(
            f"the run may reach {max_length} tokens but the draft {type(model).__name__} has {limit} positions: lower "
            "max_new_tokens, or take another draft"
        )
    check_positions(model, prompt_length, max_length)
