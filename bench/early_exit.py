"""A model that drafts for itself, beside plain decoding and transformers' own early exit.

    python -m bench.early_exit MODEL [--weights float|int8] [--exits FILE] [--threads 2] [--limit 2] [--out NAME]

Short for `specdec bench` with these methods: all sides run on one prepared model, interleaved in one process, greedy,
on the built-in suite; times include the prefill, and are medians. transformers (`assistant_early_exit`) runs at each of
`--layers`. The outputs of specdec's sides must equal plain decoding's but for numerical ties, or the run fails. A table
goes to stdout; `--out NAME` also writes `bench/results/NAME.json`.
"""

from __future__ import annotations

import argparse

from bench._script import RESULTS, parser_of
from specdec.cli.app import app


def options(args: argparse.Namespace) -> list[str]:
    """Those of `specdec bench`."""
    exits = "" if args.exits is None else f":exits={args.exits}"
    settings = {
        "--model": args.model,
        "--dtype": "float32",
        "--weights": args.weights,
        "--reference": "plain",
        "--methods": f"plain,early-exit{exits}",
        "--peers": ",".join(f"transformers/early-exit:exit_layer={layer}" for layer in args.layers),
        "--max-new-tokens": args.max_new_tokens,
        "--repetitions": args.repetitions,
        "--threads": args.threads,
        "--limit": args.limit,
        "--output": args.out and RESULTS / f"{args.out}.json",
    }
    return [str(part) for name, value in settings.items() if value for part in (name, value)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--weights", choices=("float", "int8"), default="float")
    parser.add_argument("--exits", help="file of trained exits; 'none' for the model's own head; default: shipped ones")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 12, 20], help="exits of transformers' side")
    parser.add_argument("--limit", type=int, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", help="name of a file in bench/results")
    app(["bench", *options(parser.parse_args())])


if __name__ == "__main__":
    main()
