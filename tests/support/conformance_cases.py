"""Random calls of `generate()`: valid ones for the most part; some contradict themselves, some are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, WatermarkingConfig
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

import trees
from trees import GrowthPolicy

VOCAB_SIZE = 20
FAMILIES = ("llama", "gpt2", "mistral", "gemma3_text", "gemma2", "opt", "qwen3", "stablelm")
MAX_POSITIONS = 48


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Rows of tokens and how they are passed.

    Args:
        lengths: tokens of each row; rows are padded to the left, unless `side` says otherwise.
        form: the argument that carries them.
        mask: what is passed as attention_mask.
        num_cached: tokens (padding included) whose states are passed as the cache; None passes none.
        only_new: pass only the tokens that are not cached.
    """

    lengths: tuple[int, ...]
    seed: int
    form: str = "positional"
    mask: str = "given"
    side: str = "left"
    num_cached: int | None = None
    only_new: bool = False
    int32: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, in parts from which both sides build their own arguments."""

    family: str
    attention: str | None
    prompt: Prompt
    drafter: str
    tree: GrowthPolicy | None
    verify: str
    options: dict[str, Any] = field(default_factory=dict)
    processors: tuple[LogitsProcessor, ...] = ()
    prefix_rule: Callable[[int, Tensor], list[int]] | None = None
    criteria: tuple[StoppingCriteria, ...] = ()
    records_calls: bool = False
    streams: bool = False
    options_in: str = "arguments"
    enabled: bool = False
    seed: int = 0


CONFIG_FIELDS = frozenset(GenerationConfig().to_dict()) | {"eos_token_id", "pad_token_id"}


def config_of(options: dict[str, Any]) -> GenerationConfig:
    """Those of the options that a config can hold."""
    return GenerationConfig(**{name: value for name, value in options.items() if name in CONFIG_FIELDS})


def _makes_a_config(options: dict[str, Any]) -> bool:
    try:
        config_of(options)
    except (ValueError, TypeError):
        return False
    return True


# processors, criteria and prefix functions that users write: functions of their arguments


@dataclass(frozen=True)
class Favour(LogitsProcessor):
    """Raises one token where the prefix has an odd length."""

    token: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bonus = torch.zeros_like(scores)
        bonus[:, self.token] = 2.0 * (input_ids.shape[1] % 2)
        return scores + bonus


@dataclass(frozen=True)
class FavourByRow(LogitsProcessor):
    """Treats every row of the batch in its own way."""

    step: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = (torch.arange(len(scores)) * self.step + input_ids[:, -1]) % VOCAB_SIZE
        return scores.scatter_add(1, tokens.unsqueeze(1), torch.full((len(scores), 1), 1.5, dtype=scores.dtype))


@dataclass(frozen=True)
class HalveInPlace(LogitsProcessor):
    """Writes to the scores that it is given."""

    token: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] *= 0.5
        return scores


@dataclass(frozen=True)
class AllowSome:
    """A prefix function: what may follow depends on the row and the last token."""

    modulus: int

    def __call__(self, row: int, input_ids: Tensor) -> list[int]:
        return [token for token in range(VOCAB_SIZE) if (token + row + int(input_ids[-1])) % self.modulus]


@dataclass(frozen=True)
class StopAfter(StoppingCriteria):
    """Stops every row at one length."""

    length: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@dataclass(frozen=True)
class StopAtPair(StoppingCriteria):
    """Stops a row whose last two tokens sum up to a multiple."""

    modulus: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -2:].sum(1) % self.modulus == 0


@dataclass(frozen=True)
class StopAtScore(StoppingCriteria):
    """Stops a row of which the last best score was high; without scores never."""

    bound: float

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not scores:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return scores[-1].amax(1) > self.bound


@dataclass(frozen=True)
class StopAsPythonSays(StoppingCriteria):
    """Answers with a bool for all rows."""

    length: int

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= self.length


TOKENS = st.integers(0, VOCAB_SIZE - 1)
TOKEN_LISTS = st.lists(TOKENS, min_size=1, max_size=3, unique=True)
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3)

PROCESSING: dict[str, st.SearchStrategy[Any]] = {
    "bad_words_ids": SEQUENCES,
    "begin_suppress_tokens": TOKEN_LISTS,
    "encoder_repetition_penalty": st.sampled_from([0.8, 1.3]),
    "exponential_decay_length_penalty": st.tuples(st.integers(1, 6), st.sampled_from([1.05, 1.4])),
    "forced_bos_token_id": TOKENS,
    "forced_eos_token_id": TOKENS,
    "no_repeat_ngram_size": st.integers(1, 3),
    "remove_invalid_values": st.booleans(),
    "renormalize_logits": st.booleans(),
    "repetition_penalty": st.sampled_from([0.7, 1.1, 1.5]),
    "sequence_bias": SEQUENCES.map(lambda sequences: [[ids, 1.5 * (-1) ** i] for i, ids in enumerate(sequences)]),
    "suppress_tokens": TOKEN_LISTS,
    "watermarking_config": st.sampled_from([WatermarkingConfig(), WatermarkingConfig(seeding_scheme="selfhash")]),
}
WARPING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.5, 0.9, 2.0]),
    "top_k": st.sampled_from([1, 3, 50]),
    "top_p": st.sampled_from([0.3, 0.8, 1.0]),
    "top_h": st.sampled_from([0.4, 0.9]),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.4, 0.9]),
    "epsilon_cutoff": st.sampled_from([0.01, 0.1]),
    "eta_cutoff": st.sampled_from([0.01, 0.1]),
}
STOPPING: dict[str, st.SearchStrategy[Any]] = {
    "min_length": st.integers(1, 20),
    "min_new_tokens": st.integers(1, 8),
    "max_time": st.just(1000.0),
    "stop_strings": st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(bytes).map(bytes.decode), min_size=1),
}
OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "use_cache": st.just(True),
    "cache_implementation": st.just("dynamic"),
    "prefill_chunk_size": st.integers(1, 5),
    "synced_gpus": st.sampled_from([None, False]),
    "disable_compile": st.booleans(),
    "early_stopping": st.just(False),
    "num_beams": st.just(1),
}
CONTRADICTING: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.sampled_from([0, -1]),
    "max_length": st.integers(0, 3),
    "temperature": st.sampled_from([0.0, -1.0]),
    "top_p": st.sampled_from([-0.1, 1.5]),
    "top_k": st.sampled_from([0, -3]),
    "min_p": st.just(1.5),
    "typical_p": st.just(2.0),
    "repetition_penalty": st.just(-1.0),
    "no_repeat_ngram_size": st.just(-2),
    "num_return_sequences": st.sampled_from([0, 2]),
    "bad_words_ids": st.sampled_from([[], [[]], 5]),
    "sequence_bias": st.just([]),
    "eos_token_id": st.sampled_from([VOCAB_SIZE + 9, -1, [-7]]),
    "pad_token_id": st.just(-1),
    "max_new_token": st.just(5),
    "token_type_ids": st.just(torch.zeros(1, 3, dtype=torch.long)),
    "stop_strings": st.sampled_from(["", []]),
    "cache_implementation": st.just("nonsense"),
    "watermarking_config": st.just({"greenlist_ratio": 3.0}),
    "forced_eos_token_id": st.just(VOCAB_SIZE + 9),
    "min_length": st.just(1000),
}
REFUSED: dict[str, st.SearchStrategy[Any]] = {
    "num_beams": st.just(2),
    "use_cache": st.just(False),
    "output_attentions": st.just(True),
    "output_hidden_states": st.just(True),
    "cache_implementation": st.sampled_from(["static", "offloaded"]),
    "guidance_scale": st.just(1.5),
    "token_healing": st.just(True),
    "prompt_lookup_num_tokens": st.just(3),
}

PROCESSORS = st.one_of(
    st.builds(Favour, TOKENS),
    st.builds(FavourByRow, st.integers(1, 5)),
    st.builds(HalveInPlace, TOKENS),
    st.builds(lp.TemperatureLogitsWarper, st.just(0.7)),
    st.builds(lp.RepetitionPenaltyLogitsProcessor, st.just(1.4)),
    st.builds(lp.RepetitionPenaltyLogitsProcessor, st.just(1.4), prompt_ignore_length=st.integers(1, 4)),
    st.builds(lp.NoRepeatNGramLogitsProcessor, st.just(2)),
    st.builds(lp.TopKLogitsWarper, st.just(2)),
)
CRITERIA = st.one_of(
    st.builds(StopAfter, st.integers(3, 24)),
    st.builds(StopAtPair, st.integers(5, 9)),
    st.builds(StopAtScore, st.sampled_from([1.5, 3.0])),
    st.builds(StopAsPythonSays, st.integers(3, 24)),
    st.builds(sc.MaxLengthCriteria, st.integers(8, 24)),
    st.builds(sc.EosTokenCriteria, TOKEN_LISTS),
    st.builds(sc.MaxTimeCriteria, st.just(1000.0)),
)
TREES = st.one_of(
    st.builds(trees.Chain, st.integers(1, 7)),
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple).map(trees.Fixed),
    st.builds(trees.DySpec, st.integers(1, 9)),
    st.builds(trees.DySpecThreshold, st.sampled_from([0.05, 0.2]), st.integers(2, 9)),
    st.builds(trees.Sequoia, st.integers(2, 9), st.just((0.6, 0.2, 0.1))),
)
DRAFTERS_FOR = {
    "chains": ("plain", "auto", "lookup", "oracle", "early-exit", "exit-1", "quantized-self", "sparse-self"),
    "trees": ("itself", "relative", "stranger"),
}


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    lengths = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    form = draw(
        st.sampled_from(["positional"] * 3 + ["inputs", "input_ids", "inputs_embeds", "ids and embeds", "nothing"])
    )
    prompt = {"lengths": lengths, "seed": draw(st.integers(0, 99)), "form": form}
    prompt["mask"] = draw(st.sampled_from(["given"] * 4 + ["absent", "ones", "bool", "float", "holes"]))
    if form in ("positional", "input_ids") and max(lengths) > 1 and draw(st.integers(0, 3)) == 0:
        prompt["num_cached"] = draw(st.integers(0, max(lengths) - 1))
        prompt["only_new"] = draw(st.booleans())
    if form == "positional":
        prompt["int32"] = draw(st.sampled_from([False] * 9 + [True]))
        prompt["side"] = draw(st.sampled_from(["left"] * 19 + ["right"]))
    return Prompt(**prompt)


@st.composite
def some(draw: st.DrawFn, options: dict[str, st.SearchStrategy[Any]], at_most: int) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=at_most, unique=True))
    return {name: draw(options[name]) for name in names}


@st.composite
def lengths_and_ends(draw: st.DrawFn) -> dict[str, Any]:
    """How long a run may get and which tokens end it."""
    options: dict[str, Any] = {}
    match draw(st.sampled_from(["new", "new", "new", "total", "both", "neither"])):
        case "new":
            options["max_new_tokens"] = draw(st.integers(1, 16))
        case "total":
            options["max_length"] = draw(st.integers(2, 28))
        case "both":
            options["max_new_tokens"] = draw(st.integers(1, 16))
            options["max_length"] = draw(st.integers(2, 28))
    if draw(st.integers(0, 2)):
        options["eos_token_id"] = draw(st.one_of(TOKENS, TOKEN_LISTS, TOKEN_LISTS, st.none()))
    if draw(st.integers(0, 2)):
        options["pad_token_id"] = draw(st.one_of(st.just(0), TOKENS))
    return options


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One random call. Sampled ones are drawn from the same stream (`Plain`) or leave no choice (`top_k=1`)."""
    options = {
        **draw(some(STOPPING, 1)),
        **draw(some(OTHERS, 1)),
        **draw(lengths_and_ends()),
        **draw(some(PROCESSING, 2)),
        "do_sample": draw(st.booleans()),
    }
    drafter = draw(st.sampled_from([*DRAFTERS_FOR["chains"], *DRAFTERS_FOR["trees"] * 2]))
    if options["do_sample"]:
        options |= draw(some(WARPING, 2))
        if drafter != "plain":
            options["top_k"] = 1
        elif draw(st.integers(0, 2)) == 0:
            options["num_return_sequences"] = 2
    if draw(st.booleans()):
        options |= {"return_dict_in_generate": True}
        options |= {name: True for name in ("output_scores", "output_logits") if draw(st.booleans())}
    kind = draw(st.sampled_from([CONTRADICTING, CONTRADICTING, REFUSED, *[{}] * 17]))
    if kind:
        options |= draw(some(kind, 1))
    prompt = draw(prompts())
    processors = tuple(draw(st.lists(PROCESSORS, max_size=2))) if draw(st.booleans()) else ()
    criteria = tuple(draw(st.lists(CRITERIA, max_size=2))) if draw(st.booleans()) else ()
    if len(prompt.lengths) > 1 and draw(st.integers(0, 9)):  # otherwise most batches with criteria are refused
        options.setdefault("eos_token_id", 3)
    takes_trees = drafter in DRAFTERS_FOR["trees"]
    return Case(
        family=draw(st.sampled_from(FAMILIES)),
        attention=draw(st.sampled_from([None, None, "eager"])),
        prompt=prompt,
        drafter=drafter,
        tree=draw(st.one_of(st.none(), TREES)) if takes_trees else None,
        verify=draw(st.sampled_from(["topdown", "traversal"])),
        options=options,
        processors=processors,
        prefix_rule=draw(st.builds(AllowSome, st.integers(2, 4))) if draw(st.integers(0, 5)) == 0 else None,
        criteria=criteria,
        records_calls=draw(st.booleans()),
        streams=draw(st.booleans()),
        options_in=draw(st.sampled_from(["arguments", "config", "model"])) if _makes_a_config(options) else "arguments",
        enabled=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
