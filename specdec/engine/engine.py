"""The engine: admits requests, reads their prompts in chunks, and runs rounds of the decoding loop over all of them."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.drafters import Drafter
from specdec.engine.request import Generation, Request


class Engine:
    """A continuously batched decoding loop on one model. Not thread-safe: the thread that calls `step` owns it.

    Args:
        model: the target, as for `specdec.generate`; it is not changed.
        drafter: a `specdec.drafters` instance, a smaller model of the same tokenizer, None or "auto".
        tokenizer: needed for stop strings only.
        max_rows: requests that are decoded at once.
        max_waiting: requests that may wait besides.
        max_cached_tokens: slots of key/value memory, for rows and shared prefixes together; None takes half of the
            memory that is free now.
        prefill_chunk: prompt tokens that are read between two rounds, at most.

    Raises:
        UnsupportedModelError: the model cannot be decoded by tree.
        DraftError: the drafter does not fit the model, or cannot take rows that join.
        ValueError: a wrong argument.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        drafter: Drafter | PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_rows: int = 16,
        max_waiting: int = 1024,
        max_cached_tokens: int | None = None,
        prefill_chunk: int = 256,
    ):
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Requests that are being decoded, or whose prompt is being read."""
        raise NotImplementedError

    @property
    def num_waiting(self) -> int:
        """Requests that have not been admitted yet."""
        raise NotImplementedError

    @property
    def num_cached_tokens(self) -> int:
        """Slots of key/value memory in use or reserved, shared prefixes included."""
        raise NotImplementedError

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises:
            CapacityError: the queue is full, or the request needs more memory than there will ever be.
            UnsupportedOptionError: an option that is not possible here; it says what to use instead.
            ValueError: a wrong argument.
        """
        raise NotImplementedError

    def step(self) -> bool:
        """Admit what fits, read a chunk of prompt, run one round for all rows.

        Returns:
            Whether anything is left to do.
        """
        raise NotImplementedError

    def cancel(self, generation: Generation) -> None:
        """End a request now ("cancelled") and free what it holds; nothing happens if it is finished."""
        raise NotImplementedError

    def run(self) -> None:
        """`step` until nothing is left to do."""
        raise NotImplementedError
