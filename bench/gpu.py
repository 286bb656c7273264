"""Ten minutes on one GPU: plain decoding against the memory's bandwidth, and speculation against transformers' best.

    python -m bench.gpu [--shape 8b] [--device cuda] [--parts memory,attention,forwards,...] [--seconds 600]
        [--tokens 128] [--prompt 512] [--repetitions 3] [--no-compile] [--output PATH]

Models have the shape of a Llama of that size, random weights, and are built on the device: nothing is downloaded. The
target's upper layers add little, so that its first layers are a draft that often agrees. Parts print when they are
done and can be run alone; one that begins after the budget is left out. Peers are in the same run: transformers eager,
its static cache with `torch.compile`, its assisted generation and its prompt lookup. Every figure is the median of
interleaved repetitions. A greedy output that differs from transformers' at more than a numerical tie fails the run.
On a CPU (`--device cpu --shape tiny`), with a stand-in for graphs, it shows that the script works, and nothing else.
The last line is JSON.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import specdec
from bench._script import log, parser_of, pipe_table, write_json
from specdec.control.costs import measure_forwards
from specdec.cuda import attention as tree_attention
from specdec.cuda import graphs
from specdec.cuda.arena import Arena
from specdec.cuda.model import reads_all, why_not
from specdec.cuda.seen import TAIL_SLOTS, Seen
from specdec.drafters import Auto, Drafter, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.kernels.model import device_int4
from specdec.kernels.model.changes import parts_of
from specdec.kernels.model.profile import profile_of
from specdec.testing.equality import TIE_BOUND, Verdict, compare

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "layers": 4, "heads": 4, "kv": 2, "inner": 128, "vocab": 512, "draft": 1},
    "1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv": 8, "inner": 8192, "vocab": 128256, "draft": 2},
    "3b": {"hidden": 3072, "layers": 28, "heads": 24, "kv": 8, "inner": 8192, "vocab": 128256, "draft": 3},
    "8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv": 8, "inner": 14336, "vocab": 128256, "draft": 4},
}
UPPER_SCALE = 0.02
"""Of what the layers above the draft's add: the smaller, the more often the draft agrees."""
TIE_STEPS, BFLOAT16_STEP = 2, 0.125
"""Logits of 16 and more, as the greatest of these are, lie so far apart in bfloat16."""
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}


@dataclass
class Session:
    """What the parts share, and what they have found."""

    target: PreTrainedModel
    draft: PreTrainedModel
    device: torch.device
    num_tokens: int
    prompt_length: int
    repetitions: int
    compiles: bool
    bandwidth: float | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """That a plain step reads: all but the embedding, of which it reads a row."""
        embedding = self.target.get_input_embeddings().weight
        weights = (weight for weight in self.target.parameters() if weight is not embedding)
        return sum(part.nbytes for weight in weights for part in parts_of(weight))

    def prompts(self, num_rows: int, *, repeats: bool = False) -> dict[str, Tensor]:
        """Of random tokens; with `repeats` the same few again and again."""
        generator = torch.Generator().manual_seed(num_rows)
        length = min(32, self.prompt_length) if repeats else self.prompt_length
        ids = torch.randint(10, self.target.config.vocab_size, (num_rows, length), generator=generator)
        ids = ids.repeat(1, -(-self.prompt_length // length))[:, : self.prompt_length].to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def build(shape: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target, and a draft of its first layers."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        intermediate_size=sizes["inner"],
        vocab_size=sizes["vocab"],
        max_position_embeddings=1 << 16,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for weight in target.lm_head.parameters():
            weight.mul_(4 / (weight.std() * sizes["hidden"] ** 0.5))  # logits that differ by more than rounding
        for layer in target.model.layers[sizes["draft"] :]:
            layer.self_attn.o_proj.weight.mul_(UPPER_SCALE)
            layer.mlp.down_proj.weight.mul_(UPPER_SCALE)
    small = LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": sizes["draft"]})
    with torch.device("meta"):
        draft = AutoModelForCausalLM.from_config(small, dtype=dtype).eval()
    draft.model.embed_tokens, draft.model.norm, draft.lm_head = (
        target.model.embed_tokens,
        target.model.norm,
        target.lm_head,
    )
    draft.model.layers, draft.model.rotary_emb = target.model.layers[: sizes["draft"]], target.model.rotary_emb
    return target, draft


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, run: Callable[[], Any]) -> float:
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def memory(session: Session) -> None:
    """Bytes read and written a second by a copy: the floor that plain decoding is held against."""
    source = torch.empty(COPIED_BYTES[session.device.type], dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    target.copy_(source)
    fastest = min(seconds_of(session.device, lambda: target.copy_(source)) for _ in range(10))
    session.bandwidth = 2 * source.numel() / fastest
    session.found["memory"] = {"copy_bytes_per_second": session.bandwidth}
    log(f"memory: a copy moves {session.bandwidth / 1e9:.0f} GB/s; weights {session.weight_bytes / 1e9:.2f} GB")


ATTENDED = ((512, 1), (512, 16), (8192, 1), (8192, 16), (8192, 64))
"""Lengths of a text, and new slots."""


def attention(session: Session) -> None:
    """The tree attention of one layer beside PyTorch's with a bias, which needs every head's keys: time and error."""
    config, rows = session.target.config, []
    scale, group = config.head_dim**-0.5, config.num_attention_heads // config.num_key_value_heads
    for length, width in ATTENDED:
        length = min(length, 16 * session.prompt_length)
        num_slots = 1 << (length + TAIL_SLOTS - 1).bit_length()
        like = {"device": session.device, "dtype": session.target.dtype}
        queries = torch.randn(1, config.num_attention_heads, width, config.head_dim, **like)
        keys, values = torch.randn(2, 1, config.num_key_value_heads, num_slots, config.head_dim, **like)
        lengths = torch.full((1,), length, device=session.device)
        order = torch.arange(width, device=session.device)
        bits = tree_attention.seen_bits((order[:, None] >= order)[None])
        given = (queries, keys, values, Seen(torch.zeros_like(bits), lengths, bits))
        lowest = torch.finfo(queries.dtype).min
        bias = torch.full((1, 1, width, num_slots), lowest, **like).masked_fill_(
            torch.arange(num_slots, device=session.device) <= length + order[:, None], 0
        )
        runs = {
            "ours": lambda given=given, n=num_slots: tree_attention.tree_attention(*given, scale=scale, num_slots=n),
            "biased": lambda q=queries, k=keys, v=values, bias=bias: torch.nn.functional.scaled_dot_product_attention(
                q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=bias, scale=scale
            ).transpose(1, 2),
        }
        outputs = {name: run().float() for name, run in runs.items()}
        us = {name: 1e6 * repeated(session.device, run) for name, run in runs.items()}
        error = float((outputs["ours"] - outputs["biased"]).abs().max())
        read = 2 * keys[:, :, :length].numel() * keys.element_size() / (us["ours"] / 1e6)
        rows.append((f"{length} slots, {width} new", *(f"{us[name]:.1f}" for name in runs), f"{read / 1e9:.0f}", error))
    session.found["attention"] = {
        name: {"us": float(ours), "biased_us": float(biased)} for name, ours, biased, *_ in rows
    }
    log(f"attention\n{pipe_table(('what', 'ours, us', 'with a bias, us', 'read, GB/s', 'difference'), rows)}")


def repeated(device: torch.device, run: Callable[[], Tensor], times: int = 20) -> float:
    """Seconds of one of several in a row, without the launches."""
    pool = graphs.graphs_for(device)
    assert pool is not None, "there is a stand-in"
    graph = pool().capture(lambda: tuple(run() for _ in range(times)), [torch.empty(1, device=device)])
    return min(seconds_of(device, graph.replay) for _ in range(3)) / times


def forwards(session: Session) -> None:
    """The staircase that `Auto` prices with: forwards by their number of tokens, as graphs."""
    for context in (32, 2048):
        seconds = measure_forwards(session.target, context=context, time_limit_s=30)
        ms = {width: 1000 * seconds[width] for width in sorted(seconds)}
        session.found[f"forwards, {context} before"] = ms
        log(f"forwards, {context} slots before: " + ", ".join(f"{width}: {each:.2f} ms" for width, each in ms.items()))


def ours(session: Session, drafter: Drafter, prompts: dict[str, Tensor], **options: Any) -> Callable[[], Any]:
    return lambda: specdec.generate(
        session.target, **prompts, drafter=drafter, max_new_tokens=session.num_tokens, do_sample=False, **options
    )


def theirs(session: Session, prompts: dict[str, Tensor], **options: Any) -> Callable[[], Tensor]:
    return lambda: session.target.generate(
        **prompts, max_new_tokens=session.num_tokens, do_sample=False, pad_token_id=0, **options
    )


def race(session: Session, part: str, prompts: dict[str, Tensor], runs: dict[str, Callable[[], Tensor]]) -> None:
    """Take turns; the first is the reference of what is said. The first call of each is its warm-up, told apart."""
    outputs, first, times = {}, {}, {name: list[float]() for name in runs}
    for name, run in runs.items():
        first[name] = seconds_of(session.device, lambda name=name, run=run: outputs.update({name: run()}))
        run()  # what is captured is captured when it comes again
    for _ in range(session.repetitions):
        for name, run in runs.items():
            times[name].append(seconds_of(session.device, run))
    reference = next(iter(runs))
    rows, found = [], {}
    for name, taken in times.items():
        ms = 1000 * statistics.median(taken) / session.num_tokens
        found[name] = {
            "ms_per_token": ms,
            "all_seconds": taken,
            "first_call_seconds": first[name],
            "verdict": judge(session, prompts, outputs[reference], outputs[name]),
        }
        if session.bandwidth and part == "plain":
            found[name]["share_of_copy_bandwidth"] = session.weight_bytes / (ms / 1000) / session.bandwidth
        rows.append(
            (name, f"{ms:.2f}", *(str(found[name].get(key, "")) for key in ("share_of_copy_bandwidth", "verdict")))
        )
    session.found[part] = found
    log(f"{part}\n{pipe_table(('what', 'ms a token', 'share of copy bandwidth', 'output'), rows)}")


def judge(session: Session, prompts: dict[str, Tensor], expected: Tensor, actual: Tensor) -> str:
    """The worst of the rows."""
    start, worst = prompts["input_ids"].shape[1], Verdict.IDENTICAL
    for prompt, *row in zip(prompts["input_ids"], expected, actual, strict=True):
        reference, output = (tokens[start:].tolist() for tokens in row)
        worst = max(worst, compare(session.target, prompt, reference, output, {"do_sample": False}).verdict)
    return worst.name.lower()


def plain(session: Session) -> None:
    prompts = session.prompts(1)
    runs = {
        "transformers, eager": theirs(session, prompts),
        "specdec, plain": ours(session, Plain(), prompts),
        "specdec, auto": ours(session, Auto(), prompts),
    }
    if session.compiles:
        runs["transformers, static cache and compile"] = theirs(session, prompts, cache_implementation="static")
    race(session, "plain", prompts, runs)
    arena = profile_of(session.target).part(Arena)
    session.found["graphs"] = {
        "replays": arena.num_replays,
        "refused": why_not(session.target),
        "reads_all": reads_all(session.target),
    }
    log(f"graphs: {session.found['graphs']}")


def lookup(session: Session) -> None:
    prompts = session.prompts(1, repeats=True)
    runs = {
        "transformers, eager": theirs(session, prompts),
        "transformers, prompt lookup": theirs(session, prompts, prompt_lookup_num_tokens=10),
        "specdec, prompt lookup": ours(session, PromptLookup(), prompts),
    }
    race(session, "lookup", prompts, runs)


def assisted(session: Session) -> None:
    prompts = session.prompts(1)
    runs = {
        "transformers, eager": theirs(session, prompts),
        "transformers, assisted": theirs(session, prompts, assistant_model=session.draft),
        "specdec, small model": ours(session, SmallModel(session.draft), prompts),
    }
    race(session, "assisted", prompts, runs)
    stats = specdec.generate(
        session.target,
        **prompts,
        drafter=SmallModel(session.draft),
        max_new_tokens=session.num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    ).stats
    session.found["a round with a small model"] = {
        "rounds": stats.num_rounds,
        "acceptance_rate": stats.acceptance_rate,
        "draft_ms": 1000 * stats.draft_seconds / stats.num_rounds,
        "verify_ms": 1000 * stats.verify_seconds / stats.num_rounds,
        "replays_of_the_draft": profile_of(session.draft).part(Arena).num_replays,
    }
    log(f"a round with a small model: {session.found['a round with a small model']}")


def batch(session: Session) -> None:
    for num_rows in (4, 16):
        prompts = session.prompts(num_rows)
        runs = {
            "transformers, eager": theirs(session, prompts),
            "specdec, plain": ours(session, Plain(), prompts),
            "specdec, prompt lookup": ours(session, PromptLookup(), prompts),
            "specdec, small model": ours(session, SmallModel(session.draft), prompts),
        }
        race(session, f"batch of {num_rows}", prompts, runs)


def bits(session: Session) -> None:
    """What `exact="bits"` costs, plainly and with drafts; that logits are the same bits, or the run fails."""
    for num_rows in (1, 4):
        prompts, drafters = session.prompts(num_rows, repeats=True), {"plain": Plain(), "prompt lookup": PromptLookup()}
        race(
            session,
            f"bits, {num_rows} rows",
            prompts,
            {
                f"specdec, {name}{' of one shape' * bool(exact)}": ours(session, drafter, prompts, exact=exact)
                for exact in (None, "bits")
                for name, drafter in drafters.items()
            },
        )
        logits = [
            ours(session, drafter, prompts, exact="bits", return_dict_in_generate=True, output_logits=True)().logits
            for drafter in drafters.values()
        ]
        if not all(torch.equal(*pair) for pair in zip(*logits, strict=True)):
            raise SystemExit(f"bits, {num_rows} rows: plain and speculative logits differ")


def int4(session: Session) -> None:
    """A copy of the target with weights of 4 bits (`pip install torchao`): as its draft, and decoded itself."""
    stand_in = nullcontext()
    if session.device.type != "cuda":  # of nothing, in the dtype that is asked for
        session = replace(session, target=copy.deepcopy(session.target).to(torch.bfloat16))
        stand_in = device_int4.standing_in(lambda *_: None)
    elif not device_int4.is_installed():
        log(f"int4: left out, it {device_int4.describe()}")
        return
    with stand_in:
        prompts, drafter = session.prompts(1), QuantizedSelf(num_tokens=4, weights="int4")
        seconds = seconds_of(session.device, lambda: drafter.copy_of(session.target))
        quantised = replace(session, target=drafter.copy_of(session.target))
        runs = {
            "transformers, eager": theirs(session, prompts),
            "specdec, plain": ours(session, Plain(), prompts),
            "specdec, copy of 4 bits drafts": ours(session, drafter, prompts),
        }
        race(session, "int4, as a draft", prompts, runs)
        runs = {
            "transformers, eager": theirs(quantised, prompts),
            "specdec, plain": ours(quantised, Plain(), prompts),
            "specdec, prompt lookup": ours(quantised, PromptLookup(), prompts),
        }
        race(quantised, "int4, as the target", prompts, runs)
        forwarded = measure_forwards(quantised.target, time_limit_s=30)
        read = seconds_of(session.device, lambda: quantised.target(**prompts))
    session.found["int4"] = {
        "making_the_copy_seconds": seconds,
        "gigabytes": {"float": session.weight_bytes / 1e9, "int4": quantised.weight_bytes / 1e9},
        "forwards_ms": {width: 1000 * forwarded[width] for width in sorted(forwarded)},
        "reading_the_prompt_ms": 1000 * read,
    }
    log(f"int4: {session.found['int4']}")


PARTS: dict[str, Callable[[Session], None]] = {
    "memory": memory,
    "attention": attention,
    "forwards": forwards,
    "plain": plain,
    "lookup": lookup,
    "assisted": assisted,
    "batch": batch,
    "bits": bits,
    "int4": int4,
}


def run_parts(session: Session, names: Sequence[str], seconds: float) -> None:
    started = time.perf_counter()
    for name in names:
        spent = time.perf_counter() - started
        if spent > seconds:
            session.found.setdefault("left_out", []).append(name)
            log(f"{name}: left out, {spent:.0f} s are spent")
            continue
        PARTS[name](session)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=540, help="after which no part begins")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out transformers' static cache and compile")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; to see whether the script works: --device cpu --shape tiny")
    TIE_BOUND[torch.bfloat16] = TIE_STEPS * BFLOAT16_STEP
    target, draft = build(arguments.shape, device)
    session = Session(
        target=target,
        draft=draft,
        device=device,
        num_tokens=arguments.tokens,
        prompt_length=arguments.prompt,
        repetitions=arguments.repetitions,
        compiles=device.type == "cuda" and not arguments.no_compile,
    )
    with nullcontext() if device.type == "cuda" else graphs.standing_in():
        run_parts(session, parts, arguments.seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: these are no measurements of one"
    document = {"device": name, "shape": arguments.shape, "torch": torch.__version__, **session.found}
    if arguments.output:
        write_json(arguments.output, document)
    print(json.dumps(document))
    verdicts = [
        run["verdict"]
        for part in session.found.values()
        if isinstance(part, dict)
        for run in part.values()
        if isinstance(run, dict) and "verdict" in run
    ]
    if "different" in verdicts:
        sys.exit("an output differs from transformers' at more than a tie")


if __name__ == "__main__":
    main()
