"""What a model reads."""

from typing import Any

import torch
from transformers import PreTrainedModel


class ForwardLog:
    """Every text prefix that a model reads, one a forwarded token (chains of one row)."""

    def __init__(self, model: PreTrainedModel):
        self.prefixes: list[tuple[int, ...]] = []
        self._text: list[int] = []
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def __enter__(self) -> "ForwardLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: PreTrainedModel, __: tuple, inputs: dict[str, Any]) -> None:
        positions = inputs.get("position_ids", torch.arange(inputs["input_ids"].shape[1])[None])
        for token, position in zip(inputs["input_ids"][0].tolist(), positions[0].tolist(), strict=True):
            self._text[position:] = [token]
            self.prefixes.append(tuple(self._text))
