"""`generate()`, `enable()` and `disable()`: transformers handles the arguments, then the loop takes over.

`model.generate(custom_generate=...)` prepares configuration, processors, criteria, masks and inputs for us, so that
a call means what it means there; what it would drop on that way (streamer, tokenizer) is kept here.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import types
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from routers import Router
from specdec import options
from specdec.decoding.loop import DecodingLoop
from specdec.decoding.recording import Recorder, pad_token_id
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import Sequences
from specdec.decoding.stats import DecodingStats, SpeculativeOutput
from specdec.decoding.stopping import StopChecker
from specdec.decoding.tensor_parallel import ranks_of
from specdec.drafters import Drafter, Plain, Run
from specdec.drafters.head.loading import drafts_as_head, load_head
from specdec.drafters.head.network import HeadNetwork
from specdec.drafters.speculation import Speculation
from specdec.errors import UnsupportedOptionError
from specdec.hf import cache_name, home_device, num_processes
from specdec.kernels.model.profile import profile_of
from specdec.routing import Endpoint, RoutedCall, Routing, as_routing, check_routed, check_writer, local_model
from specdec.specs import DRAFTERS, DrafterSpec
from specdec.stages import OneOff, counted
from specdec.streaming import PastPrompt, StreamFeed
from specdec.tree_model.compatibility import check_positions, position_limit
from trees import GrowthPolicy

_logger = logging.getLogger("specdec")
_ONLY_HERE = ("generator", "router", "exact")
"""What the model's own `generate()` would not honour."""
_MAX_RESERVED = 1024
"""Slots reserved past the prompt at the start; longer runs grow as they go."""


@torch.no_grad()
def generate(
    model: PreTrainedModel | Endpoint,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    drafter: Drafter | PreTrainedModel | Endpoint | str | None = None,
    tree: GrowthPolicy | None = None,
    verify: str = "topdown",
    router: Router | None = None,
    generator: torch.Generator | None = None,
    exact: str | None = None,
    **kwargs: Any,
) -> SpeculativeOutput | Tensor:
    """Generate what `model.generate()` would, sooner. Lossless, unless a router is passed.

    Greedy output equals `model.generate(do_sample=False)` token for token, up to numerical ties; sampled output
    has exactly the target's processed distribution (speculative sampling: Leviathan et al. 2023).

    Args:
        model: the target, a decoder-only model with sdpa or eager attention. It is not changed. With a router it may
            be a `specdec.Endpoint`; arguments then mean what they mean to the draft model, if that is here.
        inputs: int64 [B, P] prompts, padded to the left, like every other argument of `model.generate()`:
            `attention_mask`, `inputs_embeds`, `generation_config` and its fields, `logits_processor`,
            `stopping_criteria`, `stop_strings` with `tokenizer`, `streamer`, `prefix_allowed_tokens_fn`,
            `cache` (or `past_key_values`), ... Processors and criteria must depend on nothing but their arguments:
            they also see prefixes that are drafted and then dropped.
        drafter: a `specdec.drafters` instance, or its name on the command line ("prompt-lookup:num_tokens=8"); None
            or "auto" chooses every round what is quickest, plain decoding included; so does a smaller model of the same
            tokenizer, or the folder of a draft head (`DraftHead`), which is then one of the choices.
        tree: how drafts grow, a `trees` policy; None leaves it to the drafter.
        verify: "topdown" (multi-round residual sampling) or "traversal" (accepts more; both are exact).
        router: a `routers` instance: `drafter`, a smaller model, then writes whole reasoning steps, and the target
            only those that the router gives to it. LOSSY by design (see `docs/routing.md`): what the router keeps is
            the draft's. Needs `tokenizer=`, by which steps are told apart. `drafter` may be a `specdec.Endpoint` too.
        generator: source of randomness on the model's device; None for torch's global one.
        exact: "bits": logits, and so greedy output, are the same bits whoever drafts, `drafters.Plain()` included, by
            forwards of one shape, at some cost (`docs/hardware.md`). None: they are equal up to rounding.

    Returns:
        int64 [B, P + new], or with `return_dict_in_generate=True` a `SpeculativeOutput`.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        UnsupportedOptionError: an option that is not possible here; it says what to use instead.
        DraftError: the drafter does not fit the model.
        EndpointError: an endpoint has failed for good; its `partial` holds what was generated until then.
        NumericalError: the target's scores are NaN.
        ValueError: a wrong argument, with the message of `model.generate()` where it has one.
    """
    started = perf_counter()
    target = None
    if isinstance(model, Endpoint):
        target, model = model, local_model(model, drafter, router, kwargs.get("tokenizer"))
    drafter = _named(drafter) if isinstance(drafter, str) else drafter
    if exact and router is not None:
        raise UnsupportedOptionError(f"exact={exact!r}: {type(router).__name__} keeps what a draft says: leave it out")
    speculation = Speculation.of(
        drafter if router is None else Plain(), tree=tree, verify=verify, generator=generator, exact=exact
    )
    speculation.check(model)
    if router is not None:
        check_writer(model)
    if router is not None and num_processes(model) > 1:
        raise UnsupportedOptionError(
            f"{type(router).__name__} does not go with a model that is split over processes (tp_plan): load it whole, "
            "or with device_map='auto'"
        )
    given = {"inputs": inputs, "generation_config": generation_config, **kwargs}
    routing = None if router is None else as_routing(router, target, drafter, speculation, given)
    arguments = options.prepare(model, given, check=None if routing is None else check_routed)
    method = _DecodingMethod(
        speculation=speculation,
        routing=routing,
        streamer=arguments.get("streamer"),
        started=started,
    )
    with counted(method.setup):
        return type(model).generate(model, **arguments, custom_generate=method)


def last_stats(model: PreTrainedModel) -> DecodingStats | None:
    """What the last call for a model did, also where its result has no `stats`: after a pipeline, or with a streamer.

    None: there was no call yet, or the last one was left to the model's own `generate()` (see `enable`).
    """
    return profile_of(model).part(_LastCall).stats


@dataclass(slots=True)
class _LastCall:
    stats: DecodingStats | None = None


def _named(text: str) -> Drafter | HeadNetwork | str:
    """The drafter of that name, or the draft head in that folder; anything else is left as it is.

    Raises `ValueError` for a wrong parameter.
    """
    if drafts_as_head(text):
        return load_head(text)
    if text.partition(":")[0] not in DRAFTERS:
        return text
    spec = DrafterSpec.parse(text)
    if spec.needs_draft:
        raise ValueError(
            f"drafter={text!r} drafts with a smaller model: pass the model itself, or a specdec.drafters instance"
        )
    return spec.build()


def enable(
    model: PreTrainedModel,
    *,
    drafter: Drafter | PreTrainedModel | str | None = None,
    tree: GrowthPolicy | None = None,
    verify: str = "topdown",
    unsupported: str = "plain",
    verbose: bool = False,
) -> PreTrainedModel:
    """Make `model.generate(...)` speculative, for everyone who calls it (pipelines too). Lossless.

    Args:
        model: the target; returned. Only its attribute `generate` is set.
        drafter, tree, verify: as in `generate`; a call may override them.
        unsupported: what becomes of a call with options that are not possible here (beams, ...): "plain" leaves it to
            the model's own `generate()`, and warns once for each reason (logger `specdec`); "error" raises. What only
            specdec has (`generator=`, `router=`, `exact=`) is never dropped: with one of them such a call raises.
        verbose: print a line to stderr after each call: its tokens, its speed, and what was accepted.

    Raises:
        UnsupportedModelError, UnsupportedOptionError, DraftError: as in `generate`, at once.
    """
    if unsupported not in ("plain", "error"):
        raise ValueError(f"unsupported={unsupported!r}: it is 'plain' or 'error'")
    drafter = _named(drafter) if isinstance(drafter, str) else drafter
    Speculation.of(drafter, tree=tree, verify=verify).check(model)
    defaults = {"drafter": drafter, "tree": tree, "verify": verify}
    names = [name for name in inspect.signature(type(model).generate).parameters if name != "self"]
    reasons: set[str] = set()

    @functools.wraps(type(model).generate)
    def speculative_generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        try:
            output = generate(self, **{**defaults, **given})
            if verbose:
                print(f"specdec: {last_stats(self)}", file=sys.stderr)
            return output
        except UnsupportedOptionError as error:
            if unsupported == "error" or any(given.get(name) is not None for name in _ONLY_HERE):
                raise
            _warn_once(error, reasons)
            if error.prompt_is_streamed and given.get("streamer") is not None:
                given["streamer"] = PastPrompt(given["streamer"])
        profile_of(self).part(_LastCall).stats = None
        ours = (*defaults, *_ONLY_HERE)
        return type(self).generate(self, **{name: value for name, value in given.items() if name not in ours})

    model.generate = types.MethodType(speculative_generate, model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`; does nothing to a model that is not enabled."""
    vars(model).pop("generate", None)
    return model


def _warn_once(error: UnsupportedOptionError, reasons: set[str]) -> None:
    reason = re.sub(r"\d+", "", str(error))  # the same of another length is the same
    if reason not in reasons:
        reasons.add(reason)
        _logger.warning("%s. This call is left to the model's own generate(), not sped up", error)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """The inputs as transformers has prepared them.

    Args:
        cache: the caller's, or a new one; filled at the end.
        others: further inputs of the first forward (position_ids, inputs_embeds, what images have been encoded to).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    cache: DynamicCache
    others: dict[str, Any]

    @classmethod
    def from_prepared(
        cls, model: PreTrainedModel, input_ids: Tensor, model_inputs: dict[str, Any], config: GenerationConfig
    ) -> _Prompt:
        device = home_device(model)
        others = {name: value for name, value in model_inputs.items() if name not in ("use_cache", "logits_to_keep")}
        mask, cache = others.pop("attention_mask", None), others.pop(cache_name(model))
        others = options.check_model_inputs(model, others, config, mask)
        if mask is not None:
            mask = mask.to(device)
        others = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in others.items()}
        return cls(input_ids=input_ids.to(device, torch.int64), attention_mask=mask, cache=cache, others=others)


@dataclass(frozen=True, kw_only=True, eq=False)
class _DecodingMethod:
    """The decoding method that transformers calls once it has prepared the arguments."""

    speculation: Speculation
    routing: Routing | None
    streamer: BaseStreamer | None
    started: float
    setup: OneOff = field(default_factory=OneOff)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> SpeculativeOutput | Tensor:
        stop = StopChecker(stopping_criteria)
        try:
            prompt = _Prompt.from_prepared(model, input_ids, model_inputs, generation_config)
            options.check_batch(logits_processor, stop, generation_config, num_rows=input_ids.shape[0])
            check_positions(model, input_ids.shape[1], stop.max_length)
        except UnsupportedOptionError as error:
            error.prompt_is_streamed = True  # transformers has done so
            raise
        sampler = Sampler(
            logits_processor,
            do_sample=generation_config.do_sample,
            verify=self.speculation.verify,
            generator=self.speculation.generator,
        )
        if self.routing is not None:
            return self._route(self.routing, model, prompt, sampler, stopping_criteria, generation_config)
        loop = self._loop(model, prompt, sampler, stop, generation_config)
        try:
            loop.run(
                functools.partial(
                    loop.target.prefill,
                    prompt.input_ids,
                    attention_mask=prompt.attention_mask,
                    past_key_values=prompt.cache,
                    generation_config=generation_config,
                    capacity=_capacity(prompt, stop),
                    **prompt.others,
                )
            )
        finally:
            loop.session.close()
        loop.recorder.refill(prompt.cache)
        profile_of(model).part(_LastCall).stats = loop.stats
        output = loop.recorder.output(loop.stats, generation_config, device=input_ids.device, cache=prompt.cache)
        return _as_asked(output, generation_config)

    def _route(
        self,
        routing: Routing,
        model: PreTrainedModel,
        prompt: _Prompt,
        sampler: Sampler,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> SpeculativeOutput | Tensor:
        num_rows = prompt.input_ids.shape[0]
        call = RoutedCall(
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
            others=prompt.others,
            sampler=sampler,
            criteria=criteria,
            capacity=_capacity(prompt, StopChecker(criteria)),
            config=config,
            recorder=Recorder(num_rows, scores=False, logits=False, states=False),
            feed=self._feed(num_rows, config),
            started=self.started,
        )
        output = routing.generate(model, call)
        profile_of(model).part(_LastCall).stats = output.stats
        return _as_asked(output, config)

    def _feed(self, num_rows: int, config: GenerationConfig) -> StreamFeed | None:
        return None if self.streamer is None else StreamFeed(self.streamer, num_rows, pad_token_id(config))

    def _loop(
        self,
        model: PreTrainedModel,
        prompt: _Prompt,
        sampler: Sampler,
        stop: StopChecker,
        config: GenerationConfig,
    ) -> DecodingLoop:
        num_rows, ranks = prompt.input_ids.shape[0], ranks_of(model)
        target = self.speculation.make_target(model, num_rows)
        sequences = Sequences(prompt.input_ids, prompt.attention_mask, _capacity(prompt, stop))
        run = Run(
            target=target,
            vocab_size=target.vocab_size,
            sequences=sequences,
            sampler=sampler,
            tree=self.speculation.tree,
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
        )
        returns_dict = bool(config.return_dict_in_generate)
        return DecodingLoop(
            target=target,
            session=ranks.start(self.speculation.drafter, run),
            sampler=sampler,
            stop=stop,
            sequences=sequences,
            recorder=Recorder(
                num_rows,
                scores=returns_dict and bool(config.output_scores),
                logits=returns_dict and bool(config.output_logits),
                states=returns_dict or getattr(prompt.cache, "_is_user_defined", False),
            ),
            feed=self._feed(num_rows, config),
            context_length=position_limit(model),
            started=self.started,
            ranks=ranks,
            setup=self.setup,
        )


def _capacity(prompt: _Prompt, stop: StopChecker) -> int:
    """Slots to reserve at the start: the whole run, unless it is far longer than most."""
    return min(stop.max_length, prompt.input_ids.shape[1] + _MAX_RESERVED)


def _as_asked(output: SpeculativeOutput, config: GenerationConfig) -> SpeculativeOutput | Tensor:
    return output if config.return_dict_in_generate else output.sequences
