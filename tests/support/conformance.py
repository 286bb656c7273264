"""Runs one call of `generate()` twice, plainly and with specdec, and tells what differs.

Plain `model.generate()` is the specification. `EXPLAINED` holds the differences that are meant;
`docs/conformance.md` lists them under the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.drafters import Auto, Drafter, EarlyExit, Plain, PromptLookup, QuantizedSelf, SmallModel, SparseSelf
from specdec.hf import CACHE
from specdec.testing import ByteTokenizer, ScriptedDrafter, tiny_model
from tests.support.conformance_cases import (
    CONFIG_FIELDS,
    MAX_POSITIONS,
    REFUSED,
    VOCAB_SIZE,
    Case,
    HalveInPlace,
    Prompt,
    config_of,
)
from tests.support.references import PartlyWrongScript, with_noise

TOKENIZER = ByteTokenizer()


@lru_cache
def model_of(family: str, attention: str | None) -> PreTrainedModel:
    """In float64, where a tie of two different computations is as good as impossible, if transformers can do that."""
    single = attention == "eager" or family in ("gemma2", "gemma3_text")
    return tiny_model(
        family,
        seed=5,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        dtype=torch.float32 if single else torch.float64,
        attn_implementation=attention,
    )


@lru_cache
def drafter_of(name: str, family: str, attention: str | None) -> Drafter:
    """One drafter serves all calls."""
    model = model_of(family, attention)
    return {
        "plain": Plain,
        "auto": lambda: Auto(SmallModel(with_noise(model))),
        "lookup": lambda: PromptLookup(min_match=1),
        "itself": lambda: SmallModel(model),
        "relative": lambda: SmallModel(with_noise(model)),
        "stranger": lambda: SmallModel(tiny_model("llama", seed=1, vocab_size=VOCAB_SIZE, hidden_size=16)),
        "early-exit": EarlyExit,
        "exit-1": lambda: EarlyExit(1, num_tokens=3),
        "quantized-self": lambda: QuantizedSelf(num_tokens=4),
        "sparse-self": lambda: SparseSelf(budget=6, num_tokens=4),
    }[name]()


class Recording(BaseStreamer):
    """Keeps what a streamer is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append((value.dtype, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


class RecordsCalls(StoppingCriteria):
    """Stops nothing and keeps what it is asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@dataclass(kw_only=True)
class Result:
    """What one side did: an output or an error, and everything else that a caller can see."""

    output: Any = None
    error: Exception | None = None
    streamed: list[Any] | None = None
    asked: list[Any] | None = None
    cache: DynamicCache | None = None
    config_after: Any = None
    random_state: Tensor | None = None

    @property
    def sequences(self) -> Tensor:
        return self.output if isinstance(self.output, Tensor) else self.output.sequences


@dataclass(kw_only=True)
class Difference:
    """Something that the two sides did not do alike; `reason` is the name of what explains it."""

    what: str
    detail: str
    reason: str | None = None


# calling


def run_case(case: Case) -> tuple[Result, Result]:
    """The plain call and ours."""
    model = model_of(case.family, case.attention)
    plain = _run(case, model, lambda arguments: type(model).generate(model, **arguments))
    drafter = _drafter(case, plain)
    extra = {"drafter": drafter, "tree": case.tree, "verify": case.verify}

    def ours(arguments: dict[str, Any]) -> Any:
        if not case.enabled:
            return specdec.generate(model, **arguments, **extra)
        specdec.enable(model, **extra)
        try:
            return model.generate(**arguments)
        finally:
            specdec.disable(model)

    return plain, _run(case, model, ours)


def _run(case: Case, model: PreTrainedModel, decode: Callable[[dict[str, Any]], Any]) -> Result:
    result = Result()
    kept = model.generation_config
    arguments = _arguments(case, model, result)
    torch.manual_seed(case.seed)
    try:
        if case.options_in == "model":
            model.generation_config = config_of(case.options)
        result.output = decode(arguments)
    except Exception as error:
        result.error = error.with_traceback(None)
    finally:
        model.generation_config = kept
    result.random_state = torch.get_rng_state()
    result.config_after = config.to_dict() if (config := arguments.get("generation_config")) else None
    return result


def _drafter(case: Case, plain: Result) -> Drafter:
    if case.drafter != "oracle":
        return drafter_of(case.drafter, case.family, case.attention)
    if plain.error is not None:
        return Plain()
    script = PartlyWrongScript(plain.sequences, vocab_size=VOCAB_SIZE)
    return ScriptedDrafter(script)


def _arguments(case: Case, model: PreTrainedModel, result: Result) -> dict[str, Any]:
    arguments = copy.deepcopy(case.options)
    if case.options_in != "arguments":
        arguments = {name: value for name, value in arguments.items() if name not in CONFIG_FIELDS}
    if case.options_in == "config":
        arguments["generation_config"] = config_of(case.options)
    arguments |= _prompt_arguments(case.prompt, model)
    result.cache = arguments.get(CACHE)
    if "stop_strings" in case.options:
        arguments["tokenizer"] = TOKENIZER
    if case.processors:
        arguments["logits_processor"] = LogitsProcessorList(case.processors)
    if case.prefix_rule:
        arguments["prefix_allowed_tokens_fn"] = case.prefix_rule
    criteria = StoppingCriteriaList(case.criteria)
    if case.records_calls:
        criteria.append(recorder := RecordsCalls())
        result.asked = recorder.calls
    if criteria:
        arguments["stopping_criteria"] = criteria
    if case.streams:
        arguments["streamer"] = streamer = Recording()
        result.streamed = streamer.calls
    return arguments


def _prompt_arguments(prompt: Prompt, model: PreTrainedModel) -> dict[str, Any]:
    if prompt.form == "nothing":
        return {"bos_token_id": 1}
    ids, mask = padded(prompt)
    arguments: dict[str, Any] = {}
    if prompt.num_cached is not None:
        arguments[CACHE] = _cache(model, ids[:, : prompt.num_cached], mask[:, : prompt.num_cached])
    match prompt.mask:
        case "given" | "holes":
            arguments["attention_mask"] = mask
        case "bool":
            arguments["attention_mask"] = mask.bool()
        case "float":
            arguments["attention_mask"] = mask.float()
        case "ones":
            arguments["attention_mask"] = torch.ones_like(mask)
    if prompt.only_new and prompt.num_cached is not None:
        ids = ids[:, prompt.num_cached :]
    if prompt.int32:
        ids = ids.int()
    if "embeds" in prompt.form:
        arguments["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    if prompt.form != "inputs_embeds":
        arguments["input_ids" if prompt.form in ("input_ids", "ids and embeds") else "inputs"] = ids
    return arguments


def padded(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both int64 [B, P]; the padding is 0 and so are some tokens."""
    width = max(prompt.lengths)
    generator = torch.Generator().manual_seed(prompt.seed)
    ids = torch.randint(8, (len(prompt.lengths), width), generator=generator)
    place = torch.arange(width)
    lengths = torch.tensor(prompt.lengths).unsqueeze(1)
    mask = (place >= width - lengths if prompt.side == "left" else place < lengths).long()
    if prompt.mask == "holes" and width > 3:
        mask[:, width // 2] = 0
    return ids * mask, mask


@torch.no_grad()
def _cache(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    if ids.shape[1]:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        options = {} if model.config.model_type == "opt" else {"position_ids": positions}
        model(ids, attention_mask=mask, **{CACHE: cache}, use_cache=True, **options)
    return cache


# comparing


def differences(case: Case, plain: Result, ours: Result) -> list[Difference]:
    """Everything that is not alike, explained or not."""
    if plain.error is not None or ours.error is not None:
        found = list(_errors(plain, ours))
    elif not torch.equal(plain.sequences, ours.sequences):
        found = [Difference(what="sequences", detail=f"plain {plain.sequences}\nours  {ours.sequences}")]
    else:
        found = [*_outputs(plain, ours), *_side_effects(case, plain, ours)]
    for difference in found:
        difference.reason = next(
            (reason.name for reason in EXPLAINED if reason.applies(case, plain, ours, difference)), None
        )
    return found


def _errors(plain: Result, ours: Result) -> Iterator[Difference]:
    if type(plain.error) is not type(ours.error):
        yield Difference(what="errors", detail=f"plain {plain.error!r}\nours  {ours.error!r}")


def _outputs(plain: Result, ours: Result) -> Iterator[Difference]:
    if isinstance(plain.output, Tensor) != isinstance(ours.output, Tensor):
        yield Difference(what="type", detail=f"{type(plain.output)} and {type(ours.output)}")
    elif plain.sequences.dtype != ours.sequences.dtype:
        yield Difference(what="dtype", detail=f"{plain.sequences.dtype} and {ours.sequences.dtype}")
    elif not isinstance(plain.output, Tensor):
        if set(plain.output) - {CACHE} != set(ours.output) - {CACHE, "stats"}:
            yield Difference(what="fields", detail=f"{list(plain.output)} and {list(ours.output)}")
        for name in ("scores", "logits"):
            yield from _vectors(name, plain, ours)
        yield from _caches(plain.output[CACHE], ours.output[CACHE], len(plain.sequences))


def _vectors(name: str, plain: Result, ours: Result) -> Iterator[Difference]:
    expected, actual = getattr(plain.output, name), getattr(ours.output, name)
    if expected is None or actual is None:
        if expected is not actual:
            yield Difference(what=name, detail="one side has none")
        return
    if len(expected) != len(actual):
        yield Difference(what=name, detail=f"{len(expected)} and {len(actual)} of them")
        return
    for place, (plain_BV, ours_BV) in enumerate(zip(expected, actual, strict=True)):
        if plain_BV.shape != ours_BV.shape or plain_BV.dtype != ours_BV.dtype:
            yield Difference(what=name, detail=f"{plain_BV.shape} {plain_BV.dtype} and {ours_BV.shape} {ours_BV.dtype}")
        for row in range(len(plain_BV)):
            if not torch.allclose(plain_BV[row], ours_BV[row], rtol=1e-4, atol=1e-5):
                over = is_over(plain.sequences[row, place - len(expected) :])
                what = f"{name} of a finished row" if over else name
                yield Difference(what=what, detail=f"place {place}, row {row}:\n{plain_BV[row]}\n{ours_BV[row]}")


def is_over(tokens: Tensor) -> bool:
    """Whether a row's tokens from some place on can be nothing but padding."""
    return bool((tokens == tokens[-1]).all())


def _caches(expected: DynamicCache, actual: DynamicCache, num_rows: int) -> Iterator[Difference]:
    lengths = expected.get_seq_length(), actual.get_seq_length()
    if lengths[0] != lengths[1]:
        yield Difference(what="cache length", detail=f"{lengths}")
        return
    kinds = [[type(layer) for layer in cache.layers] for cache in (expected, actual)]
    if type(expected) is not type(actual) or kinds[0] != kinds[1]:
        yield Difference(what="kind of cache", detail=f"{kinds}")
    if num_rows > 1 or not lengths[0]:  # rows of a batch hold other padding
        return
    for plain, ours in zip(expected.layers, actual.layers, strict=True):
        for part in ("keys", "values"):
            if getattr(plain, part).shape != getattr(ours, part).shape:
                yield Difference(what="cache", detail=f"{getattr(plain, part).shape} {getattr(ours, part).shape}")
            elif not torch.allclose(getattr(plain, part), getattr(ours, part), rtol=1e-4, atol=1e-5):
                yield Difference(what="cache", detail=part)


def _side_effects(case: Case, plain: Result, ours: Result) -> Iterator[Difference]:
    if plain.streamed != ours.streamed:
        yield Difference(what="streamer", detail=f"plain {plain.streamed}\nours  {ours.streamed}")
    if plain.asked != ours.asked and len(plain.sequences) == 1:
        yield Difference(what="criterion's calls", detail=f"plain {plain.asked}\nours  {ours.asked}")
    if plain.config_after != ours.config_after:
        yield Difference(what="generation_config", detail=f"plain {plain.config_after}\nours  {ours.config_after}")
    if plain.cache is not None and ours.cache is not None:
        yield from _caches(plain.cache, ours.cache, len(plain.sequences))
    if not torch.equal(plain.random_state, ours.random_state):
        yield Difference(what="random numbers", detail="not as many were drawn")


# what is meant to differ


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A difference that is meant."""

    name: str
    applies: Callable[[Case, Result, Result, Difference], bool] = field(repr=False)


def _refuses(*fragments: str) -> Callable[[Case, Result, Result, Difference], bool]:
    """Plain decoding went on, and we say why we do not."""

    def applies(case: Case, plain: Result, ours: Result, difference: Difference) -> bool:
        return plain.error is None and any(fragment in str(ours.error) for fragment in fragments)

    return applies


def _both_refuse(case: Case, plain: Result, ours: Result, difference: Difference) -> bool:
    """Ours is one of those that a user can act on."""
    return plain.error is not None and isinstance(ours.error, (specdec.SpecdecError, ValueError))


def _left_to_luck(case: Case, plain: Result, ours: Result, difference: Difference) -> bool:
    """Several tokens tied for the one place of `top_k=1`: plain decoding itself says something else next time."""
    if not case.options["do_sample"] or case.drafter == "plain" or difference.what != "sequences":
        return False
    model = model_of(case.family, case.attention)
    others = (
        _run(replace(case, seed=seed), model, lambda arguments: type(model).generate(model, **arguments))
        for seed in range(100, 104)
    )
    return any(not torch.equal(other.sequences, plain.sequences) for other in others)


def _drawn_after_a_stop(case: Case, plain: Result, ours: Result, difference: Difference) -> bool:
    """Sampled rows agree up to the place where one of them has stopped."""
    if not case.options["do_sample"] or difference.what in ("errors", "type", "dtype") or len(plain.sequences) == 1:
        return False
    expected, actual = (side.sequences for side in (plain, ours))
    width = min(expected.shape[1], actual.shape[1])
    unlike = (expected[:, :width] != actual[:, :width]).any(0).nonzero()
    first = int(unlike[0]) if len(unlike) else width
    rests = [torch.cat([one[first:], other[first:]]) for one, other in zip(expected, actual, strict=True)]
    return first > 0 and any(len(rest) == 0 or is_over(rest) for rest in rests)


def _padding(case: Case) -> int:
    """What finished rows are filled with: the first end-of-sequence token, unless the call says otherwise."""
    eos, pad = case.options.get("eos_token_id"), case.options.get("pad_token_id")
    first = eos[0] if isinstance(eos, list) else eos
    return next((token for token in (pad, first) if token is not None), 0)


EXPLAINED = (
    Reason(name="refused on both sides, in other words", applies=_both_refuse),
    Reason(
        name="an option that speculation does not honour",
        applies=_refuses(*(f"{name}=" for name in REFUSED), "beam_search is not", "beam_sample is not"),
    ),
    Reason(name="rows that stop apart without an end-of-sequence token", applies=_refuses("pass eos_token_id= (and")),
    Reason(name="inputs that drafted tokens would need too", applies=_refuses("how to continue these model inputs")),
    Reason(name="prompts padded to the right", applies=_refuses("prompts are padded to the left")),
    Reason(name="a draft model and embeddings", applies=_refuses("cannot read inputs_embeds")),
    Reason(name="embeddings in chunks", applies=_refuses("cuts input_ids, not inputs_embeds")),
    Reason(
        name="scores and logits of rows that have finished",
        applies=lambda case, plain, ours, difference: "of a finished row" in difference.what,
    ),
    Reason(
        name="random numbers that drafts use",
        applies=lambda case, plain, ours, difference: (
            difference.what == "random numbers" and case.options["do_sample"] and case.drafter != "plain"
        ),
    ),
    Reason(name="sampled rows after one of them has stopped", applies=_drawn_after_a_stop),
    Reason(name="sampled tokens that tie for the last place", applies=_left_to_luck),
    Reason(
        name="processors that raise at a prefix that is drafted and dropped",
        applies=lambda case, plain, ours, difference: (
            plain.error is None and case.options.get("forced_eos_token_id", 0) >= VOCAB_SIZE
        ),
    ),
    Reason(
        name="padding that is no token",
        applies=lambda case, plain, ours, difference: (
            isinstance(plain.error, IndexError) and ours.error is None and not 0 <= _padding(case) < VOCAB_SIZE
        ),
    ),
    Reason(
        name="logits that a processor has written to",
        applies=lambda case, plain, ours, difference: (
            difference.what == "logits" and any(isinstance(processor, HalveInPlace) for processor in case.processors)
        ),
    ),
)
