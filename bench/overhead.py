"""What a round costs outside the forwards.

    python -m bench.overhead [--num-tokens 5] [--repetitions 7] [--json]

Compares specdec with transformers' own assisted generation. Target and draft are tiny random models, so that
almost all the time is the framework's. The seconds spent inside `model.forward` of either are measured and taken away;
what is left is divided by the target's forwards. The two sides run interleaved in one process with one thread, on the
same prompt, and must give the same tokens.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import specdec
from bench._script import parser_of
from specdec.drafters import Plain, PromptLookup, SmallModel

VOCAB_SIZE = 8192


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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--num-tokens", type=int, default=5, help="drafted tokens a round")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
