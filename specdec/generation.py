"""`generate()`, `enable()` and `disable()`: transformers handles the arguments, then the loop takes over.

`model.generate(custom_generate=...)` prepares configuration, processors, criteria, masks and inputs for us, so that
a call means what it means there; what it would drop on that way (streamer, tokenizer) is kept here.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
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
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from specdec import options
from specdec.compatibility import check_model, check_positions, position_limit
from specdec.drafters import Drafter, PromptLookup, Run, SmallModel
from specdec.loop import DecodingLoop
from specdec.recording import Recorder
from specdec.sampling import Sampler
from specdec.sequences import Sequences
from specdec.stats import DecodingStats
from specdec.stopping import StopChecker
from specdec.streaming import StreamFeed
from specdec.target import TreeModel
from trees import GrowthPolicy

_MAX_PREALLOCATED = 1024
"""Slots reserved past the prompt at the start; longer runs grow as they go."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `model.generate(return_dict_in_generate=True)` returns, and `stats`."""

    stats: DecodingStats | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    drafter: Drafter | PreTrainedModel | str | None = None,
    tree: GrowthPolicy | None = None,
    verify: str = "topdown",
    router: None = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> SpeculativeOutput | Tensor:
    """Generate what `model.generate()` would, sooner. Lossless.

    Greedy output equals `model.generate(do_sample=False)` token for token, up to numerical ties; sampled output
    has exactly the target's processed distribution (speculative sampling: Leviathan et al. 2023).

    Args:
        model: the target, a decoder-only model with sdpa or eager attention. It is not changed.
        inputs: int64 [B, P] prompts, padded to the left, like every other argument of `model.generate()`:
            `attention_mask`, `inputs_embeds`, `generation_config` and its fields, `logits_processor`,
            `stopping_criteria`, `stop_strings` with `tokenizer`, `streamer`, `prefix_allowed_tokens_fn`,
            `past_key_values`, ... Processors and criteria must depend on nothing but their arguments: they also see
            prefixes that are drafted and then dropped.
        drafter: a `specdec.drafters` instance, a smaller model of the same tokenizer, or None / "auto".
        tree: how drafts grow, a `trees` policy; None leaves it to the drafter.
        verify: "topdown" (multi-round residual sampling).
        router: step-level routing (lossy by design) is not part of this version: None.
        generator: source of randomness on the model's device; None for torch's global one.

    Returns:
        int64 [B, P + new], or with `return_dict_in_generate=True` a `SpeculativeOutput`.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        UnsupportedOptionError: an option that is not possible here; it says what to use instead.
        DraftError: the drafter does not fit the model.
        NumericalError: the target's scores are NaN.
        ValueError: a wrong argument, with the message of `model.generate()` where it has one.
    """
    options.check_call(model, tree=tree, verify=verify, router=router, generator=generator)
    check_model(model)
    chosen = as_drafter(drafter)
    arguments = options.prepare(model, {"inputs": inputs, "generation_config": generation_config, **kwargs})
    streamer = arguments.get("streamer")

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> SpeculativeOutput | Tensor:
        sampler = Sampler(logits_processor, do_sample=generation_config.do_sample, verify=verify, generator=generator)
        stop = StopChecker(stopping_criteria)
        prompt = _Prompt.from_prepared(input_ids, model_inputs)
        options.check_batch(sampler.processors, stop, num_rows=input_ids.shape[0])
        check_positions(model, input_ids.shape[1], stop.max_length)
        return _decode(model, prompt, generation_config, sampler, stop, chosen, tree, streamer)

    return type(model).generate(model, **arguments, custom_generate=decode)


def enable(
    model: PreTrainedModel,
    *,
    drafter: Drafter | PreTrainedModel | str | None = None,
    tree: GrowthPolicy | None = None,
    verify: str = "topdown",
) -> PreTrainedModel:
    """Make `model.generate(...)` speculative, for everyone who calls it (pipelines too). Lossless.

    Args:
        model: the target; returned. Only its attribute `generate` is set.
        drafter, tree, verify: as in `generate`; a call may override them.

    Raises:
        UnsupportedModelError, UnsupportedOptionError, DraftError: as in `generate`, at once.
    """
    options.check_call(model, tree=tree, verify=verify, router=None, generator=None)
    check_model(model)
    defaults = {"drafter": as_drafter(drafter), "tree": tree, "verify": verify}

    @functools.wraps(type(model).generate)
    def speculative_generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> SpeculativeOutput | Tensor:
        return generate(self, *args, **{**defaults, **kwargs})

    model.generate = types.MethodType(speculative_generate, model)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`; does nothing to a model that is not enabled."""
    vars(model).pop("generate", None)
    return model


def as_drafter(drafter: Drafter | PreTrainedModel | str | None) -> Drafter:
    """The drafter that an argument stands for.

    Raises:
        ValueError: the argument is nothing that drafts.
    """
    if drafter is None or drafter == "auto":
        return PromptLookup()
    if isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        return SmallModel(drafter)
    raise ValueError(
        f"drafter={drafter!r}: pass a specdec.drafters instance, a smaller model of the same tokenizer, None or 'auto'"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """The inputs as transformers has prepared them.

    Args:
        cache: the caller's, or a new one; filled at the end.
        others: further inputs of the first forward (position_ids, inputs_embeds).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    cache: DynamicCache
    others: dict[str, Any]

    @classmethod
    def from_prepared(cls, input_ids: Tensor, model_inputs: dict[str, Any]) -> _Prompt:
        others = {name: value for name, value in model_inputs.items() if name not in ("use_cache", "logits_to_keep")}
        mask, cache = others.pop("attention_mask", None), others.pop("past_key_values")
        options.check_model_inputs(others)
        return cls(input_ids=input_ids, attention_mask=mask, cache=cache, others=others)


def _decode(
    model: PreTrainedModel,
    prompt: _Prompt,
    config: GenerationConfig,
    sampler: Sampler,
    stop: StopChecker,
    drafter: Drafter,
    tree: GrowthPolicy | None,
    streamer: BaseStreamer | None,
) -> SpeculativeOutput | Tensor:
    """Run the loop on a prepared call, and give the result the form that the call asks for."""
    num_rows, prompt_length = prompt.input_ids.shape
    capacity = min(stop.max_length, prompt_length + _MAX_PREALLOCATED)
    pad_token_id = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    returns_dict = bool(config.return_dict_in_generate)
    recorder = Recorder(
        num_rows,
        scores=returns_dict and bool(config.output_scores),
        logits=returns_dict and bool(config.output_logits),
        states=returns_dict or getattr(prompt.cache, "_is_user_defined", False),
    )
    target = TreeModel(model)
    sequences = Sequences(prompt.input_ids, prompt.attention_mask, capacity)
    stats = DecodingStats.for_rows(num_rows)
    session = drafter.start(
        Run(
            target=model,
            vocab_size=target.vocab_size,
            sequences=sequences,
            sampler=sampler,
            tree=tree,
            input_ids=prompt.input_ids,
            attention_mask=prompt.attention_mask,
        )
    )
    loop = DecodingLoop(
        target=target,
        session=session,
        sampler=sampler,
        stop=stop,
        sequences=sequences,
        recorder=recorder,
        stats=stats,
        feed=None if streamer is None else StreamFeed(streamer, num_rows, pad_token_id),
        context_length=position_limit(model),
    )
    try:
        loop.run(
            lambda: target.prefill(
                prompt.input_ids,
                attention_mask=prompt.attention_mask,
                past_key_values=prompt.cache,
                generation_config=config,
                capacity=capacity,
                **prompt.others,
            )
        )
    finally:
        session.close()
    recorder.refill(prompt.cache)
    stats.target_forwards, stats.draft_forwards = target.num_forwards, session.num_forwards
    ids = recorder.sequences(pad_token_id)
    if not returns_dict:
        return ids
    return SpeculativeOutput(
        sequences=ids,
        scores=recorder.scores(),
        logits=recorder.logits(),
        past_key_values=prompt.cache,
        stats=stats,
    )
