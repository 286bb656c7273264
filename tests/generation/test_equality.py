"""Greedy output equals plain decoding's: trees, windows, dtypes, attention kinds, offloaded models."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import PreTrainedModel

from specdec.drafters import Drafter, EarlyExit, Plain, PromptLookup, SmallModel
from specdec.testing import ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.layer_kinds import layer_kinds
from tests.support.references import PartlyWrongScript, plain_alone, speculate, with_noise
from trees import Chain, DySpec, DySpecThreshold, Fixed, Sequoia, TokenTree

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])
ONE_PROMPT = random_prompts([12])


def check_trees(model: PreTrainedModel, prompts: dict = PROMPTS) -> None:
    """Trees with the true tokens among wrong ones: all true ones are accepted, no other."""
    reference = plain_alone(model, prompts, NUM_NEW)
    script = PartlyWrongScript(reference)
    out = speculate(model, prompts, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
    assert out.stats.num_accepted == script.num_true > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "opt", "phi3"])
def test_trees_in_ragged_batches(family: str) -> None:
    check_trees(tiny_model(family))


def test_trees_of_one_row() -> None:
    check_trees(tiny_model("qwen3"), ONE_PROMPT)


def test_drafts_that_are_never_right() -> None:
    model = tiny_model("llama")
    reference = plain_alone(model, PROMPTS, NUM_NEW)

    def wrong(sequences: object) -> list[TokenTree]:
        truth = [int(reference[row, length]) for row, length in zip(sequences.rows, sequences.lengths, strict=True)]
        return [TokenTree.chain([token + 1 if token < 258 else 0, token]) for token in truth]

    out = speculate(model, PROMPTS, ScriptedDrafter(wrong), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.accepted_histogram == {0: 4 * (NUM_NEW - 1)}
    assert out.stats.num_drafted == 4 * (2 * (NUM_NEW - 3) + 1)


def test_script_by_rounds_and_rows() -> None:
    """Row 0 gets a right chain, row 1 nothing; in the second round row 1 gets a right tree; then the script ends."""
    model = tiny_model("llama")
    prompts = random_prompts([4, 6])
    reference = plain_alone(model, prompts, NUM_NEW)
    first, second = reference[:, 6:].tolist()
    script = [[first[1:4], []], [[], TokenTree(tokens=[second[2], second[2] ^ 1], parents=[-1, -1])]]
    out = speculate(model, prompts, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
    assert out.stats.accepted_histogram == {3: 1, 1: 1, 0: (NUM_NEW - 1 - 4 - 1) + (NUM_NEW - 1 - 1 - 2) + 1 + 1}
    assert out.stats.num_drafted == 5


POLICIES = [
    Chain(4),
    Fixed((3, 2, 1)),
    Sequoia(12, (0.5, 0.2, 0.1)),
    DySpec(12),
    DySpec(12, max_depth=3, shared=True),
    DySpecThreshold(threshold=0.05, max_nodes=12),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "mistral"])
def test_every_growth_policy_in_ragged_batches(family: str) -> None:
    """Drafted by a relative: some nodes are right, on paths of every rank."""
    model = tiny_model(family)
    reference, draft = plain_alone(model, PROMPTS, NUM_NEW), SmallModel(with_noise(model))
    for policy in POLICIES:
        out = speculate(model, PROMPTS, draft, tree=policy, max_new_tokens=NUM_NEW)
        assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
        assert 0 < out.stats.num_accepted < out.stats.num_drafted, policy
        assert (out.stats.num_levels == out.stats.num_drafted) == isinstance(policy, Chain)


WINDOWED = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "starcoder2": {"sliding_window": 6, "attn_implementation": "eager"},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_drafts_longer_than_the_window(family: str) -> None:
    """Prompts on both sides of the window, and drafts past it that are right, half right, or trees."""
    model = tiny_model(family, **WINDOWED[family])
    assert 6 in {kind.reach for kind in layer_kinds(model.config)}
    prompts = random_prompts([3, 12, 6, 18])
    reference = plain_alone(model, prompts, NUM_NEW)
    for draft, histogram in ((model, {10: 8, 0: 4}), (with_noise(model), None)):
        out = speculate(model, prompts, SmallModel(draft, num_tokens=10), max_new_tokens=NUM_NEW)
        assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
        assert histogram is None or out.stats.accepted_histogram == histogram
    script = PartlyWrongScript(reference, longest=12)
    out = speculate(model, prompts, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])
    assert out.stats.num_accepted == script.num_true


@pytest.mark.rotated
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_half_precision(family: str, dtype: torch.dtype, attention: str) -> None:
    model = tiny_model(family, dtype=dtype, attn_implementation=attention)
    reference = plain_alone(model, PROMPTS, NUM_NEW)
    for drafter in (Plain(), SmallModel(with_noise(model)), ScriptedDrafter(PartlyWrongScript(reference))):
        out = speculate(model, PROMPTS, drafter, max_new_tokens=NUM_NEW)
        assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])


@pytest.mark.parametrize("family", ["gemma", "gpt_neox", "olmo2", "opt", "qwen3"])
def test_eager_attention(family: str) -> None:
    check_trees(tiny_model(family, attn_implementation="eager"))


@pytest.mark.parametrize("drafter", [PromptLookup(min_match=1), None], ids=["lookup", "itself"])
def test_return_sequences_are_rows_of_their_own(drafter: Drafter | None) -> None:
    """Sampling from one candidate is greedy, so that every returned row is known."""
    model = tiny_model("llama")
    out = speculate(
        model,
        PROMPTS,
        drafter or SmallModel(model),
        do_sample=True,
        top_k=1,
        num_return_sequences=3,
        max_new_tokens=NUM_NEW,
    )
    expected = plain_alone(model, PROMPTS, NUM_NEW).repeat_interleave(3, dim=0)
    mask = PROMPTS["attention_mask"].repeat_interleave(3, dim=0)
    assert_same_tokens(model, expected, out.sequences, mask)
    assert len(out.stats.row_rounds) == 12


def on_cpu(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device="cpu")


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return disk_offload(model, folder, execution_device="cpu")


def split(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("offload", [on_cpu, on_disk, split])
def test_offloaded_model(offload: object, tmp_path: Path) -> None:
    model = tiny_model("llama")
    reference = plain_alone(model, PROMPTS, NUM_NEW)
    draft = with_noise(model)
    model = offload(model, tmp_path)
    assert any(weights.is_meta for weights in model.parameters())
    for drafter in (SmallModel(draft), ScriptedDrafter(PartlyWrongScript(reference)), SmallModel(model)):
        out = speculate(model, PROMPTS, drafter, max_new_tokens=NUM_NEW)
        assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
        assert out.stats.num_accepted > 0
    out = speculate(model, PROMPTS, EarlyExit(1), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference, out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_drafted > 0
    assert any(weights.is_meta for weights in model.parameters())


def test_run_longer_than_the_room_reserved_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.generation._MAX_RESERVED", 4)
    model = tiny_model("llama")
    prompts = random_prompts([40, 58])
    reference = plain_alone(model, prompts, 60)
    out = speculate(model, prompts, SmallModel(with_noise(model)), max_new_tokens=60)
    assert_same_tokens(model, reference, out.sequences, prompts["attention_mask"])


def test_assertion_names_the_difference() -> None:
    model = tiny_model("llama")
    expected = plain_alone(model, PROMPTS, 4)
    actual = expected.clone()
    actual[2, -2] += 1
    with pytest.raises(AssertionError, match=r"row 2: first difference at token 2, logit gap"):
        assert_same_tokens(model, expected, actual, PROMPTS["attention_mask"])
    with pytest.raises(AssertionError, match="row 0: one output ends at token 3"):
        assert_same_tokens(model, expected, expected[:, :-1], PROMPTS["attention_mask"])
    actual[1, 3] += 1
    with pytest.raises(AssertionError, match="row 1: the prompts differ"):
        assert_same_tokens(model, expected, actual, PROMPTS["attention_mask"])


def test_assertion_forgives_a_tie() -> None:
    model = tiny_model("llama")
    expected = plain_alone(model, ONE_PROMPT, 4)
    winner = int(expected[0, -1])
    model.lm_head.weight.data[winner ^ 1] = model.lm_head.weight.data[winner]
    tied = expected.clone()
    tied[0, -1] = winner ^ 1
    assert_same_tokens(model, expected, tied)
