"""Do two greedy outputs say the same, and if not, could the target itself not tell their tokens apart?"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from transformers import PreTrainedModel

TIE_BOUND = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""By dtype of the target: two tokens whose logits are closer than this are a numerical tie."""


class Verdict(IntEnum):
    """From good to bad."""

    IDENTICAL = 0
    TIE = 1
    DIFFERENT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An output beside the reference's: `position` and `logit_gap` are those of the first difference.

    Where nobody can be asked for logits there are texts instead of tokens, and `position` counts characters.
    """

    verdict: Verdict
    position: int | None = None
    logit_gap: float | None = None
    is_text: bool = False

    def __str__(self) -> str:
        if self.verdict is Verdict.IDENTICAL:
            return "identical"
        if self.is_text:
            return f"another text from character {self.position} on"
        if self.logit_gap is None:
            return f"one output ends at token {self.position}, the other one goes on"
        return f"first difference at token {self.position}, logit gap {self.logit_gap:.3g}"


def compare(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    reference: list[int],
    output: list[int],
    generation_kwargs: dict[str, Any],
) -> Comparison:
    """Compare two greedy continuations of `prompt_ids` (1-D, unpadded); costs one forward if they differ.

    The gap is measured on the target's processed logits (repetition penalty and the like applied), between
    its best token and the worse one of the two tokens in question.
    """
    if reference == output:
        return Comparison(verdict=Verdict.IDENTICAL)
    pairs = zip(reference, output, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return Comparison(verdict=Verdict.DIFFERENT, position=min(len(reference), len(output)))
    prefix = torch.cat([prompt_ids, prompt_ids.new_tensor(reference[:position])])
    logits = _next_logits(model, prefix, generation_kwargs)
    gap = (logits.max() - logits[[reference[position], output[position]]].min()).item()
    verdict = Verdict.TIE if gap < TIE_BOUND[model.dtype] else Verdict.DIFFERENT
    return Comparison(verdict=verdict, position=position, logit_gap=gap)


def compare_texts(reference: str, output: str) -> Comparison:
    """For decoders whose logits are out of reach: a tie cannot be told from a mistake."""
    if reference == output:
        return Comparison(verdict=Verdict.IDENTICAL, is_text=True)
    pairs = enumerate(zip(reference, output, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(reference), len(output)))
    return Comparison(verdict=Verdict.DIFFERENT, position=position, is_text=True)


def _next_logits(model: PreTrainedModel, prefix_ids: torch.Tensor, generation_kwargs: dict[str, Any]) -> torch.Tensor:
    one_token = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    mask = torch.ones_like(prefix_ids)
    out = model.generate(prefix_ids[None], attention_mask=mask[None], **(generation_kwargs | one_token))
    return out.scores[0][0].float()
