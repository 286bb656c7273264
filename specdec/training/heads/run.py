"""From a model to a head that drafts for it, in three stages that can be interrupted: collect, train, report."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.drafters.head.formats import DSPARK, EAGLE3, JUMP, MTP
from specdec.exits.module import Exit, final_norm, fingerprint, load_exits, save_exits
from specdec.hf import home_device
from specdec.kernels import quantized_copy
from specdec.training.heads.blocks import BlockTrainer
from specdec.training.heads.chains import ChainTrainer
from specdec.training.heads.collect import NUM_ROWS, Collector, Script
from specdec.training.heads.corpus import Corpus
from specdec.training.heads.exits import ExitRecipe, ExitTrainer
from specdec.training.heads.export import save_head
from specdec.training.heads.head_report import HeadReport, expected_tokens, measure_head, share_right
from specdec.training.heads.jumps import check_jump, jump_layers
from specdec.training.heads.layerskip import LayerSkipRecipe, LayerSkipTrainer
from specdec.training.heads.recipes import BlockRecipe, EagleRecipe, JumpRecipe, MtpRecipe
from specdec.training.heads.report import Acceptance, measure_acceptance, measure_costs
from specdec.training.heads.trainer import Trainer, bfloat16_is_faster
from specdec.training.heads.work import WorkFolder

Module = TypeVar("Module", bound=nn.Module)

_SAVE_EVERY_S = 60
_CURVE_POINTS, _CURVE_ROWS = 8, 16  # tokens double from point to point
_FULL_BATCH_ROWS, _FULL_LEARNING_RATE = 8, 1e-4  # of a model that has been trained before


@dataclass(frozen=True, slots=True)
class Source:
    """Text to train on.

    Args:
        description: for the file's metadata, and to tell one source from another.
        script: makes the script of a row from a random source of its own.
        num_tokens: to collect, about.
    """

    description: str
    script: Callable[[random.Random], Script]
    num_tokens: int


class Progress(NamedTuple):
    """done of total positions or steps; shown: what training shows of a step."""

    done: int
    total: int
    shown: tuple[float, ...] = ()


class _Training:
    """Collection, and what is common to training heads and training a whole model.

    Args:
        out: what is to be written; unfinished work is kept in a folder of the same name and `.work`.
        depths: numbers of layers whose states are collected, besides the last; None if none are needed. Where there is
            an accelerator they are not kept either: it makes them again in less time than it takes to read them.
        plan: what the result depends on, besides model, data and length.
        length: positions of a row.
        num_rows: rows that are written at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        out: Path,
        depths: tuple[int, ...] | None,
        plan: dict[str, Any],
        *,
        seed: int,
        length: int,
        num_rows: int,
    ):
        self._model = model
        self._out = out
        self._script = source.script
        self._seed = seed
        self._length = length
        self._kept = depths if home_device(model).type == "cpu" else None
        self._num_rows = min(num_rows, math.ceil(source.num_tokens / length))
        self._num_shards = math.ceil(source.num_tokens / (self._num_rows * length))
        self._plan = {
            "model": fingerprint(model),
            "data": source.description,
            "num_tokens": self._num_shards * self._num_rows * length,
            "length": length,
            "rows": self._num_rows,
            **json.loads(json.dumps(plan)),
        }
        self._fast = _prepared(model)
        self._folder = out.with_name(f"{out.name}.work")
        self._work = WorkFolder(self._folder, self._plan)

    def collect(self) -> Iterator[Progress]:
        """Writes the shards that are missing; the last one is held out."""
        total = (self._num_shards + 1) * self._length
        for index in range(self._num_shards + 1):
            if self._work.has_shard(index):
                continue
            num_rows = self._num_rows if index < self._num_shards else min(self._num_rows, NUM_ROWS)
            collector = Collector(self._fast, self._kept, self._script, self._length, num_rows)
            for position, shard in enumerate(collector.shard(self._seed * 1_000_003 + index)):
                yield Progress(index * self._length + position, total)
                if shard is not None:
                    self._work.write_shard(index, shard)
            gc.collect()  # a cache refers to itself, and holds a gigabyte
        yield Progress(total, total)

    def _corpus(self, indices: Iterable[int], layers: Sequence[int] = ()) -> Corpus:
        shards = [self._work.read_shard(index) for index in indices]
        return Corpus(self._model, shards, layers, self._fast)

    def _advance(
        self, trainer: Trainer | LayerSkipTrainer, advance: Callable[[], tuple[float, ...]], num_steps: int
    ) -> Iterator[Progress]:
        """All steps, from where an earlier call has come to."""
        if self._work.trainer_state.exists():
            trainer.load(self._work.trainer_state)
        saved = time.monotonic()
        while trainer.step < num_steps:
            shown = advance()
            if time.monotonic() - saved > _SAVE_EVERY_S or trainer.step == num_steps:
                trainer.save(self._work.trainer_state)
                saved = time.monotonic()
            yield Progress(trainer.step, num_steps, shown)


class ExitTraining(_Training):
    """Trains exits; the work of `specdec train-head --kind exit`.

    Args:
        out: the .safetensors file to write.
        length: positions of a row; what exits look back.
        num_rows: rows that are written at once; a GPU takes thousands in the time of one.

    Raises:
        ValueError: an exit layer that the model does not have, an output that cannot be written, or unfinished work
            with other settings.
        UnsupportedModelError: a model that takes no exits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        recipe: ExitRecipe,
        out: Path,
        *,
        length: int = 256,
        num_rows: int = NUM_ROWS,
    ):
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if bad := [layer for layer in recipe.layers if not 0 <= layer < num_layers]:
            raise ValueError(f"exit layer {bad[0]} is not one of this model's: give 0 to {num_layers - 1}")
        if out.suffix != ".safetensors":
            raise ValueError(f"the output must be a .safetensors file, got {out}")
        final_norm(model)
        self._recipe = recipe
        plan = dataclasses.asdict(recipe)
        super().__init__(model, source, out, recipe.layers, plan, seed=recipe.seed, length=length, num_rows=num_rows)

    def train(self) -> Iterator[Progress]:
        """Shows each exit's agreement with the target."""
        trainer = self._trainer = ExitTrainer(
            self._model, self._corpus(range(self._num_shards), self._recipe.layers), self._recipe
        )
        yield from self._advance(trainer, trainer.advance, trainer.num_steps)

    def finish(self) -> list[Acceptance]:
        """Measures the exits as the file has them, writes it, and removes the unfinished work."""
        held_out = self._corpus([self._num_shards], self._recipe.layers)
        draft = self._folder / "exits.safetensors"
        save_exits(draft, self._trainer.exits, self._model, self._plan)
        reports = [self._measure(exit_, held_out) for exit_ in load_exits(draft, self._model)]
        metadata = {**self._plan, "held_out": [dataclasses.asdict(report) for report in reports]}
        save_exits(self._out, self._trainer.exits, self._model, metadata)
        shutil.rmtree(self._folder)
        return reports

    def _measure(self, exit_: Exit, held_out: Corpus) -> Acceptance:
        return measure_acceptance(self._model, exit_, held_out, measure_costs(self._fast, _prepared(exit_)))


class HeadTraining(_Training):
    """Trains a DSpark, EAGLE-3 or jump head or an MTP layer, as the recipe says; the work of `specdec train-head`.

    Args:
        name: of the model, for whoever reads the head.
        out: the folder to write.
        quantize: see `save_head`.

    Raises:
        ValueError: the output exists, or there is unfinished work with other settings; `quantize` with an MTP layer.
        UnsupportedModelError: a model whose states are not to be had.

    Attributes:
        curve: tokens trained on -> how many in a row are accepted of held-out text, on average.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        source: Source,
        recipe: BlockRecipe | EagleRecipe,
        out: Path,
        *,
        length: int = 256,
        num_rows: int = NUM_ROWS,
        quantize: bool = False,
    ):
        _check_new(out)
        if quantize and isinstance(recipe, MtpRecipe):
            raise ValueError("an MTP layer is written for other programs, which read no 8 bits: leave --quantize out")
        if recipe.reach >= length:
            raise ValueError(f"to draft {recipe.reach} tokens, conversations of more than {length} are needed")
        if not isinstance(model.get_input_embeddings(), nn.Embedding):
            raise ValueError(
                "no head is trained for embeddings that are a GGUF file's blocks: load the model in float32"
            )
        final_norm(model)
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._name, self._recipe, self._quantize = name, recipe, quantize
        self._layers = _state_layers(recipe, num_layers)
        if isinstance(recipe, JumpRecipe):
            check_jump(model, jump_layers(recipe, num_layers))
        plan = {"kind": _kind_of(recipe), "state_layers": self._layers, **dataclasses.asdict(recipe)}
        depths = tuple(layer for layer in self._layers if layer < num_layers)
        super().__init__(model, source, out, depths, plan, seed=recipe.seed, length=length, num_rows=num_rows)
        self.curve = self._work.curve()

    def train(self) -> Iterator[Progress]:
        """Shows how many tokens in a row are accepted; keeps the learning curve, on held-out text."""
        corpus, held_out = (
            self._corpus(shards, self._layers) for shards in (range(self._num_shards), [self._num_shards])
        )
        trainer = self._trainer = _trainer_of(self._model, corpus, self._recipe)
        curve, marks = self.curve, {trainer.num_steps >> halvings for halvings in range(_CURVE_POINTS)}
        for state in self._advance(trainer, trainer.advance, trainer.num_steps):
            if state.done in marks:
                _, steps = share_right(self._model, trainer.head, held_out, self._recipe.reach, _CURVE_ROWS)
                tokens = state.done * self._recipe.batch_rows * self._length
                curve[tokens] = round(expected_tokens(steps)[-1] - 1, 3)
                self._work.write_curve(curve)
            yield state

    def finish(self) -> HeadReport:
        """Measures the head, writes it, and removes the unfinished work."""
        held_out, length = self._corpus([self._num_shards], self._layers), self._recipe.reach
        report = measure_head(self._model, self._fast, self._trainer.head, held_out, length)
        curve = [{"tokens": tokens, "accepted": accepted} for tokens, accepted in self.curve.items()]
        training = {**self._plan, "held_out": dataclasses.asdict(report), "curve": curve}
        draft = self._folder / "head"
        shutil.rmtree(draft, ignore_errors=True)
        head = self._trainer.head
        save_head(draft, head, self._model, self._name, training, length, quantize=self._quantize)
        draft.replace(self._out)
        shutil.rmtree(self._folder)
        return report


def _kind_of(recipe: BlockRecipe | EagleRecipe) -> str:
    if isinstance(recipe, BlockRecipe):
        return DSPARK
    return {MtpRecipe: MTP, JumpRecipe: JUMP}.get(type(recipe), EAGLE3)


def _state_layers(recipe: BlockRecipe | EagleRecipe, num_layers: int) -> tuple[int, ...]:
    """After how many layers of the model a head reads its states: as published ones do, and of DSpark the last."""
    if isinstance(recipe, MtpRecipe):
        return (num_layers,)
    if isinstance(recipe, JumpRecipe):
        return jump_layers(recipe, num_layers)
    published = {min(2, num_layers), num_layers // 2 or 1, max(num_layers - 3, 1)}
    return tuple(sorted(published | ({num_layers} if isinstance(recipe, BlockRecipe) else set())))


def _trainer_of(
    model: PreTrainedModel, corpus: Corpus, recipe: BlockRecipe | EagleRecipe
) -> BlockTrainer | ChainTrainer:
    return (
        BlockTrainer(model, corpus, recipe) if isinstance(recipe, BlockRecipe) else ChainTrainer(model, corpus, recipe)
    )


class FullTraining(_Training):
    """Trains a whole model to exit early (`layerskip.py`), in place; the work of `specdec train-head --kind layerskip`.

    Args:
        out: the folder to write.

    Raises:
        ValueError: the output exists, or there is unfinished work with other settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        out: Path,
        *,
        epochs: int,
        seed: int = 0,
        length: int = 256,
        num_rows: int = NUM_ROWS,
    ):
        _check_new(out)
        self._epochs = epochs
        plan = {"full": True, "epochs": epochs, "seed": seed}
        super().__init__(model, source, out, None, plan, seed=seed, length=length, num_rows=num_rows)

    def train(self) -> Iterator[Progress]:
        """Shows the losses of the last layer and of the exits before it."""
        corpus = self._corpus(range(self._num_shards))
        num_steps = corpus.steps_per_epoch(_FULL_BATCH_ROWS) * self._epochs
        recipe = LayerSkipRecipe(num_steps=num_steps, learning_rate=_FULL_LEARNING_RATE, seed=self._seed)
        trainer = LayerSkipTrainer(self._model, recipe)

        def advance() -> tuple[float, ...]:
            rows = corpus.rows(trainer.step, _FULL_BATCH_ROWS, self._seed)
            losses = trainer.advance(corpus.tokens(rows))
            return losses.last, statistics.mean(losses.exits.values() or [losses.last])

        yield from self._advance(trainer, advance, num_steps)

    def finish(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a folder that `from_pretrained` reads, and removes the unfinished work."""
        draft = self._folder / "model"
        self._model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.replace(self._out)
        shutil.rmtree(self._folder)


def _check_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists: give a folder that does not")


def _prepared(module: Module) -> Module:
    """An int8 copy where there are kernels for one, a bfloat16 copy on a GPU that computes in it."""
    devices = {weight.device for weight in module.parameters()}
    if all(device.type == "cuda" and bfloat16_is_faster(device) for device in devices):
        return copy.deepcopy(module).to(torch.bfloat16)
    on_cpu = all(device.type == "cpu" for device in devices)
    has_linears = any(type(part) is nn.Linear for part in module.modules())
    return quantized_copy(module) if on_cpu and has_linears else module
