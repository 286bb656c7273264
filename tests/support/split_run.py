"""What a process of `test_several_devices` does: a tiny model split over processes by transformers' tensor parallelism.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.support.split_run FOLDER

FOLDER holds the model; each process writes its results there, as `rank-N.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MaxTimeCriteria, PreTrainedModel
from transformers.distributed import DistributedConfig

import routers
import specdec
from specdec.drafters import (
    Auto,
    Drafter,
    DraftSession,
    EarlyExit,
    Mixed,
    Plain,
    PromptLookup,
    QuantizedSelf,
    SmallModel,
)
from specdec.engine import Engine
from specdec.testing import random_prompts
from tests.support.references import with_noise
from trees import Draft, DySpec, TokenTree, TreeBatch

PROMPTS = random_prompts([5, 12, 9])
NUM_NEW = 24


class Divergent(Drafter):
    """Drafts something else, and something longer, in every process."""

    def start(self, run: Any) -> DraftSession:
        return _DivergentSession(run)


class _DivergentSession(DraftSession):
    def __init__(self, run: Any):
        self._run = run

    def propose(self, max_depths: Any) -> Draft:
        rank = dist.get_rank()
        chains = [TokenTree.chain([rank] * min(1 + rank, depth)) for depth in max_depths]
        return Draft(trees=TreeBatch.stack(chains, self._run.device))


class Broken(Drafter):
    """Fails in its third round."""

    def start(self, run: Any) -> DraftSession:
        return _BrokenSession(run)


class _BrokenSession(_DivergentSession):
    num_rounds = 0

    def propose(self, max_depths: Any) -> Draft:
        self.num_rounds += 1
        if self.num_rounds == 3:
            raise RuntimeError("out of ideas")
        return super().propose(max_depths)


def drafters(draft: PreTrainedModel) -> dict[str, Drafter]:
    return {
        "plain": Plain(),
        "prompt-lookup": PromptLookup(min_match=1),
        "small-model": SmallModel(draft),
        "mixed": Mixed([PromptLookup(min_match=1), SmallModel(draft)]),
        "auto": Auto(),
        "auto-small": Auto(SmallModel(draft)),
        "divergent": Divergent(),
    }


def attempt(call: Callable[[], Any]) -> str:
    try:
        call()
    except (specdec.SpecdecError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    draft = with_noise(whole)

    def generate(drafter: Drafter | None, **options: Any) -> list[list[int]]:
        settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, **options}
        return specdec.generate(split, **PROMPTS, drafter=drafter, **settings).tolist()

    def sample(drafter: Drafter, seed: int, **options: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(drafter, do_sample=True, top_k=0, generator=generator, **options)

    tokens = {f"greedy {name}": generate(drafter) for name, drafter in drafters(draft).items()}
    for name, drafter in drafters(draft).items():
        tokens[f"sampled {name}"] = sample(drafter, seed=0)
        tokens[f"unseeded {name}"] = sample(drafter, seed=rank)
    tokens["greedy default"] = generate(None)
    tokens["greedy tree"] = generate(SmallModel(draft), tree=DySpec(8))
    tokens["sampled traversal"] = sample(SmallModel(draft), seed=rank, tree=DySpec(8), verify="traversal")
    deadline = MaxTimeCriteria(0.05 * (1 + rank))  # the first process's clock counts
    timed = {"max_new_tokens": 200, "do_sample": False, "stopping_criteria": [deadline]}
    tokens["timed"] = specdec.generate(split, **random_prompts([9]), drafter=Plain(), **timed).tolist()
    errors = {
        "early exit": attempt(lambda: generate(EarlyExit(exit_layer=1))),
        "quantized self": attempt(lambda: generate(QuantizedSelf())),
        "split draft": attempt(lambda: generate(SmallModel(split))),
        "broken drafter": attempt(lambda: generate(Broken())),
        "engine": attempt(lambda: Engine(split)),
        "prepare": attempt(lambda: specdec.prepare(split)),
        "router": attempt(
            lambda: specdec.generate(split, **PROMPTS, drafter=draft, router=routers.AlwaysTarget(), max_new_tokens=4)
        ),
    }
    tokens["greedy after errors"] = generate(PromptLookup())
    result = {"tokens": tokens, "errors": errors}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
