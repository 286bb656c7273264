"""What verification costs a mixture of experts, where more tokens read more experts; `Auto` beside plain decoding.

    python -m bench.moe --output bench/results/moe [--experts 16] [--prepare]

The model is random and of a real one's shape: about 110M parameters, of which a token reads a seventh. Prompts are
random and say everything twice, so that there is something to look up. Plain decoding and `Auto` take turns, greedily,
and must say the same, up to numerical ties: exit code 1 if they do not. The second table says what a forward of several
tokens costs beside one of one token, and how many experts of a layer it reads: of different tokens, with which `Auto`
times forwards, and of equal ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import specdec
from bench._script import command, log, parser_of, pipe_table, write_report
from specdec import kernels
from specdec.control.costs import measure_forwards, varied_tokens
from specdec.drafters import Auto
from specdec.testing.equality import Verdict, compare
from specdec.tree_model.model import TreeModel
from trees import TreeBatch

OPTIONS = {"do_sample": False}
WIDTHS = (1, 2, 4, 8, 16, 32)
CONTEXT = 32


def random_moe(num_experts: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        initializer_range=0.1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


@contextmanager
def experts_read(model: MixtralForCausalLM) -> Iterator[set[int]]:
    """Within, those that the first layer's router chooses are added to the set."""
    read: set[int] = set()

    def note(router: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        read.update(outputs[2].unique().tolist())

    hook = model.model.layers[0].mlp.gate.register_forward_hook(note)
    try:
        yield read
    finally:
        hook.remove()


@torch.no_grad()
def count_experts(model: MixtralForCausalLM, width: int) -> tuple[int, int]:
    """That a forward of so many tokens reads: of different tokens, and of equal ones."""
    target, counts = TreeModel(model), []
    target.prefill(varied_tokens(target, 1, CONTEXT))
    different_1T = varied_tokens(target, 1, width)
    for tokens_1T in (different_1T, torch.zeros_like(different_1T)):
        chain = TreeBatch.chains(tokens_1T[:, 1:])
        with experts_read(model) as read:
            target.verify(chain, tokens_1T[:, :1])
        target.forget_tail()
        counts.append(len(read))
    return counts[0], counts[1]


def measure(model: MixtralForCausalLM, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What plain decoding and `Auto` took on every prompt, in turn."""
    drafter, rounds = Auto(), []
    for repetition in range(arguments.repetitions + 1):
        for prompt in range(arguments.prompts):
            generator = torch.Generator().manual_seed(prompt)
            ids = torch.randint(model.config.vocab_size, (1, 32), generator=generator).repeat(1, 2)
            options = OPTIONS | {"max_new_tokens": arguments.max_new_tokens}
            started = perf_counter()
            plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            between = perf_counter()
            auto = specdec.generate(model, ids, drafter=drafter, return_dict_in_generate=True, **options)
            ended = perf_counter()
            said = [out[0, ids.shape[1] :].tolist() for out in (plain, auto.sequences)]
            rounds.append(
                {
                    "prompt": prompt,
                    "repetition": repetition,
                    "plain_s": between - started,
                    "auto_s": ended - between,
                    "tokens_per_round": auto.stats.tokens_per_round,
                    "verdict": compare(model, ids[0], *said, OPTIONS).verdict.name,
                }
            )
            log(f"prompt {prompt}, repetition {repetition}: {(between - started) / (ended - between):.2f}x")
    return [each for each in rounds if each["repetition"]]  # the first one warms up


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="of the reports, without a suffix")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="make small forwards cheap first, in float32")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = random_moe(arguments.experts)
    if arguments.prepare:
        specdec.prepare(model)
    rounds = measure(model, arguments)
    seconds = measure_forwards(model, time_limit_s=60)
    widths = [[width, f"{seconds[width] / seconds[1]:.2f}", *count_experts(model, width)] for width in WIDTHS]
    speed_up = median(each["plain_s"] / each["auto_s"] for each in rounds)
    tokens_per_round = median(each["tokens_per_round"] for each in rounds)
    same = sum(each["verdict"] != Verdict.DIFFERENT.name for each in rounds)
    document = {
        "command": command("moe"),
        "num_parameters": sum(weights.numel() for weights in model.parameters()),
        "kernels": f"{kernels.describe()}, {arguments.threads} threads",
        "versions": {module.__name__: module.__version__ for module in (specdec, torch, transformers)},
        "seconds": seconds,
        "rounds": rounds,
    }
    write_report(
        arguments.output,
        document,
        pipe_table(
            ["auto beside plain, median", "tokens per round", "same as plain"],
            [
                [
                    f"{speed_up:.2f}x",
                    f"{tokens_per_round:.2f}",
                    f"{same}/{len(rounds)}",
                ]
            ],
        ),
        pipe_table(["tokens", "forward, beside one token", "experts read", "of equal tokens"], widths),
    )
    sys.exit(0 if same == len(rounds) else 1)


if __name__ == "__main__":
    main()
