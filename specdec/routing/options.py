"""What a call with a router may ask for: the rest is refused before any work."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from routers import Router
from specdec.drafters import Auto, QuantizedSelf, SmallModel
from specdec.drafters.speculation import Speculation
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.hf import CACHE
from specdec.routing.remote.endpoint import Endpoint
from specdec.tree_model.layer_kinds import keeps_states

_OF_STATES = (
    *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rope_parameters", "layer_types", "sliding_window"),
)
"""What of a configuration says which keys and values there are."""

ModelDrafter: TypeAlias = SmallModel | QuantizedSelf
"""Drafters whose model can write steps."""


def writer_of(drafter: Any) -> Endpoint | ModelDrafter | None:
    """Who writes the steps of the draft; None if there is nobody.

    Args:
        drafter: as of `specdec.generate`; of `Auto` the one that it chooses from.
    """
    if isinstance(drafter, PreTrainedModel):
        return SmallModel(drafter)
    if isinstance(drafter, Auto):
        drafter = drafter.drafters[0] if len(drafter.drafters) == 1 else None
        return drafter if isinstance(drafter, ModelDrafter) else None
    return drafter if isinstance(drafter, ModelDrafter | Endpoint) else None


def check_routing(router: Any, target: Endpoint | None, drafter: Any, tokenizer: Any) -> Endpoint | ModelDrafter:
    """Check what a call with a router needs.

    Returns:
        Who writes the steps of the draft.

    Raises:
        ValueError: the router is none, or the draft model or the tokenizer is missing.
        UnsupportedModelError: the draft model cannot take back what it has read.
    """
    if not isinstance(router, Router):
        raise ValueError(f"router={router!r}: pass a router such as routers.Arbitrage(...), or None")
    if router.lookahead < 1:
        raise ValueError(f"{type(router).__name__} has lookahead={router.lookahead}: it is a positive number of steps")
    if router.lookahead > 1 and router.judges_together:
        raise ValueError(f"{type(router).__name__} has the target write every step: lookahead is 1 then")
    writer = writer_of(drafter)
    if writer is None:
        raise ValueError(
            f"drafter={drafter!r}: a router needs a draft model that writes steps; pass a smaller model of the same "
            "tokenizer, specdec.drafters.SmallModel(model), QuantizedSelf(), Auto of one of these, or a "
            "specdec.Endpoint"
        )
    if router.shares_cache and (target is not None or isinstance(writer, Endpoint)):
        raise ValueError(
            f"{type(router).__name__} has shares_cache=True, and an endpoint shares no cache: leave it out"
        )
    if isinstance(writer, QuantizedSelf) and target is not None:
        raise ValueError(f"{writer!r} is a copy of the target, which is not here but at {target}: pass a draft model")
    if isinstance(writer, SmallModel):
        check_writer(writer.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"a router tells steps apart by what tokens spell: pass tokenizer=, got {tokenizer!r}")
    return writer


def check_shared_cache(draft: ModelDrafter, target: PreTrainedModel) -> None:
    """Check that the draft can go on with the target's keys and values, and the target with the draft's.

    Raises:
        UnsupportedOptionError: they are not float32, or not of the same layers.
    """
    model = target if isinstance(draft, QuantizedSelf) else draft.model
    dtypes = {str(one.dtype).removeprefix("torch.") for one in (target, model)}
    if dtypes != {"float32"}:
        raise UnsupportedOptionError(
            f"shares_cache=True: keys and values are shared as float32, and these are {' and '.join(sorted(dtypes))}: "
            "load the models with dtype=torch.float32, or leave shares_cache out"
        )
    ours, theirs = (one.config.get_text_config(decoder=True).to_dict() for one in (target, model))
    if others := [name for name in _OF_STATES if ours.get(name) != theirs.get(name)]:
        raise UnsupportedOptionError(
            f"shares_cache=True: the draft is no copy of the target, for it has another {' and '.join(others)}: pass "
            "drafter=QuantizedSelf(), or leave shares_cache out"
        )


def check_speculation(speculation: Speculation) -> None:
    """Refuse what steps have no use for.

    Raises:
        UnsupportedOptionError: `tree` or `verify` is given.
    """
    tree, verify = speculation.tree, speculation.verify
    if tree is not None:
        raise UnsupportedOptionError(f"tree={tree!r} does not go with a router: a step is a chain; leave it out")
    if verify != "topdown":
        raise UnsupportedOptionError(
            f"verify={verify!r} does not go with a router: the target walks drafted steps with its own choice of every "
            "token; leave it out"
        )


def check_writer(model: PreTrainedModel) -> None:
    """Refuse a model that cannot follow where a step is written anew.

    Raises:
        UnsupportedModelError: it keeps states.
    """
    if keeps_states(model.config):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps states, which cannot take back a step that another model writes anew: leave "
            "router= out, or take models whose layers attend"
        )


def check_routed(config: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuse options of `generate()` that steps of two models cannot honour.

    Raises:
        UnsupportedOptionError: one of them is set.
    """
    for name in ("output_scores", "output_logits"):
        if getattr(config, name):
            raise UnsupportedOptionError(f"{name}=True does not go with a router: two models write; leave it out")
    if arguments.get(CACHE) is not None:
        raise UnsupportedOptionError(
            "a cache does not go with a router: the draft model has none of that text; pass the whole text as input_ids"
        )


def check_is_text(model_inputs: dict[str, Any]) -> None:
    """Refuse prompts that are more than text.

    Args:
        model_inputs: of the target's prefill, besides ids, mask and cache.

    Raises:
        UnsupportedOptionError: there is an image.
    """
    others = sorted(model_inputs.keys() - {"position_ids", "inputs_embeds"})
    positions = model_inputs.get("position_ids")
    if others or (positions is not None and positions.ndim > 2):
        raise UnsupportedOptionError(
            f"a router takes prompts of text alone, and these have images ({', '.join(others) or 'position_ids'}): "
            "leave router= out"
        )
