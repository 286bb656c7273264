"""What a request's settings amount to, as `model.generate()` prepares them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from specdec import options
from specdec.decoding.stopping import StopChecker
from specdec.engine.request import Request
from specdec.errors import UnsupportedOptionError
from specdec.hf import CACHE, STATES
from specdec.tree_model.compatibility import check_positions, rotation_limit

_UNKEPT = ("return_dict_in_generate", "output_scores", "output_logits")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRequest:
    """Processors and criteria of one row.

    Args:
        seed: None: greedy.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    seed: int | None


@torch.no_grad()
def prepare(model: PreTrainedModel, request: Request, tokenizer: PreTrainedTokenizerBase | None) -> PreparedRequest:
    """Check a request and let transformers make its processors and criteria. No forward is run.

    Raises:
        UnsupportedOptionError: an option that is not possible here.
        ValueError: a wrong argument.
    """
    prompt_1P = _as_tensor(request.prompt)
    _check(request)
    arguments = options.prepare(
        model,
        {
            "inputs": prompt_1P,
            "attention_mask": torch.ones_like(prompt_1P),
            "generation_config": _padded(model, request.config),
            "logits_processor": LogitsProcessorList(request.logits_processor),
            "stopping_criteria": StoppingCriteriaList(request.stopping_criteria),
            "tokenizer": tokenizer,
        },
    )
    return type(model).generate(model, **arguments, custom_generate=_Capture(request))


@dataclass(frozen=True)
class _Capture:
    """The "decoding method" that transformers calls with all that it has prepared."""

    request: Request

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> PreparedRequest:
        known = ("use_cache", "logits_to_keep", "attention_mask", CACHE, STATES)
        others = {name: value for name, value in model_inputs.items() if name not in known}
        options.check_model_inputs(model, others, generation_config)
        if len(input_ids) > 1:
            raise UnsupportedOptionError(
                f"num_return_sequences={len(input_ids)}: a request has one continuation; submit several"
            )
        for name in _UNKEPT:
            if getattr(generation_config, name, None):
                raise UnsupportedOptionError(f"{name}=True: an engine keeps no scores; ask for num_logprobs")
        stop = StopChecker(stopping_criteria)
        options.check_batch(logits_processor, stop, generation_config, num_rows=1)
        check_positions(model, input_ids.shape[1], stop.max_length)
        limit = rotation_limit(model)
        if limit is not None and stop.max_length > limit:
            raise UnsupportedOptionError(
                f"this model changes its rotary embedding at {limit} tokens, and with it that of all requests of the "
                f"batch; prompt and new tokens come to {stop.max_length}: lower max_new_tokens, or use "
                "specdec.generate()"
            )
        seed = None
        if generation_config.do_sample:
            seed = secrets.randbits(64) if self.request.seed is None else self.request.seed
        return PreparedRequest(processors=logits_processor, criteria=stopping_criteria, seed=seed)


def _as_tensor(prompt: Sequence[int]) -> Tensor:
    if isinstance(prompt, str) or not all(isinstance(token, int) for token in prompt):
        raise ValueError("a prompt is a sequence of token ids, for example tokenizer(text).input_ids")
    return torch.tensor([list(prompt)], dtype=torch.long)


def _check(request: Request) -> None:
    if not isinstance(request.config, GenerationConfig):
        raise ValueError(f"config is a GenerationConfig, got {type(request.config).__name__}")
    if request.seed is not None and not (isinstance(request.seed, int) and 0 <= request.seed < 1 << 64):
        raise ValueError(f"seed={request.seed!r}: a seed is an integer from 0 to 2**64 - 1, or None for a fresh one")
    count = request.num_logprobs
    if count is not None and not (isinstance(count, int) and count >= 0):
        raise ValueError(
            f"num_logprobs={count!r}: it is a number of tokens, 0 or more, or None for no log-probabilities"
        )


def _padded(model: PreTrainedModel, config: GenerationConfig) -> GenerationConfig:
    """The configuration with a padding token, which is never used here, but its absence is warned of every time."""
    if config.pad_token_id is not None or model.generation_config.pad_token_id is not None:
        return config
    padded = GenerationConfig.from_dict(config.to_dict())
    padded.pad_token_id = 0
    return padded
