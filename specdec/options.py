"""The arguments of a call, looked through before any work: what is honoured passes, what is not is refused here.

An option is honoured or refused, never silently dropped. What transformers itself checks (unknown names, lengths,
config conflicts) is left to it, so that its users see the messages that they know.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.generation import logits_process as lp

from specdec.decoding.stopping import StopChecker
from specdec.errors import UnsupportedOptionError
from specdec.hf import CACHE, home_device, with_cache_named
from specdec.tree_model.positions import text_positions

_REFUSED_ARGUMENTS = {
    "assistant_model": "pass it as drafter=",
    "assistant_tokenizer": "pass specdec.drafters.ForeignModel(model, tokenizer, target_tokenizer) as drafter=",
    "custom_generate": "specdec.generate() is itself a decoding method; call model.generate(custom_generate=...)",
    "negative_prompt_ids": "guidance runs a second model pass a token; call model.generate()",
    "negative_prompt_attention_mask": "guidance runs a second model pass a token; call model.generate()",
    "synced_gpus": "sharded parameters (FSDP, ZeRO 3) are not supported; call model.generate()",
}

_REFUSED_SETTINGS = {
    "output_attentions": "attention weights of drafted tokens are not kept; call model.generate()",
    "output_hidden_states": "hidden states of drafted tokens are not kept; call model.generate()",
    "prompt_lookup_num_tokens": "pass drafter=specdec.drafters.PromptLookup(num_tokens=...)",
    "assistant_early_exit": "pass drafter=specdec.drafters.EarlyExit(exit_layer=...)",
    "use_mtp": "no drafter runs multi-token prediction heads; leave it out, or call model.generate()",
    "dola_layers": "DoLa is another decoding method; call model.generate()",
    "token_healing": "heal the prompt first (model.heal_tokens), then pass it",
    "guidance_scale": "guidance runs a second model pass a token; call model.generate()",
}

_MODE_ADVICE = {
    GenerationMode.BEAM_SEARCH: "beams have no draft to verify; use num_beams=1 or call model.generate()",
    GenerationMode.BEAM_SAMPLE: "beams have no draft to verify; use num_beams=1 or call model.generate()",
    GenerationMode.CONTRASTIVE_SEARCH: "remove penalty_alpha, or call model.generate()",
}

_KNOWN_MODEL_INPUTS = frozenset({"position_ids", "inputs_embeds"})
_OF_IMAGES = frozenset(
    {"token_type_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"}
)
"""Where the images of a prompt are and how large. Models that read images make the prompt's positions and masks of
them; later steps are given them in vain."""
_STATEFUL_PROCESSORS = (lp.UnbatchedClassifierFreeGuidanceLogitsProcessor,)


def prepare(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    *,
    check: Callable[[GenerationConfig, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The arguments for `model.generate(custom_generate=...)`.

    Args:
        check: refuses what this kind of call has no use for, of the config that it amounts to and the arguments.

    Raises:
        UnsupportedOptionError: an option that is not possible here.
        ValueError: a wrong prompt.
    """
    _check_steps(model)
    arguments = with_cache_named(arguments)
    for name, advice in _REFUSED_ARGUMENTS.items():
        value = arguments.pop(name, None)
        if value is not None and value is not False:
            raise UnsupportedOptionError(f"{name} is not possible with specdec: {advice}")
    tokenizer = arguments.pop("tokenizer", None)
    config = _effective_config(model, arguments)
    _check_settings(config)
    if check is not None:
        check(config, arguments)
    _check_prompt(model, arguments)
    _check_cache(arguments.get(CACHE))
    if config.stop_strings is not None:
        arguments = _with_stop_strings(model, arguments, config.stop_strings, tokenizer)
    return arguments


def check_model_inputs(
    model: PreTrainedModel,
    model_inputs: dict[str, Any],
    config: GenerationConfig,
    attention_mask: Tensor | None = None,
) -> dict[str, Any]:
    """Refuse inputs of the forward that drafted tokens would need too, and prompts that transformers would cut wrongly.

    Returns:
        The inputs that say something (transformers passes an empty `mm_encoder_outputs` with a text). Positions of
        text are [B, P]; those of a prompt with images are planes [A, B, P].

    Raises:
        UnsupportedOptionError: names them.
    """
    given = {name: value for name, value in model_inputs.items() if not (value is None or value == {})}
    reads_images = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    unknown = given.keys() - _KNOWN_MODEL_INPUTS - (_OF_IMAGES if reads_images else set())
    unknown = unknown and unknown & _inputs_of_a_step(model, given)
    if unknown:
        raise UnsupportedOptionError(
            "specdec does not know how to continue these model inputs over drafted tokens: "
            f"{', '.join(sorted(unknown))}; leave them out or call model.generate()"
        )
    if "inputs_embeds" in given and config.prefill_chunk_size is not None:
        raise UnsupportedOptionError(
            "prefill_chunk_size= cuts input_ids, not inputs_embeds, into chunks: leave one of the two out"
        )
    if "position_ids" in given:
        positions_BP = text_positions(given["position_ids"], attention_mask)
        given["position_ids"] = given["position_ids"] if positions_BP is None else positions_BP
    return given


def check_batch(processors: LogitsProcessorList, stop: StopChecker, config: GenerationConfig, num_rows: int) -> None:
    """Refuse processors that keep a model pass of their own, and rows that could not be padded.

    Raises:
        UnsupportedOptionError: says what to do.
        ValueError: an end-of-sequence criterion of the caller's, without the padding that it asks for.
    """
    for processor in processors:
        if isinstance(processor, _STATEFUL_PROCESSORS):
            raise UnsupportedOptionError(
                f"{type(processor).__name__} keeps a state of its own per token: call model.generate()"
            )
    if stop.has_eos and config._pad_token_tensor is None:
        raise ValueError("a criterion with an eos_token_id fills finished rows with padding: pass pad_token_id=")
    if num_rows > 1 and stop.stops_rows_apart and not stop.has_eos:
        raise UnsupportedOptionError(
            "rows of a batch that stop at different lengths are filled with padding, which transformers does only "
            "when an eos_token_id is set: pass eos_token_id= (and pad_token_id=)"
        )


def _inputs_of_a_step(model: PreTrainedModel, given: dict[str, Any]) -> set[str]:
    """Which of the prompt's inputs plain decoding gives to a step after the prompt too."""
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=home_device(model))
    inputs = model.prepare_inputs_for_generation(token_11, is_first_iteration=False, use_cache=True, **given)
    return {name for name, value in inputs.items() if value is not None}


def _check_steps(model: PreTrainedModel) -> None:
    """Learned prompts of peft are put before the text at every step, by its own `prepare_inputs_for_generation`."""
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    if owner is not model:
        raise UnsupportedOptionError(
            f"a {type(owner).__name__} prepares the inputs of every step, which drafted tokens would need too: use its "
            "own generate()"
        )


def _effective_config(model: PreTrainedModel, arguments: dict[str, Any]) -> GenerationConfig:
    """The generation config that the call amounts to (transformers merges it again, from the same parts)."""
    own = {name: value for name, value in arguments.items() if name not in ("inputs", "generation_config")}
    given = arguments.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(f"generation_config is a GenerationConfig, got {type(given).__name__}")
    return model._prepare_generation_config(given, **own)[0]


def _check_settings(config: GenerationConfig) -> None:
    for name, advice in _REFUSED_SETTINGS.items():
        value = getattr(config, name, None)
        if value and not (name == "guidance_scale" and value == 1):
            raise UnsupportedOptionError(f"{name}={value!r} is not possible with specdec: {advice}")
    if config.use_cache is False:
        raise UnsupportedOptionError("use_cache=False: drafts are verified on a cache; leave it out")
    if config.cache_implementation not in (None, "dynamic"):
        raise UnsupportedOptionError(
            f"cache_implementation={config.cache_implementation!r}: specdec brings its own cache; leave it out"
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        advice = _MODE_ADVICE.get(mode, "call model.generate()")
        raise UnsupportedOptionError(f"{mode.value} is not possible with specdec: {advice}")


def _check_prompt(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    mask = arguments.get("attention_mask")
    inputs = arguments.get("inputs")
    input_ids = arguments.get("input_ids") if inputs is None else inputs
    if input_ids is not None and arguments.get("inputs_embeds") is None:
        _check_input_ids(input_ids, model.config.get_text_config(decoder=True).vocab_size)
        if mask is not None and arguments.get(CACHE) is None and mask.shape[:2] != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)} but input_ids are {tuple(input_ids.shape)}: one entry a token"
            )
    if mask is not None and mask.ndim == 2:
        if bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "the last token of a row is masked: prompts are padded to the left (tokenizer.padding_side = 'left')"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask holds something else than 0 and 1: pass 1 for tokens, 0 for padding")


def _check_input_ids(input_ids: Any, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids are a tensor (return_tensors='pt'), got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids are int64 token ids, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are [rows, tokens], got shape {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"the prompt is empty (input_ids are {tuple(input_ids.shape)}): pass at least one token")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"token id {wrong} is outside the model's vocabulary of {vocab_size}: encode with its own tokenizer"
        )


def _check_cache(cache: Any) -> None:
    if cache is not None and type(cache) is not DynamicCache:
        raise UnsupportedOptionError(
            f"the cache is a {type(cache).__name__}: pass a transformers.DynamicCache, or none"
        )


def _with_stop_strings(
    model: PreTrainedModel, arguments: dict[str, Any], stop_strings: Any, tokenizer: Any
) -> dict[str, Any]:
    """Turn stop strings into the criterion that transformers makes of them.

    On the way through `custom_generate` it would lose the tokenizer and refuse the call.
    """
    if tokenizer is None:
        raise ValueError("stop_strings need the model's tokenizer: pass tokenizer=")
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)
    given = arguments.get("stopping_criteria") or ()
    changed = {**arguments, "stopping_criteria": StoppingCriteriaList([criterion, *given])}
    if arguments["generation_config"] is not None:
        changed["generation_config"] = copy.deepcopy(arguments["generation_config"])
        changed["generation_config"].stop_strings = None
    if "stop_strings" in arguments or model.generation_config.stop_strings is not None:
        changed["stop_strings"] = None
    return changed
