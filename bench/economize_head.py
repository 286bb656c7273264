"""A jump head of the economize package, trained on the tokens that `specdec train-head` would write.

    pip install economize
    python -m bench.economize_head MODEL --self-generate 524288 --out FOLDER
    python -m bench.peers MODEL --draft HEAD --int8 "" --llama "" --float draft-head --economize plain,trained:FOLDER

With the same --rows, --length and --seed the text is that of `specdec train-head --kind jump --self-generate N`. The
head has its place: one copied layer that ends where the state is taken, a linear predictor, a readout. Loss and
optimiser are economize's own, but for a warm-up of at most a tenth of the steps (its hundred are meant for thousands);
steps and rows of a step are what --epochs epochs of ours come to.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench._script import log, parser_of
from specdec.kernels import quantized_copy
from specdec.model_options import ModelOptions
from specdec.models.pair import load_target
from specdec.training.heads.collect import NUM_ROWS, Collector, self_generation
from specdec.training.heads.jumps import jump_layers
from specdec.training.heads.recipes import JumpRecipe

_WARM_UP_STEPS = 100


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--self-generate", type=int, required=True, metavar="N", help="tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def written(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> torch.Tensor:
    """int64 [rows, length]."""
    num_shards = -(-arguments.self_generate // (arguments.rows * arguments.length))
    collector = Collector(model, None, self_generation(tokenizer), arguments.length, arguments.rows)
    shards = []
    for index in range(num_shards):
        log(f"text: {index} of {num_shards}")
        shards += [shard for shard in collector.shard(arguments.seed * 1_000_003 + index) if shard is not None]
    return torch.cat([shard.tokens_BT for shard in shards]).long()


def main() -> None:
    arguments = parse_arguments()
    try:
        economize: Any = import_module("economize")
    except ImportError:
        sys.exit("error: pip install economize")
    target = load_target(arguments.model, ModelOptions(dtype="float32", device="cpu", threads=arguments.threads))
    tokens = written(quantized_copy(target.model), target.tokenizer, arguments)
    landing, start = jump_layers(JumpRecipe(), target.model.config.get_text_config().num_hidden_layers)
    config = economize.JumpConfig(
        target_layer=landing, source_layer=start, exit_layer=start, predictor="linear", adaptation="full"
    )
    model = economize.apply(target.model, config)
    num_steps = arguments.epochs * -(-len(tokens) // arguments.batch_rows)
    import_module("economize.train").fit(
        model,
        tokens,
        steps=num_steps,
        warmup_steps=min(_WARM_UP_STEPS, num_steps // 10),
        batch_size=arguments.batch_rows,
        seq_len=arguments.length,
        seed=arguments.seed,
        output_dir=str(arguments.out) + ".run",
        callbacks=[lambda record: log(str(record))],
    )
    model.save_pretrained(str(arguments.out))


if __name__ == "__main__":
    main()
