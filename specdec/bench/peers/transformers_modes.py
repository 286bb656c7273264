"""The model's own `generate()`, plain and in the assisted modes that transformers has.

They take one row at a time and draft chains: a smaller model (`assistant_model`), the prompt's own n-grams
(`prompt_lookup_num_tokens`), or the target's first layers (`assistant_early_exit`). Parameters that are not given are
transformers' own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from transformers import BatchEncoding, PreTrainedModel

from specdec.bench.peers import ASSISTANT, EARLY_EXIT, PLAIN, TRANSFORMERS
from specdec.bench.running import Peer, PeerCounts, Run, StepClock, trim

PROMPT_LOOKUP_NUM_TOKENS = 10
"""What transformers' documentation shows; without a number there is no prompt lookup."""


class OwnGenerate(Peer):
    """`model.generate(**options)`.

    Args:
        options: of `generate()`; without any it decodes plainly.
    """

    family: ClassVar[str] = TRANSFORMERS

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self._model = model
        self._options = options

    @classmethod
    def in_mode(
        cls,
        model: PreTrainedModel,
        mode: str,
        *,
        draft: PreTrainedModel | None = None,
        num_tokens: int | None = None,
        exit_layer: int | None = None,
    ) -> OwnGenerate:
        """The assisted mode of that name.

        Raises:
            ValueError: the exit is not below the model's last layer.
        """
        if mode == PLAIN:
            return cls(model)
        if mode not in (ASSISTANT, EARLY_EXIT):
            return cls(model, prompt_lookup_num_tokens=num_tokens or PROMPT_LOOKUP_NUM_TOKENS)
        chain = {} if num_tokens is None else {"num_assistant_tokens": num_tokens}
        if mode == ASSISTANT:
            return cls(model, assistant_model=draft, **chain)
        num_layers = model.config.get_text_config().num_hidden_layers
        if exit_layer is None or not 0 < exit_layer < num_layers:
            raise ValueError(f"exit_layer must be from 1 to {num_layers - 1} for this model, got {exit_layer}")
        return cls(model, assistant_early_exit=exit_layer, **chain)

    def lacks(self, *, batch_size: int, sample: bool) -> str | None:
        if self._options and batch_size > 1:
            return "transformers' assisted modes decode one prompt at a time"
        return None

    def decode(self, inputs: BatchEncoding, generation_kwargs: dict[str, Any]) -> Run:
        clock = StepClock()
        sequences = self._model.generate(**inputs, **generation_kwargs, **self._options, streamer=clock)
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = clock.seconds()
        tokens = trim(self._model, new_ids)
        return Run(
            seconds=seconds,
            tokens=tokens,
            token_seconds=clock.token_seconds(tokens),
            peer_counts=_counts(clock.step_sizes) if self._options else None,
        )


def _counts(step_sizes: list[int]) -> PeerCounts:
    """Of one row. A step is a forward of the target; the first one is the prefill, with a draft behind it."""
    rounds = step_sizes[1:]
    return PeerCounts(
        num_new_tokens=sum(step_sizes),
        num_rounds=len(rounds),
        num_committed=sum(rounds),
        target_forwards=len(step_sizes),
        accepted_histogram=dict(Counter(size - 1 for size in rounds)),
    )
