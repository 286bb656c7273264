"""A target and its draft, loaded and prepared: what commands, benches and workers begin with."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec import models
from specdec.errors import DraftError
from specdec.kernels import prepare


def load_pair(
    model: str,
    draft: str | None,
    *,
    dtype: str,
    device: str,
    threads: int | None,
    weights: str,
    trust_remote_code: bool,
) -> tuple[models.LoadedModel, PreTrainedModel | None]:
    """Load a target, and a draft model if one is named, and make their forwards cheap as `weights` says.

    Args:
        weights: "stock", "float" or "int8" (see `WeightsOption`).

    Raises:
        ModelError: a model cannot be found, fetched or read.
        DraftError: the draft's tokenizer gives a token another id than the target's does.
    """
    target = load_target(
        model, dtype=dtype, device=device, threads=threads, weights=weights, trust_remote_code=trust_remote_code
    )
    if draft is None:
        return target, None
    return target, load_draft(
        draft, target, dtype=dtype, device=device, weights=weights, trust_remote_code=trust_remote_code
    )


def load_target(
    model: str, *, dtype: str, device: str, threads: int | None, weights: str, trust_remote_code: bool
) -> models.LoadedModel:
    """The first half of `load_pair`."""
    target = models.load(model, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
    _prepare(target.model, weights)
    return target


def load_draft(
    draft: str, target: models.LoadedModel, *, dtype: str, device: str, weights: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The second half of `load_pair`."""
    small = models.load(draft, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _check_same_ids(target.tokenizer, small.tokenizer)
    _prepare(small.model, weights)
    return small.model


def _prepare(model: PreTrainedModel, weights: str) -> None:
    if weights != "stock":
        prepare(model, weights="int8" if weights == "int8" else None)


def _check_same_ids(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    target_ids = target.get_vocab()
    for token, draft_id in draft.get_vocab().items():
        target_id = target_ids.get(token, draft_id)
        if target_id != draft_id:
            raise DraftError(
                f"the draft model has another tokenizer: {token!r} is token {draft_id} there and {target_id} in "
                "the target. Take a draft of the target's own family"
            )
