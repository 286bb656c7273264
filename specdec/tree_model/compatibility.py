"""Which models can be decoded by tree exactly, found out before any work is done.

Known families are listed with the tests that cover them; any other model decodes a short text once, by trees and as
transformers does, and has to say the same (`specdec/tree_model/trial.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.errors import SpecdecError, UnsupportedModelError, UnsupportedOptionError
from specdec.kernels.model.profile import profile_of
from specdec.stages import stage
from specdec.tree_model.early_exit import EarlyExitModel
from specdec.tree_model.layer_kinds import keeps_states
from specdec.tree_model.quantised import weights_of
from specdec.tree_model.trial import trial_logits
from trees import TreeBatch

VERIFIED_FAMILIES = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo", "olmo2"),
        *("opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    }
)
"""`config.model_type` of the families whose greedy equality the test suite checks."""

_MOST_SLOTS = 256
"""More than a draft has."""
_MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(slots=True)
class PassedTrials:
    """Which trials a model has passed."""

    by_tree: object = None
    """With which kinds of weights."""
    in_parts: bool = False


def check_model(model: PreTrainedModel) -> None:
    """Refuse what cannot be decoded exactly.

    Raises:
        UnsupportedModelError: says what is in the way and what to use instead.
    """
    config = model.config
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; specdec decodes decoder-only models: use model.generate()"
        )
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} has no language-modelling head: load it with AutoModelForCausalLM")
    if model._is_stateful and getattr(config.get_text_config(decoder=True), "layer_types", None) is None:
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state elsewhere than in its cache, which cannot take back drafted tokens: use "
            "model.generate()"
        )
    spread = getattr(config, "distributed_config", None)
    if spread is not None and (spread.fsdp_size > 1 or spread.pp_size > 1):
        raise UnsupportedModelError(
            f"{name} is split by FSDP or into a pipeline, where every process would need tokens of its own: load it "
            "with tp_plan='auto', with device_map='auto', or use model.generate()"
        )
    attention = config.get_text_config(decoder=True)._attn_implementation
    if attention not in _MASKED_ATTENTION:
        raise UnsupportedModelError(
            f"attn_implementation={attention!r} takes no tree mask: load the model with "
            f"attn_implementation='sdpa' (or 'eager')"
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name} derives its ALiBi positions from the slots of a 2-D mask, which trees do not have: "
            "use model.generate()"
        )
    if "local" in getattr(config, "attention_layers", ()):
        raise UnsupportedModelError(
            f"{name} cuts the window of its local attention by cache slot, which is not a tree's position: "
            "use model.generate()"
        )
    weights = weights_of(model)
    if weights.round_activations:
        raise UnsupportedModelError(
            f"products of {name} round what goes into them (quantised activations), so that a token's logits jump with "
            "the tokens beside it: quantise the weights alone, or use model.generate()"
        )
    passed = profile_of(model).part(PassedTrials)
    if (weights.kinds or config.model_type not in VERIFIED_FAMILIES) and passed.by_tree != weights.kinds:
        _compare_with_plain(model)
        passed.by_tree = weights.kinds


def position_limit(model: PreTrainedModel) -> int:
    """Number of positions that the model was made for."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return sys.maxsize if limit is None else limit


def check_positions(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """Refuse prompts that do not fit, and runs in which the rotary embedding would change under way.

    Raises:
        UnsupportedOptionError: says which length is the limit.
    """
    limit = position_limit(model)
    if prompt_length > limit:
        raise UnsupportedOptionError(
            f"the prompt has {prompt_length} tokens but {type(model).__name__} has {limit} positions: shorten it"
        )
    _check_scaling(model, max_length)
    original = rotation_limit(model)
    if original is not None and prompt_length <= original < max_length:
        raise UnsupportedOptionError(
            f"this model changes its rotary embedding at {original} tokens, which a run from {prompt_length} to "
            f"{max_length} would cross: lower max_new_tokens or use model.generate()"
        )


def _check_scaling(model: PreTrainedModel, max_length: int) -> None:
    """Llama 4 scales queries by their place in the cache, which for drafted tokens is not their position."""
    config = model.config.get_text_config(decoder=True)
    first = getattr(config, "floor_scale", None)
    if first is None or not getattr(config, "attn_temperature_tuning", False):
        return
    if max_length + _MOST_SLOTS >= first:
        raise UnsupportedOptionError(
            f"this model scales its attention from {first} tokens on by their place in the cache, which a run to "
            f"{max_length} tokens and drafts of up to {_MOST_SLOTS} would come to: lower max_new_tokens or use "
            "model.generate()"
        )


def rotation_limit(model: PreTrainedModel) -> int | None:
    """Number of positions past which the rotary embedding of all positions changes; None if it never does."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    return rope.get("original_max_position_embeddings", position_limit(model))


@torch.no_grad()
def _compare_with_plain(model: PreTrainedModel) -> None:
    """Decode a short text by trees and as transformers does (`specdec/tree_model/trial.py`); the logits must agree."""
    name = type(model).__name__
    try:
        with stage(f"trying out {name}"):
            by_tree, by_steps = trial_logits(model, min(position_limit(model), rotation_limit(model) or sys.maxsize))
    except SpecdecError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} failed a trial of tree decoding ({type(error).__name__}, the cause of this error): "
            "use model.generate()"
        ) from error
    if not bool((by_tree - by_steps).abs().max() <= _tolerance(model, by_steps)):
        raise UnsupportedModelError(
            f"{name} gives other logits when tokens are verified as a tree: use model.generate()"
        )


def _tolerance(model: PreTrainedModel, logits: Tensor) -> Tensor:
    return (1e-3 if model.dtype == torch.float32 else 5e-2) * logits.abs().max().clamp_min(1.0)


@torch.no_grad()
def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model whose layers, run in two parts, do not give what its forward gives.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    passed = profile_of(model).part(PassedTrials)
    if passed.in_parts:
        return
    if keeps_states(model.config):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps states, which an exit would leave between two tokens: take another drafter"
        )
    try:
        in_parts, whole = _trial_exit(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} failed a trial of early exit ({error}): take another drafter"
        ) from error
    if not bool((in_parts - whole).abs().max() <= _tolerance(model, whole)):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits when its layers run in two parts (are some of them offloaded, "
            "or wrapped?): take another drafter"
        )
    passed.in_parts = True


def _trial_exit(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits after the root and two nodes, once with an exit in the middle of the layers and once without."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    *prompt, root, first, second = (7919 * (i + 1) % vocab_size for i in range(6))
    trial = EarlyExitModel(model)
    if trial.num_layers < 2:
        raise UnsupportedModelError(f"{type(model).__name__} has one layer: there is nothing to exit from")
    trial.prefill(torch.tensor([prompt], device=trial.device))
    trees = TreeBatch.chains(torch.tensor([[first, second]], device=trial.device))
    root_11 = torch.tensor([[root]], device=trial.device)
    whole = trial.verify(trees, root_11)
    trial.forget_tail()
    trial.forward_below(trial.num_layers // 2, root_11, torch.zeros_like(root_11), None)
    return trial.verify(trees, root_11).float(), whole.float()
