"""The paper's router: a text classifier reads problem, steps and who wrote them (Maheswaran et al. 2025, section 4).

Any encoder or language model that transformers can put a classification head on. It is stored as an ordinary folder of
safetensors, with what calibration found in `text_router.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from routers.base import DraftedStep, TargetView
from routers.calibration import Calibration
from routers.collecting import StepTuple, is_usable, split_texts
from routers.measures import Report, report

SETTINGS = "text_router.json"
_TAGS = {"draft": "Model 0: ", "target": "Model 1: "}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """How a text classifier is trained; the paper's are 3 epochs at 1e-5, of batches of 1024.

    Args:
        epochs, learning_rate, batch_size: of AdamW, with a linear warm-up of a tenth and a linear decay.
        max_length: tokens read; of a longer text the beginning is left out.
        margin, held_out, rate, harm_level, seed: as of `LightRecipe`.
    """

    epochs: int = 3
    learning_rate: float = 1e-5
    batch_size: int = 16
    max_length: int = 512
    margin: float = 0.0
    held_out: float = 0.25
    rate: float = 0.3
    harm_level: float = 0.1
    seed: int = 0


@dataclass(kw_only=True, eq=False)
class TextRouter:
    """Scores steps with Pr(the target does better), calibrated; a `routers.Scorer`.

    Args:
        model: with two classes.
        max_length: tokens read.
        calibration: from logits to probabilities, and the threshold that was best.
        report: on held-out steps.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    calibration: Calibration
    report: Report | None = None

    def score(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        texts = [as_text(step.prompt_text, step.previous_texts, step.writers, step.text) for step in steps]
        return self.calibration.probabilities(self.logits(texts)).tolist()

    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = 8) -> np.ndarray:
        """float64 [N] log-odds of "the target does better", before calibration."""
        self.model.eval()
        parts = [
            log_odds(self.model, self.encode(texts[first : first + batch_size]))
            for first in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts).double().cpu().numpy()

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {name: tensor.to(self.model.device) for name, tensor in encoded.items()}

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = {
            "max_length": self.max_length,
            "calibration": asdict(self.calibration),
            "report": None if self.report is None else asdict(self.report),
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TextRouter:
        """Read what `save` has written.

        Raises:
            ValueError: it is no text router.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no text router: {error}") from error
        written = settings["report"]
        return cls(
            model=model.eval(),
            tokenizer=tokenizer,
            max_length=settings["max_length"],
            calibration=Calibration(**settings["calibration"]),
            report=None if written is None else Report(**written),
        )


def as_text(prompt: str, previous: Sequence[str], writers: Sequence[str], drafted: str) -> str:
    """What the classifier reads: every step with the tag of its writer; the one in question is the draft's."""
    steps = [f"{_TAGS[writer]}{text.strip()}" for writer, text in zip(writers, previous, strict=True)]
    return "\n\n".join([prompt.strip(), *steps, f"{_TAGS['draft']}{drafted.strip()}"])


def log_odds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    logits_B2 = model(**inputs).logits.float()
    return logits_B2[:, 1] - logits_B2[:, 0]


def train_text(
    tuples: Sequence[StepTuple],
    base: str,
    recipe: TextRecipe,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> TextRouter:
    """Fine-tune a classifier on some texts, calibrate on others, and report on the rest.

    Both kinds of steps weigh the same in training, as in the paper; calibration undoes that.

    Args:
        base: hub id or folder of an encoder or a language model.
        progress: told (steps done, steps in all, loss).

    Raises:
        ValueError: there are too few texts, all steps are of one kind, or the base has no tokenizer to pad with.
    """
    usable = [item for item in tuples if is_usable(item)]
    is_test = split_texts(usable, recipe.held_out, recipe.seed, margin=recipe.margin)
    learnt = [item for item, held_out in zip(usable, is_test, strict=True) if not held_out]
    test = [item for item, held_out in zip(usable, is_test, strict=True) if held_out]
    for_calibration = split_texts(learnt, 0.25, recipe.seed + 1, margin=recipe.margin)
    train = [item for item, kept in zip(learnt, for_calibration, strict=True) if not kept]
    calibrate = [item for item, kept in zip(learnt, for_calibration, strict=True) if kept]
    router = _untrained(base, recipe, device)
    _fit(router, train, recipe, progress)
    labels = np.array([item.advantage > recipe.margin for item in calibrate])
    router.calibration = Calibration.fit(router.logits(_texts(calibrate)), labels)
    router.report = report(
        router.calibration.probabilities(router.logits(_texts(test))),
        np.array([item.advantage for item in test]),
        threshold=router.calibration.threshold,
        margin=recipe.margin,
        num_texts=len({item.problem for item in test}),
        rate=recipe.rate,
        harm_level=recipe.harm_level,
    )
    return router


def _texts(tuples: Sequence[StepTuple]) -> list[str]:
    return [as_text(item.prompt, item.previous, item.writers, item.drafted) for item in tuples]


def _untrained(base: str, recipe: TextRecipe, device: str | torch.device) -> TextRouter:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right", truncation_side="left")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=2, use_safetensors=True, dtype=torch.float32
            )
    except OSError as error:
        raise ValueError(f"cannot read {base!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {base!r} has neither a padding nor an end token: take another base")
    model.config.pad_token_id = tokenizer.pad_token_id
    unfitted = Calibration(slope=1.0, offset=0.0, threshold=0.5)
    return TextRouter(model=model.to(device), tokenizer=tokenizer, max_length=recipe.max_length, calibration=unfitted)


def _fit(
    router: TextRouter,
    tuples: Sequence[StepTuple],
    recipe: TextRecipe,
    progress: Callable[[int, int, float], None],
) -> None:
    texts = _texts(tuples)
    labels = torch.tensor([item.advantage > recipe.margin for item in tuples], dtype=torch.float32)
    # a positive weighs as much more as negatives are more frequent
    weight = (1 - labels.mean()) / labels.mean()
    random = np.random.default_rng(recipe.seed)
    per_epoch = -(-len(texts) // recipe.batch_size)
    optimizer = torch.optim.AdamW(router.model.parameters(), lr=recipe.learning_rate)
    total = per_epoch * recipe.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, total // 10, total)
    router.model.train()
    for done in range(total):
        if done % per_epoch == 0:
            order = random.permutation(len(texts))
        chosen = order[done % per_epoch :: per_epoch]
        odds_B = log_odds(router.model, router.encode([texts[index] for index in chosen]))
        wanted_B = labels[chosen].to(odds_B.device)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(odds_B, wanted_B, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(done + 1, total, float(loss.detach()))
