"""Traces of greedy runs for `bench.simulate_auto`: what a target says, and what others would propose at every position.

Shape legend: A tokens of an answer, D depth of a draft, K ranks (the chain's token, then its siblings), M chains.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import specdec
from specdec.drafters import Auto
from specdec.kernels import quantized_copy
from specdec.models import load
from specdec.suites import Prompt
from specdec.text.prompting import encode_prompts
from specdec.tree_model.model import TreeModel

DEPTH = 16
RANKS = 4
_SETTINGS = {"do_sample": False, "repetition_penalty": 1.0}
_LEAST_REACH = 0.01
"""Chains are followed until the product of their probabilities is below this."""
_FULL = 65535
"""Probabilities are kept as so many parts."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One prompt.

    Args:
        answer: what the target says, greedily, A tokens.
        draft_tokens_ADK: int32 [A, D, K] what a draft model would have proposed after the first n tokens of the
            answer, greedily: the chain's tokens (K = 0), and the likeliest siblings of each. Place 0 is not used, as
            the prompt's forward brings the first token. None: no draft model.
        draft_probs_ADK: their probabilities; 0 past the depth to which the chain was followed.
        copy_tokens_A: what a copy of the target with other weights says after the prompt and the answer's tokens
            before. None: no copy.
        copy_probs_A: and how sure it is.
    """

    category: str
    prompt: list[int]
    answer: list[int]
    draft_tokens_ADK: NDArray[np.int32] | None = None
    draft_probs_ADK: NDArray[np.float64] | None = None
    copy_tokens_A: NDArray[np.int32] | None = None
    copy_probs_A: NDArray[np.float64] | None = None


def save(path: Path, traces: Sequence[Trace]) -> None:
    arrays: dict[str, NDArray[np.generic]] = {"categories": np.array([trace.category for trace in traces])}
    for number, trace in enumerate(traces):
        for name, value in vars(trace).items():
            if name != "category" and value is not None:
                packed = np.round(value * _FULL).astype(np.uint16) if "probs" in name else np.asarray(value, np.int32)
                arrays[f"{number}/{name}"] = packed
    np.savez_compressed(path, **arrays)


def load_traces(path: Path) -> list[Trace]:
    """Raises: OSError, ValueError: this is no file that `record` has written."""
    with np.load(path, allow_pickle=False) as arrays:
        fields: defaultdict[int, dict[str, Any]] = defaultdict(dict)
        for key in arrays.files:
            number, _, name = key.partition("/")
            if name:
                value = arrays[key]
                is_text = name in ("prompt", "answer")
                fields[int(number)][name] = value.tolist() if is_text else value / _FULL if "probs" in name else value
        categories = arrays["categories"].tolist()
    return [Trace(category=category, **fields[number]) for number, category in enumerate(categories)]


def tuning_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, limit: int, longest: int
) -> list[tuple[Prompt, list[int]]]:
    """The first of each category with ids that are not divisible by 3, as text and as tokens."""
    by_category: defaultdict[str, list[tuple[Prompt, list[int]]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found = by_category[record["category"]]
        if record["question_id"] % 3 and len(found) < limit:
            prompt = Prompt(text=record["turns"][0], category=record["category"])
            tokens = encode_prompts(tokenizer, [prompt.text])["input_ids"][0].tolist()
            if len(tokens) <= longest:
                found.append((prompt, tokens))
    return [each for prompts in by_category.values() for each in prompts]


@torch.no_grad()
def propose_everywhere(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Greedy chains and their siblings after every position of an answer: tokens and probabilities [A, D, K].

    The chains are branches of one tree, a level a forward: those that have become unlikely are followed no further.
    """
    tree = TreeModel(model)
    tree.prefill(torch.tensor([prompt]))
    num_places = len(answer) - 1
    tokens_ADK = np.zeros((len(answer), DEPTH, RANKS), np.int32)
    probs_ADK = np.zeros((len(answer), DEPTH, RANKS))
    seen_MT = torch.ones((num_places, num_places), dtype=torch.bool).tril()
    logits_MV = tree.forward(torch.tensor([answer[:-1]]), torch.arange(num_places)[None], seen_MT[None])[0]
    places_M, reaches_M = torch.arange(num_places), torch.ones(num_places)
    for depth in range(DEPTH):
        probs_MK, tokens_MK = logits_MV.float().softmax(-1).topk(RANKS)
        tokens_ADK[places_M + 1, depth], probs_ADK[places_M + 1, depth] = tokens_MK.numpy(), probs_MK.numpy()
        reaches_M = reaches_M * probs_MK[:, 0]
        goes_on_M = reaches_M >= _LEAST_REACH
        if depth == DEPTH - 1 or not goes_on_M.any():
            break
        places_M, reaches_M, seen_MT = places_M[goes_on_M], reaches_M[goes_on_M], seen_MT[goes_on_M]
        seen_MT = torch.cat([seen_MT, torch.eye(len(places_M), dtype=torch.bool)], 1)
        newest_1M = tokens_MK[goes_on_M, 0][None]
        logits_MV = tree.forward(newest_1M, (places_M + depth + 1)[None], seen_MT[None])[0]
    return tokens_ADK, probs_ADK


@torch.no_grad()
def read_answer(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """What a model says after the prompt and before every token of an answer: tokens and probabilities [A]."""
    logits_AV = model(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=len(answer)).logits[0]
    probs_A, tokens_A = logits_AV.float().softmax(-1).max(-1)
    return tokens_A.int().numpy(), probs_A.double().numpy()


def record(args: argparse.Namespace) -> None:
    """The target decodes in int8; a draft in int8 proposes; the copy that differs is the model in float32.

    What there is is saved after each of the three.
    """
    torch.set_num_threads(args.threads)
    original, tokenizer, _ = load(args.model)
    fields = _decode(quantized_copy(original.float()), tokenizer, args)
    _save(args.out, fields)
    if args.draft is not None:
        draft = specdec.prepare(load(args.draft).model.float(), weights="int8")
        for each in fields:
            both = propose_everywhere(draft, each["prompt"], each["answer"])
            each["draft_tokens_ADK"], each["draft_probs_ADK"] = both
            print(f"{each['category']}: drafted", flush=True)
        _save(args.out, fields)
        del draft
    if args.copy:
        specdec.prepare(original)
        for each in fields:
            each["copy_tokens_A"], each["copy_probs_A"] = read_answer(original, each["prompt"], each["answer"])
            print(f"{each['category']}: compared with float32", flush=True)
        _save(args.out, fields)


def _decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[dict[str, Any]]:
    fields = []
    for prompt, tokens in tuning_prompts(args.prompts, tokenizer, limit=args.limit, longest=args.longest):
        ids = torch.tensor([tokens])
        out = specdec.generate(model, ids, drafter=Auto(), max_new_tokens=args.max_new_tokens, **_SETTINGS)
        answer = out[0, len(tokens) :].tolist()
        fields.append({"category": prompt.category, "prompt": tokens, "answer": answer})
        print(f"{prompt.category}: {len(tokens)} + {len(answer)} tokens", flush=True)
    return fields


def _save(path: Path, fields: Sequence[Mapping[str, Any]]) -> None:
    save(path, [Trace(**each) for each in fields])
