"""What a round asks of a GPU: kernels launched, copies queued, and how often the host waits. Needs none.

    python -m bench.launches [--layers 4] [--graphs] [--only KIND ...] [--sites] [--json]

Tiny models decode on a GPU that does not exist (`specdec/testing/fake_gpu.py`), by the code path of a real one. Counts
are those of the median round, of calls into ATen: some launch several kernels. `--sites` names where the host waits.
With `--graphs` what comes again is replayed, forwards and what is accepted of drafts, each as one launch; what has a
kernel of its own is one too. Counted is a second call, which finds the graphs of the first. A greedy output that is not
the CPU's fails the run, and so does what would wait while it is captured.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig

import specdec
from bench._script import log, parser_of, pipe_table
from specdec.cuda import graphs, slots
from specdec.decoding.loop import DecodingLoop
from specdec.drafters import Drafter, DraftHead, EarlyExit, Plain, PromptLookup, SmallModel
from specdec.drafters.head.eagle import Eagle3
from specdec.drafters.head.formats import EAGLE3
from specdec.testing import random_prompts, tiny_model
from specdec.testing.fake_gpu import FakeGpu
from specdec.training.heads.initial import initial_block, initial_mtp, layer_sizes, new_head, seeded
from specdec.training.heads.recipes import BlockRecipe, MtpRecipe
from trees import DySpec, Sequoia

NUM_NEW = 30
ONE, FOUR = random_prompts([12]), random_prompts([5, 12, 9, 18])
SAMPLED = {"do_sample": True}


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a round."""

    launches: int
    queued_copies: int
    syncs: int
    sites: dict[str, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of round."""

    name: str
    make: Callable[[Models], Drafter]
    prompts: dict[str, torch.Tensor]
    options: dict[str, Any]


def _small(models: Models) -> Drafter:
    return SmallModel(models.draft)


KINDS = [
    Kind("plain", lambda _: Plain(), ONE, {}),
    Kind("plain, sampled", lambda _: Plain(), ONE, SAMPLED),
    Kind("prompt lookup", lambda _: PromptLookup(), ONE, {}),
    Kind("prompt lookup, sampled", lambda _: PromptLookup(min_match=1), ONE, SAMPLED),
    Kind("early exit", lambda _: EarlyExit(2), ONE, {}),
    Kind("early exit, DySpec(16)", lambda _: EarlyExit(2), ONE, {"tree": DySpec(16)}),
    Kind("adaptive exit", lambda _: EarlyExit(objective="tokens-per-layer", shadow_share=1), ONE, {}),
    Kind("chain of 5", _small, ONE, {}),
    Kind("chain of 5, sampled", _small, ONE, SAMPLED),
    Kind("DySpec(16)", _small, ONE, {"tree": DySpec(16)}),
    Kind("DySpec(16), sampled", _small, ONE, {"tree": DySpec(16), **SAMPLED}),
    Kind(
        "Sequoia(16), traversal",
        _small,
        ONE,
        {"tree": Sequoia(16, (0.5, 0.2)), "verify": "traversal", **SAMPLED},
    ),
    Kind("EAGLE-3 head, chain of 5", lambda models: DraftHead(models.eagle), ONE, {}),
    Kind("MTP layer, chain of 5", lambda models: DraftHead(models.mtp), ONE, {}),
    Kind("DSpark head, block", lambda models: DraftHead(models.block), ONE, {}),
    Kind("4 ragged rows, plain", lambda _: Plain(), FOUR, {}),
    Kind("4 ragged rows, prompt lookup", lambda _: PromptLookup(min_match=1), FOUR, {}),
    Kind("4 ragged rows, chain of 5", _small, FOUR, {}),
    Kind("4 ragged rows, chain of 5, sampled", _small, FOUR, SAMPLED),
    Kind("4 ragged rows, chain of 5, repetition penalty", _small, FOUR, {"repetition_penalty": 1.1}),
    Kind("4 ragged rows, DySpec(16)", _small, FOUR, {"tree": DySpec(16)}),
    Kind("4 ragged rows, early exit, DySpec(16)", lambda _: EarlyExit(2), FOUR, {"tree": DySpec(16)}),
    Kind("4 ragged rows, EAGLE-3 head", lambda models: DraftHead(models.eagle), FOUR, {}),
]


class Models:
    """A target and a draft that agrees with it now and then, on the host and on the GPU; there heads that have learnt
    nothing too, of as many layers as the target (an MTP layer is one)."""

    def __init__(self, num_layers: int) -> None:
        self.host = tiny_model("llama", num_hidden_layers=num_layers)
        self.target = tiny_model("llama", num_hidden_layers=num_layers)
        self.draft = tiny_model("llama", num_hidden_layers=num_layers)
        generator = torch.Generator().manual_seed(0)
        for weight in self.draft.parameters():
            weight.data += 0.05 * weight.data.std() * torch.randn(weight.shape, generator=generator)
        layers, drafted = LlamaConfig(**layer_sizes(self.host, num_layers)), torch.arange(self.host.config.vocab_size)
        with seeded(0):
            self.eagle = new_head(Eagle3, EAGLE3, layers, (1, 2), self.host, drafted)
        self.mtp = initial_mtp(self.host, MtpRecipe())
        self.block = initial_block(self.host, drafted[:-1], BlockRecipe(num_layers=num_layers), (1, 2))

    def move_to(self, gpu: FakeGpu) -> None:
        with gpu:
            for model in (self.target, self.draft, self.eagle, self.mtp, self.block):
                gpu.take(model)


def count(kind: Kind, models: Models, gpu: FakeGpu, num_calls: int) -> Counts:
    """Of the median round of the last of so many calls, by launches.

    Raises `SystemExit` if a greedy output is not the CPU's.
    """
    rounds: list[Counts] = []
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **kind.options}
    with gpu, _counting(gpu, rounds):
        prompts = {name: tensor.to(gpu.device()) for name, tensor in kind.prompts.items()}
        for _ in range(num_calls):
            rounds.clear()
            torch.manual_seed(0)
            tokens = specdec.generate(models.target, **prompts, drafter=kind.make(models), **settings).cpu()
    if not settings["do_sample"]:
        expected = specdec.generate(models.host, **kind.prompts, drafter=Plain(), **{**settings, "tree": None})
        if not torch.equal(tokens, expected):
            raise SystemExit(f"{kind.name}: another output than on the CPU")
    return sorted(rounds, key=lambda each: each.launches)[len(rounds) // 2]


@contextmanager
def _graphs(gpu: FakeGpu) -> Iterator[None]:
    """Replays are one launch, whatever the stand-in does, and so are kernels, whatever their twins do."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            with gpu.one_launch(name):
                return function(*given)

        return call

    replay = mock.patch.object(graphs._StandIn, "replay", counted("graph", graphs._StandIn.replay))
    arrange = mock.patch.object(slots, "reference", counted("slots", slots.reference))
    with graphs.standing_in(), replay, arrange:
        yield


@contextmanager
def _counting(gpu: FakeGpu, rounds: list[Counts]) -> Iterator[None]:
    round_ = DecodingLoop.round

    def counted(loop: DecodingLoop) -> None:
        gpu.forget()
        round_(loop)
        if len(loop.sequences) == loop.sequences.num_all_rows:  # a row that leaves is no ordinary round
            rounds.append(Counts(gpu.num_launches, gpu.num_queued_copies, gpu.num_syncs, dict(Counter(gpu.syncs))))

    with mock.patch.object(DecodingLoop, "round", counted):
        yield


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of target and draft")
    parser.add_argument("--graphs", action="store_true", help="replay forwards that come again")
    names = [kind.name for kind in KINDS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these kinds of rounds")
    parser.add_argument("--sites", action="store_true", help="name where the host waits")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    arguments = parser.parse_args()
    models, found = Models(arguments.layers), {}
    gpu = FakeGpu()  # from now on nothing can be seeded
    models.move_to(gpu)
    for kind in KINDS:
        if kind.name not in arguments.only:
            continue
        with _graphs(gpu) if arguments.graphs else nullcontext():
            found[kind.name] = count(kind, models, gpu, 2 if arguments.graphs else 1)
        log(kind.name)
    if arguments.json:
        print(json.dumps({name: asdict(counts) for name, counts in found.items()}))
        return
    rows = [(name, each.launches, each.queued_copies, each.syncs) for name, each in found.items()]
    print(pipe_table(("round", "launches", "copies queued", "waits of the host"), rows))
    for name, each in found.items() if arguments.sites else ():
        for site, times in each.sites.items():
            print(f"{name}: {times} x {site}")


if __name__ == "__main__":
    main()
