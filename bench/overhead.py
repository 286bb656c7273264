"""What a round costs outside the forwards.

    python -m bench.overhead [--num-tokens 5] [--repetitions 7] [--json]
    python -m bench.overhead --trees [--rounds 12] [--repetitions 7] [--json]

The first compares specdec with transformers' own assisted generation. Target and draft are tiny random models, so that
almost all the time is the framework's. The seconds spent inside `model.forward` of either are measured and taken away;
what is left is divided by the target's forwards. The two sides run interleaved in one process with one thread, on the
same prompt, and must give the same tokens.

The second takes a round with a 64-node tree apart: one row, one thread, 50 000 tokens, made-up scores. Columns:

    grow     the policy's work on all layers, what it needs of a softmax of the draft's scores included
    finish   the draft: the trees, their grown indices, and q
    masks    masks of every layer (for the draft) and of the tree (for the target), with the ancestors and depths
             that the policy has not brought along
    accept   verification and its copy to the host, what it needs of a softmax of the target's scores included
    compact  the caches of target (28 layers) and draft (24 layers) keep the accepted path

`total` is grow + finish + masks + accept + compact. `softmax`, timed on its own, is that of every slot that was scored
for the draft, and of the target's whole tree where it samples: what a sampler that does nothing twice would begin with.
Columns are means over the rounds. A round is repeated with the same draws, and the least time of each step counts, in
seconds of the thread, because other programs disturb both.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter, thread_time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedModel

import specdec
from bench._script import parser_of
from specdec.acceptance import to_host
from specdec.decoding.sampling import Sampler
from specdec.drafters import Plain, PromptLookup, SmallModel
from specdec.kernels.trees.token_source import open_token_source
from specdec.tree_model import masks
from specdec.tree_model.cache import TreeCache
from trees import Draft, DySpec, DySpecThreshold, Fixed, Grower, GrowingTrees, GrowthPolicy, Round, Sequoia

VOCAB_SIZE = 8192

TREE_VOCAB_SIZE = 50_000
POLICIES = {
    "DySpec": DySpec(64),
    "DySpecThreshold": DySpecThreshold(max_nodes=64),
    "Sequoia": Sequoia(64, (0.6, 0.15, 0.07, 0.04, 0.03, 0.02)),
    "Fixed": Fixed((4, 2, 2, 1, 1)),
}
MODES = {
    "greedy": {"do_sample": False},
    "topdown": {"do_sample": True, "verify": "topdown"},
    "traversal": {"do_sample": True, "verify": "traversal"},
}
PHASES = ("grow", "finish", "masks", "accept", "compact")


@dataclass
class Clock:
    """Seconds and calls inside a model's forward."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Side:
    """One way of decoding, and what each repetition measured: milliseconds a round outside the forwards."""

    name: str
    decode: Callable[[], torch.Tensor]
    overheads_ms: list[float] = field(default_factory=list)


def tiny_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@contextmanager
def clocked(model: PreTrainedModel):
    """Measure the time inside `model.forward`."""
    clock, forward = Clock(), model.forward

    def timed_forward(*args, **kwargs):
        started = perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            clock.seconds += perf_counter() - started
            clock.calls += 1

    timed_forward.__signature__ = inspect.signature(forward)
    model.forward = timed_forward
    try:
        yield clock
    finally:
        del model.forward


def measure(side: Side, target: PreTrainedModel, draft: PreTrainedModel) -> torch.Tensor:
    with clocked(target) as target_clock, clocked(draft) as draft_clock:
        started = perf_counter()
        tokens = side.decode()
        seconds = perf_counter() - started
    outside = seconds - target_clock.seconds - draft_clock.seconds
    side.overheads_ms.append(1000 * outside / target_clock.calls)
    return tokens


def sides(target: PreTrainedModel, draft: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> list[Side]:
    common = {"max_new_tokens": 200, "do_sample": False}
    draft.generation_config.num_assistant_tokens = num_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0

    def ours(drafter):
        return lambda: specdec.generate(target, prompt, drafter=drafter, **common)

    return [
        Side("transformers plain", lambda: target.generate(prompt, **common)),
        Side("transformers assisted", lambda: target.generate(prompt, assistant_model=draft, **common)),
        Side(
            "transformers prompt lookup",
            lambda: target.generate(prompt, prompt_lookup_num_tokens=num_tokens, **common),
        ),
        Side("specdec Plain", ours(Plain())),
        Side("specdec SmallModel", ours(SmallModel(draft, num_tokens=num_tokens))),
        Side("specdec PromptLookup", ours(PromptLookup(num_tokens=num_tokens, min_match=1))),
    ]


class ScorePair:
    """Scores of a draft and a target that know nothing but the last token.

    Probabilities fall like a power of the rank, steeply where the text is easy; the target's scores are noisy.
    """

    def __init__(self, num_contexts: int = 256):
        generator = torch.Generator().manual_seed(0)
        ranks_RV = torch.rand(num_contexts, TREE_VOCAB_SIZE, generator=generator).argsort(-1)
        steepness_R1 = 1.5 + 3.0 * torch.rand(num_contexts, 1, generator=generator)
        self._draft_RV = -steepness_R1 * torch.log1p(ranks_RV.float())
        self._target_RV = self._draft_RV + 0.7 * torch.randn(ranks_RV.shape, generator=generator)

    def draft(self, tokens_BM: Tensor) -> Tensor:
        return self._draft_RV[tokens_BM % len(self._draft_RV)]

    def target(self, tokens_BT: Tensor) -> Tensor:
        return self._target_RV[tokens_BT % len(self._target_RV)]


class FilledCache:
    """A cache of one row whose forwards are random states."""

    def __init__(self, num_layers: int, num_heads: int, head_size: int, length: int = 256):
        self.cache = TreeCache(num_layers=num_layers, num_rows=1, capacity=4 * length)
        self._state_shape = (1, num_heads, -1, head_size)
        self.forward(length)
        self.cache.commit([range(length)])

    def forward(self, num_tokens: int) -> None:
        states = torch.randn(1, num_tokens, self._state_shape[1] * self._state_shape[3])
        for index in range(len(self.cache.layers)):
            self.cache.update(*(states.view(self._state_shape),) * 2, index)


class TreeRounds:
    """Rounds of one policy in one mode: a row of sizes and milliseconds each."""

    def __init__(self, scores: ScorePair, policy: GrowthPolicy, *, do_sample: bool, verify: str = "topdown"):
        self.rows: list[dict[str, float]] = []
        self._scores = scores
        self._policy = policy
        self._sampler = Sampler(LogitsProcessorList(), do_sample=do_sample, verify=verify)
        self._previous: Grower | None = None
        self._target, self._draft = FilledCache(28, 2, 128), FilledCache(24, 2, 64)

    def run(self, root: int, repetitions: int) -> None:
        clocks = []
        for _ in range(repetitions):
            torch.manual_seed(root)
            self._clock: dict[str, float] = defaultdict(float)
            draft, grower = self._round(torch.tensor([[root]]))
            clocks.append(self._clock)
        self._previous = grower
        self.rows.append(
            {"size": draft.trees.width, "depth": draft.trees.depth}
            | {phase: 1000 * min(clock[phase] for clock in clocks) for phase in ("softmax", *PHASES)}
        )

    def _round(self, root_11: Tensor) -> tuple[Draft, Grower]:
        draft, grower = self._grow(root_11)
        trees = draft.trees
        with self._phase("masks"):
            masks.visible_slots(trees.ancestors_BTT, self._target.cache.lengths, None)
            trees.depths_BT  # noqa: B018
        scores_BTV = self._scores.target(torch.cat([root_11, trees.tokens_BN], 1))
        self._target.forward(trees.num_slots)
        if self._sampler.do_sample:
            with self._phase("softmax"):
                scores_BTV.softmax(-1)
        with self._phase("accept"):
            (path,) = to_host(trees, self._sampler.accept(scores_BTV, draft)).paths
        with self._phase("compact"):
            self._target.cache.commit([[0, *(node + 1 for node in path)]])
            grown = [draft.grown_indices[0][node] for node in path]
            self._draft.cache.commit([[index for index in grown if index >= 0]])
        return draft, grower

    def _grow(self, root_11: Tensor) -> tuple[Draft, Grower]:
        scores_BMV = self._scores.draft(root_11)
        with self._phase("grow"):
            round_ = Round(
                max_depths=[100],
                sample=self._sampler.do_sample,
                previous=self._previous,
                token_source=open_token_source,
            )
            grower = self._policy.start(round_)
        grown = GrowingTrees(1)
        while True:
            with self._phase("softmax"):
                scores_BMV.softmax(-1)
            with self._phase("grow"):
                layer = grower.grow(scores_BMV)
            if not grower.needs_scores:
                break
            with self._phase("masks"):
                grown.append(layer)
                masks.visible_slots(grown.seen_nodes_BMN, self._draft.cache.lengths, None)
                grown.depths_BM  # noqa: B018
            scores_BMV = self._scores.draft(layer.tokens_BM)
            self._draft.forward(layer.tokens_BM.shape[1])
        with self._phase("finish"):
            draft = grower.finish()
        return draft, grower

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = thread_time()
        yield
        self._clock[name] += thread_time() - started

    def summary(self) -> dict[str, float]:
        means = {column: mean(row[column] for row in self.rows) for column in self.rows[0]}
        return {**means, "total": sum(means[phase] for phase in PHASES)}


def profile_trees(num_rounds: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Policies and modes take turns, so that a busy moment of the machine meets them all."""
    scores = ScorePair()
    sides = {
        f"{name} {mode}": TreeRounds(scores, policy, **options)
        for name, policy in POLICIES.items()
        for mode, options in MODES.items()
    }
    for root in range(num_rounds):
        for side in sides.values():
            side.run(root, repetitions)
    return {name: side.summary() for name, side in sides.items()}


def print_profile(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"{'milliseconds a round':<28}" + "".join(f"{column:>9}" for column in columns))
    for name, row in rows.items():
        print(
            f"{name:<28}"
            + "".join(f"{row[column]:>9.{1 if column in ('size', 'depth') else 2}f}" for column in columns)
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--num-tokens", type=int, default=5, help="drafted tokens a round")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--trees", action="store_true", help="take rounds with a 64-node tree apart")
    parser.add_argument("--rounds", type=int, default=12, help="different trees of each kind")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.trees:
        profile = profile_trees(args.rounds, args.repetitions)
        print(json.dumps(profile)) if args.json else print_profile(profile)
        return
    target, draft = tiny_model(0), tiny_model(1)
    prompt = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(0))
    competitors = sides(target, draft, prompt, args.num_tokens)
    for repetition in range(args.repetitions + 1):
        outputs = [measure(side, target, draft) for side in competitors]
        assert all(torch.equal(outputs[0], tokens) for tokens in outputs), "the sides disagree"
        if repetition == 0:
            for side in competitors:
                side.overheads_ms.clear()
    rows = {
        side.name: {"median_ms": median(side.overheads_ms), "min_ms": min(side.overheads_ms)} for side in competitors
    }
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'outside the forwards, ms a round':<34}{'median':>8}{'min':>8}")
    for name, row in rows.items():
        print(f"{name:<34}{row['median_ms']:>8.2f}{row['min_ms']:>8.2f}")
    ratio = rows["transformers assisted"]["median_ms"] / rows["specdec SmallModel"]["median_ms"]
    print(f"transformers assisted / specdec SmallModel: {ratio:.1f}x")


if __name__ == "__main__":
    main()
