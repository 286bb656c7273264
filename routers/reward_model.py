"""Process-reward models of the Hugging Face hub: a number for every step.

Two kinds are read: token classifiers (TRL's `PRMTrainer` makes them), whose second class says that a step is right;
and language models with a value head (`v_head`; Skywork's), whose sigmoid is the reward. Both are read at the
separator after the step, and see problem and steps as text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import cached_file

from routers.base import DraftedStep, TargetView

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_HEADS = ("v_head.summary", "v_head", "value_head", "score")
"""What value heads are called in checkpoints."""


class RewardModel:
    """A `routers.Reward`: how good a step is, 0 to 1, from a process-reward model.

    Args:
        model: hub id or folder, of safetensors.
        separator: ends a step in the model's input; the last of its tokens is what the reward is read at.
        problem: makes the problem's text of the prompt's (which may be a whole chat template).
        batch_size: steps a forward.
        device: where it runs.

    Raises:
        ValueError: it is neither a token classifier of two classes nor has it a value head; or it has no tokenizer.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        separator: str = "\n\n",
        problem: Callable[[str], str] = str.strip,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
    ):
        self.separator, self.problem, self.batch_size = separator, problem, batch_size
        name = str(model)
        try:
            config = AutoConfig.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise ValueError(f"RewardModel({name!r}): {error}") from error
        self.network = _load(name, config).to(device).eval()
        self._separator_id = self.tokenizer.encode(separator, add_special_tokens=False)[-1]

    def rewards(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return self.of_texts([(self.problem(step.prompt_text), [*step.previous_texts, step.text]) for step in steps])

    @torch.no_grad()
    def of_texts(self, texts: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """The reward of the last step of each (problem, steps)."""
        rewards: list[float] = []
        rows = [self._ids(*text) for text in texts]
        for first in range(0, len(rows), self.batch_size):
            rewards.extend(self._forward(rows[first : first + self.batch_size]))
        return rewards

    def _ids(self, problem: str, steps: Sequence[str]) -> list[int]:
        ids = self.tokenizer.encode(f"{problem}\n", add_special_tokens=True)
        for step in steps:
            ids += [*self.tokenizer.encode(step.strip(), add_special_tokens=False), self._separator_id]
        return ids

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, rows))
        device = next(self.network.parameters()).device
        input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits_BP = self.network(input_ids=input_ids, attention_mask=mask)
        last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        return logits_BP[torch.arange(len(rows)), last_B].sigmoid().tolist()


class _Classifier(nn.Module):
    """Log-odds of the second of two classes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        logits_BP2 = self.model(**inputs).logits.float()
        return logits_BP2[..., 1] - logits_BP2[..., 0]


class _Valued(nn.Module):
    """A value read off the last hidden state."""

    def __init__(self, model: nn.Module, head: Mapping[str, Tensor]):
        super().__init__()
        self.model = model
        self.head = nn.Linear(head["weight"].shape[1], 1, bias="bias" in head)
        self.head.load_state_dict({name: tensor.float() for name, tensor in head.items()})

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.head(self.model(**inputs).last_hidden_state.float())[..., 0]


def _load(name: str, config: Any) -> nn.Module:
    kind = (config.architectures or [""])[0]
    if kind.endswith("ForTokenClassification"):
        if config.num_labels != 2:
            raise ValueError(f"RewardModel({name!r}) has {config.num_labels} classes: two are read, wrong and right")
        return _Classifier(AutoModelForTokenClassification.from_pretrained(name, use_safetensors=True, dtype="auto"))
    head = _value_head(name)
    if head is None:
        raise ValueError(
            f"RewardModel({name!r}) is a {kind or 'model'} without a value head: take a token classifier of two "
            f"classes, or a checkpoint with one of the heads {', '.join(_HEADS)}"
        )
    return _Valued(AutoModel.from_pretrained(name, use_safetensors=True, dtype="auto"), head)


def _value_head(name: str) -> dict[str, Tensor] | None:
    """Weight [1, C] and perhaps bias [1] of the checkpoint's value head."""
    for path in _files(name):
        with safe_open(path, framework="pt") as file:
            for head in _HEADS:
                found = {key: f"{head}.{key}" for key in ("weight", "bias") if f"{head}.{key}" in file.keys()}  # noqa: SIM118
                if "weight" in found:
                    return {key: file.get_tensor(tensor) for key, tensor in found.items()}
    return None


def _files(name: str) -> list[str]:
    import json

    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        whole = cached_file(name, _WHOLE, _raise_exceptions_for_missing_entries=False)
        if whole is None:
            raise ValueError(f"RewardModel({name!r}) has no {_WHOLE}: only safetensors are read")
        return [whole]
    parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [str(cached_file(name, part)) for part in parts]
