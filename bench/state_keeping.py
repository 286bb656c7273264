"""What it costs to keep a state for every drafted token: a round of a chain beside the model's own forward.

    python -m bench.state_keeping [--families qwen3_5_text,lfm2] [--tokens 8] [--rounds 30] [--threads 1] [--output F]

Models of about 100 million random float32 parameters. A round is `verify` of a root and a chain, and `commit` of half
of it; the model's own forward reads as many tokens on a copy of its cache and keeps nothing but the last state. The two
take turns. The chain's logits must be those of single steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench._script import log, parser_of, pipe_table, write_json
from specdec.hf import cache_name
from specdec.tree_model.compatibility import check_model
from specdec.tree_model.model import TreeModel
from trees import TreeBatch

_PERIOD = ["linear_attention"] * 3 + ["full_attention"]
_COMMON = {"vocab_size": 16_000, "hidden_size": 768, "tie_word_embeddings": True}
_ATTENTION = {"intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
_HEADS = {"linear_num_key_heads": 6, "linear_num_value_heads": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_ATTENTION, **_HEADS, "num_hidden_layers": 12, "layer_types": _PERIOD * 3},
    "granitemoehybrid": {
        **{name: value for name, value in _ATTENTION.items() if name != "head_dim"},
        **{"num_hidden_layers": 12, "layer_types": _PERIOD * 3, "num_local_experts": 0},
        **{"mamba_n_heads": 24, "mamba_d_head": 64, "shared_intermediate_size": 2048},
    },
    "mamba2": {"num_heads": 24, "head_dim": 64, "n_groups": 1, "num_hidden_layers": 24},
    "lfm2": {
        **{name: value for name, value in _ATTENTION.items() if name != "head_dim"},
        **{"num_hidden_layers": 12, "layer_types": (["conv"] * 3 + ["full_attention"]) * 3},
    },
}
PROMPT = 64


def made(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **_COMMON, **SETTINGS[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def timed(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


class Sides:
    """A round of the tree model, and the model's own forward of the same tokens after the same prompt."""

    def __init__(self, model: PreTrainedModel, num_tokens: int):
        self._model = model
        ids_1P = torch.arange(PROMPT).unsqueeze(0) * 7919 % 16_000
        self._ids_1T = torch.arange(1, num_tokens + 1).unsqueeze(0) * 104_729 % 16_000
        self._kept = [range(num_tokens // 2)]
        self._chain = TreeBatch.chains(self._ids_1T[:, 1:])
        self._target = TreeModel(model)
        self._target.prefill(ids_1P)
        self._start = self._target.cache.point()
        self._cache = DynamicCache(config=model.config)
        self._read(ids_1P, self._cache)

    def round(self) -> float:
        seconds = timed(self._round)
        self._target.cache.return_to(self._start)
        return seconds

    def own(self) -> float:
        cache = copy.deepcopy(self._cache)
        return timed(lambda: self._read(self._ids_1T, cache))

    def difference(self) -> float:
        """Largest, of the logits of a chain and of single steps."""
        by_chain = self._target.verify(self._chain, self._ids_1T[:, :1])
        self._target.forget_tail()
        cache = copy.deepcopy(self._cache)
        steps = [self._read(token_11, cache) for token_11 in self._ids_1T.split(1, 1)]
        return float((by_chain - torch.cat(steps, 1)).abs().max())

    def _round(self) -> None:
        self._target.verify(self._chain, self._ids_1T[:, :1])
        self._target.commit(self._kept)

    def _read(self, ids_1T: Tensor, cache: DynamicCache) -> Tensor:
        return self._model(input_ids=ids_1T, use_cache=True, **{cache_name(self._model): cache}).logits


@torch.no_grad()
def measure(family: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    model = made(family)
    check_model(model)
    sides = Sides(model, num_tokens)
    difference = sides.difference()
    assert difference < 1e-3, f"{family}: the chain's logits differ from those of single steps by {difference}"
    pairs = [(sides.round(), sides.own()) for _ in range(rounds + 3)][3:]
    return {
        "family": family,
        "parameters": model.num_parameters(),
        "round_ms": round(1e3 * median(ours for ours, _ in pairs), 1),
        "own_forward_ms": round(1e3 * median(own for _, own in pairs), 1),
        "round_over_own": round(median(ours / own for ours, own in pairs), 3),
        "largest_difference": difference,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--families", default=",".join(SETTINGS))
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for family in options.families.split(","):
        lines.append(measure(family, options.tokens, options.rounds))
        log(str(lines[-1]))
    print(pipe_table(list(lines[0]), [list(line.values()) for line in lines]))
    if options.output is not None:
        write_json(options.output, {"tokens": options.tokens, "threads": options.threads, "families": lines})


if __name__ == "__main__":
    main()
