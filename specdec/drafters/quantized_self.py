"""The target's own int8 copy drafts for the float target: the output is exactly the float model's."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from specdec.drafters.base import Drafter, DraftSession, Run
from specdec.drafters.small_model import SmallModel
from specdec.kernels import quantized_copy
from trees import Chain


class QuantizedSelf(Drafter):
    """Drafts with an int8 copy of the target, made at the first call and kept as long as the drafter.

    The copy shares embeddings and norms with the target and adds a quarter of the memory of its linears. It agrees
    with the target on most tokens; it pays where a forward of the copy is several times cheaper (float32 on a CPU).

    Args:
        num_tokens: length of the chain that it drafts, unless the call names a tree.

    Raises:
        UnsupportedModelError: at the first call, for a target that is not on the CPU or has no `nn.Linear`.
        ValueError: `num_tokens` is not a positive integer.
    """

    def __init__(self, num_tokens: int = 5):
        self._policy = Chain(num_tokens)
        self._drafters: WeakKeyDictionary[PreTrainedModel, SmallModel] = WeakKeyDictionary()

    def start(self, run: Run) -> DraftSession:
        target = run.target.model
        if target not in self._drafters:
            self._drafters[target] = SmallModel(quantized_copy(target), num_tokens=self._policy.length)
        return self._drafters[target].start(run)
