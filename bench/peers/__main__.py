"""specdec beside transformers and llama.cpp: the same prompts, greedy, the same threads, one process, taking turns.

    pip install "specdec-runtime[peers]"
    python -m bench.peers MODEL --draft SMALL --float --max-new-tokens 128 --output bench/results/peers.json
    python -m bench.peers MODEL --draft SMALL --int8 "" --llama "" --float auto --transformers prompt-lookup,assistant
    python -m bench.peers MODEL --gguf-blocks plain,auto --int8 "" --instructions avx2
    python -m bench.peers MODEL --draft HEAD --llama "" --float draft-head --economize plain,lookup@10,trained:FOLDER

MODEL and SMALL are folders or `.gguf` files; --draft takes a draft head, too. llama.cpp (through the wheel `xllamacpp`)
reads MODEL itself or the file `MODEL.gguf` beside the folder, or what --gguf and --draft-gguf name: without one it is
reported as not available. With --gguf-blocks specdec executes the blocks of that very file. economize (`pip install
economize`) drafts for the weights that transformers has; `@N` are the tokens of its cycles, one of them the target's.

Every configuration gets the same token ids and the same limit, and stops at the end-of-sequence token, which counts on
all sides. Two rates: `end to end` is new tokens over wall time, prefill included; `decode` is the tokens after the
first commit over the time after it. A prompt's rate is
the median of its repetitions, a category's the geometric mean of its prompts. Text is not expected to agree between
sides (float32, int8 and GGUF weights differ); `same` counts the prompts on which a configuration says what its own
side's plain decoding says. llama.cpp's servers hold one speculation each, and the n-gram maps learn from earlier
requests: those get a new server for every call, so that no repetition has seen the answer. The prebuilt wheel has no
AVX-512 code: `llama_cpp_features` in the JSON document says what it uses. Exit code 1: an output of specdec differs
from plain decoding by more than a numerical tie.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench._script import add_instructions, log, parser_of, select_instructions, write_json
from bench.peers.configurations import drafted_by, llama_configurations, prepared_copy, shared_copy, transformers_modes
from bench.peers.contest import FLOAT, GGUF, INT8, Configuration, Task, measure, warm_up
from bench.peers.economized import ECONOMIZE, economize_configurations
from bench.peers.report import available, environment, is_wrong, ratios, show, summarise, to_json
from specdec import kernels
from specdec.bench.peers import LLAMA_CPP, PeerSpec
from specdec.bench.peers.llama_cpp import LlamaFiles, find_gguf
from specdec.drafters.head.network import HeadNetwork
from specdec.errors import SpecdecError
from specdec.model_options import ModelOptions
from specdec.models import load
from specdec.models.pair import load_pair
from specdec.specs import PLAIN, TRANSFORMERS, DrafterSpec
from specdec.suites import ALL, load_suite
from specdec.text.prompting import encode_prompts

INT8_METHODS = "plain,prompt-lookup,small-model"
FLOAT_METHODS = "plain,prompt-lookup,quantized-self,small-model"
LLAMA_METHODS = "plain,draft,ngram-simple,ngram-mod,ngram-map-k,ngram-map-k4v,ngram-cache"
SMALL_MODEL_PARAMETERS = 500_000_000
"""Below this the bars of the demo model hold, above it those of the 1.5B."""


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model of the same tokenizer")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp reads")
    parser.add_argument("--draft-gguf", type=Path, help="what llama.cpp drafts with")
    parser.add_argument("--int8", metavar="METHODS", default=INT8_METHODS, help="%(default)s")
    parser.add_argument("--float", metavar="METHODS", nargs="?", const=FLOAT_METHODS, help="%(const)s")
    parser.add_argument("--gguf-blocks", metavar="METHODS", default="", help="what llama.cpp reads, executed as it is")
    parser.add_argument("--transformers", metavar="METHODS", default=PLAIN, help="plain is always among them")
    parser.add_argument("--economize", metavar="METHODS", default="", help="MODE, MODE:ARGUMENT or MODE@N")
    parser.add_argument("--llama", metavar="METHODS", default=LLAMA_METHODS, help="%(default)s")
    parser.add_argument("--prompts", type=Path, help="JSON lines; the built-in suite if absent")
    parser.add_argument("--category", action="append", default=[], help="may be given several times")
    parser.add_argument("--limit", type=int, help="prompts of each category")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_instructions(parser)
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of the tables")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file too")
    return parser.parse_args()


def check_methods(arguments: argparse.Namespace) -> None:
    """A typo is found before a model is loaded."""
    for method in _listed(arguments.int8) + _listed(arguments.float) + _listed(arguments.gguf_blocks):
        DrafterSpec.parse(method)
    for family, methods in ((LLAMA_CPP, arguments.llama), (TRANSFORMERS, arguments.transformers)):
        for method in _listed(methods):
            PeerSpec.parse(f"{family}/{method}")


def _listed(methods: str | None) -> list[str]:
    return methods.split(",") if methods else []


def pure_greedy(model: PreTrainedModel) -> PreTrainedModel:
    """Some checkpoints ask for a repetition penalty, which llama.cpp applies to another window of tokens."""
    model.generation_config.repetition_penalty = None
    return model


def build(arguments: argparse.Namespace) -> tuple[list[Configuration], list[Task], dict[str, Any], bool]:
    """The configurations, the tasks, what the numbers depend on, and whether the model is a small one."""
    check_methods(arguments)
    select_instructions(arguments.instructions)
    options = ModelOptions(dtype="float32", device="cpu", threads=arguments.threads)
    (model, tokenizer, name), small = load_pair(arguments.model, arguments.draft, options)
    draft = None if small is None else small.model
    head = draft if isinstance(draft, HeadNetwork) else None
    draft = None if head is not None else draft
    pure_greedy(model)
    prompts = load_suite(arguments.prompts).select(arguments.category, arguments.limit).prompts
    tasks = [Task(prompt=one, ids=encode_prompts(tokenizer, [one.text])["input_ids"][0].tolist()) for one in prompts]
    files = LlamaFiles(
        target=find_gguf(arguments.gguf, arguments.model),
        draft=find_gguf(arguments.draft_gguf, None if head is not None else arguments.draft),
    )
    configurations = [*transformers_modes(_listed(arguments.transformers), model, tokenizer, draft)]
    if arguments.economize:
        small_source = None if draft is None else arguments.draft
        configurations += economize_configurations(arguments.economize, lambda: shared_copy(model), small_source)
    if draft is not None:
        draft = kernels.quantized_copy(draft)
    draft = draft if head is None else head  # which its drafter fits to each target
    if arguments.int8:
        configurations += drafted_by(INT8, arguments.int8, kernels.quantized_copy(model), tokenizer, draft)
    if arguments.float:
        configurations += drafted_by(FLOAT, arguments.float, prepared_copy(model), tokenizer, draft)
    if arguments.gguf_blocks:
        if files.target is None:
            raise ValueError("--gguf-blocks needs MODEL.gguf beside the folder, or --gguf")
        executed = pure_greedy(load(files.target, threads=arguments.threads, weights="gguf").model)
        configurations += drafted_by(GGUF, arguments.gguf_blocks, executed, tokenizer, draft)
    longest = max(len(task.ids) for task in tasks) + arguments.max_new_tokens
    room = {"num_threads": arguments.threads, "context_length": longest}
    if arguments.llama:
        configurations += llama_configurations(arguments.llama, files, **room)
    heading = {"model": name, "draft": arguments.draft and Path(arguments.draft).name}
    heading["environment"] = environment(arguments, files)
    return configurations, tasks, heading, model.num_parameters() < SMALL_MODEL_PARAMETERS


def run(arguments: argparse.Namespace) -> bool:
    """Whether all outputs of specdec are right."""
    configurations, tasks, heading, is_small = build(arguments)
    warm_up(configurations, tasks[0], arguments.max_new_tokens)
    running = available(configurations)
    tasks = tasks[: measure(running, tasks, arguments.max_new_tokens, arguments.repetitions)]
    if not tasks:
        raise ValueError("interrupted before the first prompt was measured")
    rows = summarise(running, tasks)
    found = ratios(rows, is_small)
    document = heading | to_json(configurations, tasks, rows, found)
    if arguments.output is not None:
        write_json(arguments.output, document)
    if arguments.json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        show(document, rows, found)
    wrong = [row for row in rows if row.category == ALL and row.side not in (LLAMA_CPP, ECONOMIZE) and is_wrong(row)]
    for row in wrong:
        log(f"{row.name} differs from plain decoding on {row.num_prompts - row.num_same - row.num_ties} prompts")
    return not wrong


def main() -> None:
    try:
        is_right = run(parse_arguments())
    except (SpecdecError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
