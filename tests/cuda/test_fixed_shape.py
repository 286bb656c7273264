"""`exact="bits"`: plain and speculative decoding give the same logits, to the last bit, also in batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

import specdec
from specdec import UnsupportedModelError, UnsupportedOptionError
from specdec.acceptance import Accepted
from specdec.control.costs import costs_of_one_shape
from specdec.cuda import fixed_shape
from specdec.cuda.arena import Arena
from specdec.cuda.graphs import standing_in
from specdec.drafters import Auto, Drafter, EarlyExit, Mixed, Plain, PromptLookup, SmallModel, SparseSelf
from specdec.kernels import native
from specdec.kernels.model.profile import profile_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.goodness import assert_drawn_from
from tests.support.references import plain_alone, with_noise
from tests.support.sampled_rows import continuations, exact_distribution, tiny
from trees import Chain, DySpec, DySpecThreshold, Fixed, GrowthPolicy, Sequoia

NUM_NEW = 32
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])
PROMPTS = {"ragged": RAGGED, "one": ONE}
DRAFTERS: dict[str, tuple[Callable[[PreTrainedModel], Drafter], dict[str, Any]]] = {
    "prompt lookup": (lambda _: PromptLookup(min_match=1), {}),
    "chain": (SmallModel, {"tree": Chain(7)}),
    "wider than a forward": (SmallModel, {"tree": Chain(20)}),
    "tree": (SmallModel, {"tree": DySpec(12)}),
    "mixed": (lambda draft: Mixed([PromptLookup(min_match=1), SmallModel(draft)]), {}),
    "sparse self": (lambda _: SparseSelf(4), {}),
    "auto": (SmallModel, {}),
}


def build(family: str = "llama", **settings: Any) -> PreTrainedModel:
    return tiny_model(family, hidden_size=64, **settings) if family == "llama" else tiny_model(family, **settings)


def logits_of(
    model: PreTrainedModel, drafter: Drafter | PreTrainedModel, prompts: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, specdec.DecodingStats]:
    """Greedy: tokens, raw logits and processed scores [2, B, T, V], statistics."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "exact": "bits", **options}
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = specdec.generate(model, **prompts, drafter=drafter, **settings, **wanted)
    return out.sequences, torch.stack([torch.stack(each, 1) for each in (out.logits, out.scores)]), out.stats


def check(
    model: PreTrainedModel, drafter: Drafter | PreTrainedModel, prompts: dict[str, Tensor], **options: Any
) -> specdec.DecodingStats:
    """Against plain decoding of the same call."""
    expected = logits_of(model, Plain(), prompts, **{name: options[name] for name in options if name != "tree"})
    return check_against(expected, logits_of(model, drafter, prompts, **options))


def check_against(
    expected: tuple[Tensor, Tensor, specdec.DecodingStats], found: tuple[Tensor, Tensor, specdec.DecodingStats]
) -> specdec.DecodingStats:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    return found[2]


@cache
def plainly(which: str) -> tuple[tuple[Tensor, Tensor, specdec.DecodingStats], Tensor]:
    """By one shape, and as transformers does."""
    return logits_of(build(), Plain(), PROMPTS[which]), plain_alone(build(), PROMPTS[which], NUM_NEW)


@pytest.mark.rotated
@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_bits_are_those_of_plain_decoding(name: str, which: str) -> None:
    model, (make, options), prompts = build(), DRAFTERS[name], PROMPTS[which]
    draft = with_noise(build())
    expected, reference = plainly(which)
    found = logits_of(model, draft if name == "auto" else make(draft), prompts, **options)
    stats = check_against(expected, found)
    if name != "auto":
        assert stats.num_accepted
    assert_same_tokens(model, reference, found[0], prompts["attention_mask"])


class Echo(LogitsProcessor):
    """Favours what followed the last token where that stood before."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        follows = (input_ids[:, :-1] == input_ids[:, -1:]).to(scores.dtype)
        return scores.scatter_add(1, input_ids[:, 1:], follows)


class Sum(StoppingCriteria):
    """Stops a row where its last three tokens add up to a multiple of nine."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return (input_ids.shape[1] > 20) & (input_ids[:, -3:].sum(1) % 9 == 0)


LOOKING_BACK: dict[str, Callable[[], dict[str, Any]]] = {
    "repetition penalty": lambda: {"repetition_penalty": 1.3},
    "no repeated n-grams": lambda: {"no_repeat_ngram_size": 2},
    "a callable": lambda: {"logits_processor": [Echo()]},
    "stopping criteria": lambda: {"stopping_criteria": [Sum()], "eos_token_id": 255, "pad_token_id": 0},
    "all of them": lambda: {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "logits_processor": [Echo()],
        "stopping_criteria": [Sum()],
        "eos_token_id": 255,
        "pad_token_id": 0,
    },
}


@pytest.mark.rotated
@pytest.mark.parametrize("name", ["chain", "tree", "prompt lookup", "auto"])
@pytest.mark.parametrize("looking", LOOKING_BACK)
def test_processors_and_criteria_that_look_at_the_text(name: str, looking: str) -> None:
    model, (make, options), own = build(), DRAFTERS[name], LOOKING_BACK[looking]()
    draft = with_noise(build())
    check(model, draft if name == "auto" else make(draft), RAGGED, **options, **own)
    tokens, _, _ = logits_of(model, Plain(), RAGGED, **own)
    unlike = plainly("ragged")[0][0]
    assert tokens.shape != unlike.shape or not torch.equal(tokens, unlike), "they change nothing here"


def test_bits_differ_otherwise() -> None:
    """Or these tests would show nothing."""
    model, draft = build(), with_noise(build())
    plain = logits_of(model, Plain(), RAGGED, exact=None)
    drafted = logits_of(model, SmallModel(draft), RAGGED, exact=None, tree=Chain(7))
    assert torch.equal(plain[0], drafted[0])
    assert not torch.equal(plain[1], drafted[1])


def test_rows_that_stop_in_other_rounds() -> None:
    """Then fewer rows are forwarded, and others in their places."""
    model, draft = build(), with_noise(build())
    tokens = logits_of(model, Plain(), RAGGED)[0]
    start = RAGGED["input_ids"].shape[1]
    ends = [int(tokens[0, start + 4]), int(tokens[2, start + 9])]
    options = {"eos_token_id": ends, "pad_token_id": 0}
    lengths = (tokens[:, start:] == 0).sum(1)
    assert not lengths.any(), "no row has padding yet"
    check(model, SmallModel(draft), RAGGED, tree=Chain(5), **options)
    check(model, PromptLookup(min_match=1), RAGGED, **options)
    lengths = (logits_of(model, Plain(), RAGGED, **options)[0][:, start:] == 0).sum(1)
    assert len(set(lengths.tolist())) > 1


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "opt"))],
)
def test_families(family: str) -> None:
    """Also with windows, which the longer prompts are past."""
    check(build(family), SmallModel(with_noise(build(family))), RAGGED, tree=Chain(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(build(dtype=dtype), SmallModel(with_noise(build(dtype=dtype))), RAGGED, tree=Chain(5))


def test_past_a_split_of_the_attention() -> None:
    model, prompts = build(max_position_embeddings=512), random_prompts([240])
    check(model, SmallModel(with_noise(build(max_position_embeddings=512))), prompts, tree=Chain(6))


def test_graphs() -> None:
    """As replayed: buffers and graphs outlive a call, and another run at the same time has its own."""
    with standing_in():
        model, draft = build(), with_noise(build())
        for prompts in (RAGGED, ONE, RAGGED):
            check(model, SmallModel(draft), prompts, tree=Chain(5), max_new_tokens=10)
        assert profile_of(model).part(Arena).num_replays > 3
        first, second = (fixed_shape.bit_exact_model(model, 1) for _ in range(2))
        kept = [each.prefill(ONE["input_ids"]) for each in (first, second)]
        assert torch.equal(*kept)
        token_11, zero_11 = torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        assert torch.equal(first.forward(token_11, zero_11, None), second.forward(token_11, zero_11, None))


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_native_layers(weights: str) -> None:
    """Whose rows do not depend on their company: the ordinary forwards do."""
    model = build(intermediate_size=128, head_dim=32)
    draft = with_noise(model)
    specdec.prepare(model, weights=weights)
    assert not isinstance(fixed_shape.bit_exact_model(model, 4), fixed_shape.FixedShapeModel)
    assert check(model, SmallModel(draft), RAGGED, tree=DySpec(12)).num_accepted


def test_samples_have_the_targets_distribution() -> None:
    """Of a path that leaves the chain only the first token is kept."""
    model, draft = tiny(0), tiny(1)
    prompt = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    settings = {"tree": Fixed((2, 2)), "max_new_tokens": 3, "do_sample": True, "exact": "bits"}
    outs = [specdec.generate(model, prompt.expand(150, -1), drafter=SmallModel(draft), **settings) for _ in range(8)]
    assert_drawn_from(continuations(torch.cat(outs), 3), exact_distribution(model, prompt))


def test_paths_are_cut_where_they_leave_the_chain() -> None:
    accepted = Accepted([[0, 1, 5], [0, 1], [2, 3], []], [[7, 8, 9, 1], [7, 8, 9], [4, 5, 6], [3]])
    assert accepted.in_chains() == ([[0, 1], [0, 1], [], []], [[7, 8, 9], [7, 8, 9], [4], [3]])


def test_what_is_refused() -> None:
    model = build()

    def refusal(model: PreTrainedModel, kind: type[Exception] = UnsupportedModelError, **options: Any) -> str:
        with pytest.raises(kind) as raised:
            specdec.generate(
                model, **{**ONE, "drafter": PromptLookup(), "max_new_tokens": 8, "exact": "bits", **options}
            )
        return str(raised.value)

    assert "experts are given other numbers" in refusal(tiny_model("mixtral"))
    assert "its attention is not PyTorch's" in refusal(build(attn_implementation="eager"))
    assert "chunks, a state" in refusal(tiny_model("lfm2", layer_types=["conv", "full_attention"]))
    assert "runs layers of the target" in refusal(model, UnsupportedOptionError, drafter=EarlyExit(1))
    assert "exact='tokens': it is None or 'bits'" in refusal(model, ValueError, exact="tokens")
    holes = ONE["attention_mask"].clone()
    holes[0, 3:5] = 0
    assert "padded on the left at most" in refusal(model, UnsupportedOptionError, attention_mask=holes)


@pytest.mark.parametrize(
    "tree", [DySpec(80), DySpecThreshold(0.01, 64), Fixed((4, 4, 4)), Sequoia(64, (0.7, 0.2))], ids=str
)
def test_trees_that_are_too_large_are_refused_before_any_work(tree: GrowthPolicy) -> None:
    model, asked = build(), []
    model.model.register_forward_pre_hook(lambda *_: asked.append(1))
    with pytest.raises(UnsupportedOptionError, match="verifies up to 63 drafted tokens of a row, and "):
        logits_of(model, SmallModel(with_noise(build())), ONE, tree=tree)
    assert not asked


@pytest.mark.parametrize("tree", [DySpec(63), DySpecThreshold(0.01, 63), Fixed((3, 4, 4)), Sequoia(63, (0.7, 0.2))])
def test_trees_that_are_just_small_enough(tree: GrowthPolicy) -> None:
    assert tree.most_nodes == 63
    assert fixed_shape.bit_exact_model(build(), 1, tree).keeps_bits


def test_trees_that_share_their_nodes_are_refused_when_they_are_too_large() -> None:
    """How many a row gets shows in a round."""
    tree, draft = DySpec(50, shared=True), with_noise(build())
    assert tree.most_nodes is None
    model = fixed_shape.bit_exact_model(build(), 1, tree)
    model.prefill(ONE["input_ids"])
    tokens_BT = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(UnsupportedOptionError, match="this tree has 64"):
        model.forward(tokens_BT, tokens_BT, None)
    assert logits_of(build(), SmallModel(draft), ONE, tree=tree, max_new_tokens=4)[2].num_drafted


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_forward_costs_what_its_shape_does(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.control.costs.measure_forwards", lambda *_: {1: 1.0, 16: 5.0, 64: 20.0})
    model = fixed_shape.bit_exact_model(build(), num_rows)
    costs = costs_of_one_shape(model, num_rows)
    whole = costs.measured(num_rows)
    assert whole == {1: 5.0, 3: 15.0}[num_rows]
    assert costs.measured(num_rows * 16) == whole
    assert costs.measured(num_rows * 16 + 1) == costs.measured(num_rows * 32) == 2 * whole
    assert costs.measured(num_rows * 64) == 4 * whole
    assert costs_of_one_shape(model, num_rows) is costs


@pytest.mark.parametrize(("exact", "milliseconds"), [("bits", 5000.0), (None, 1000.0)])
def test_auto_prices_forwards_of_one_shape(
    exact: str | None, milliseconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drafted too little: a wider forward costs no more than the plain one."""
    monkeypatch.setattr("specdec.control.costs.measure_forwards", lambda *_: {1: 1.0, 16: 5.0, 64: 20.0})
    first = logits_of(build(), Auto(), ONE, exact=exact, max_new_tokens=4)[2].trace[0]
    assert first["plain_ms"] == milliseconds


def test_a_device_whose_products_depend_on_the_place_is_found_out() -> None:
    model = build()
    multiply = model.lm_head.forward

    def by_place(states_BTC: Tensor) -> Tensor:
        return multiply(states_BTC) * (1 + 1e-6 * torch.arange(states_BTC.shape[1])[:, None])

    model.lm_head.forward = by_place
    with pytest.raises(UnsupportedModelError, match="depend on its place in a forward; leave it out"):
        logits_of(model, Plain(), ONE)


def test_enabled_models_never_drop_it() -> None:
    model = specdec.enable(build(), drafter=PromptLookup(min_match=1))
    settings = {"max_new_tokens": 8, "do_sample": False, "exact": "bits"}
    assert torch.equal(model.generate(**ONE, **settings), specdec.generate(build(), **ONE, **settings))
    with pytest.raises(UnsupportedOptionError):
        model.generate(**ONE, **settings, num_beams=2)
