"""A draft model: its cache follows the target's without recomputation, and its vocabulary may be padded."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import DraftError, UnsupportedModelError, UnsupportedOptionError
from specdec.drafters import SmallModel
from specdec.drafters.model import small_model
from specdec.testing import BYTE_VOCAB_SIZE, assert_same_tokens, random_prompts, tiny_model
from tests.support.forward_log import ForwardLog
from tests.support.references import plain_alone, speculate, with_noise
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact, tiny
from trees import Chain, Fixed, GrowthPolicy

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])
ONE_PROMPT = random_prompts([12])


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("kind", ["itself", "relative", "stranger"])
def test_no_token_is_computed_twice(target: PreTrainedModel, kind: str) -> None:
    draft = {
        "itself": lambda: deepcopy(target),
        "relative": lambda: with_noise(target),
        "stranger": lambda: tiny_model("llama", seed=1),
    }[kind]()
    with ForwardLog(draft) as log:
        out = speculate(target, ONE_PROMPT, SmallModel(draft), max_new_tokens=NUM_NEW)
    assert len(log.prefixes) == len(set(log.prefixes))
    text = tuple(out.sequences[0].tolist())
    read = [prefix for prefix in log.prefixes if prefix == text[: len(prefix)]]
    last_root = max(map(len, read))
    assert sorted(map(len, read)) == list(range(1, last_root + 1)), "the draft has read all of the text"
    assert len(text) - last_root <= SmallModel(draft).policy.length + 1


def test_number_of_draft_forwards(target: PreTrainedModel) -> None:
    """A prefill, then in each round one forward of what is pending and one for each further drafted token."""
    out = speculate(target, ONE_PROMPT, SmallModel(deepcopy(target), num_tokens=5), max_new_tokens=NUM_NEW)
    assert out.stats.accepted_histogram == {5: 3, 4: 1}
    assert out.stats.draft_forwards == 1 + 3 * 5 + 4
    assert out.stats.target_forwards == 1 + 4


def test_one_token_drafts(target: PreTrainedModel) -> None:
    out = speculate(target, PROMPTS, SmallModel(target, num_tokens=1), max_new_tokens=NUM_NEW)
    assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.accepted_histogram == {1: 4 * 11, 0: 4}


def test_tree_sets_the_length(target: PreTrainedModel) -> None:
    out = speculate(target, ONE_PROMPT, SmallModel(target, num_tokens=5), tree=Chain(2), max_new_tokens=NUM_NEW)
    assert out.stats.accepted_histogram == {2: 7, 1: 1}


def test_rows_that_stop_leave_the_draft_too(target: PreTrainedModel) -> None:
    """Rows end at different tokens; the others go on with drafts of their own."""
    reference = plain_alone(target, PROMPTS, NUM_NEW)
    stops = [int(reference[row, -NUM_NEW + 3 + 5 * row]) for row in range(3)]
    options = {"eos_token_id": stops, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    expected = target.generate(**PROMPTS, **options, do_sample=False)
    for draft in (target, with_noise(target)):
        out = speculate(target, PROMPTS, SmallModel(draft), **options)
        assert_same_tokens(target, expected, out.sequences, PROMPTS["attention_mask"], **options)
    assert len(set((expected[:, -NUM_NEW:] == 0).sum(1).tolist())) == 4


def resized(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """A copy with rows of its vocabulary cut off, or with random ones added."""
    copy = deepcopy(model)
    for module, name in ((copy.model.embed_tokens, "num_embeddings"), (copy.lm_head, "out_features")):
        weights: Tensor = module.weight.data
        extra = torch.ones((max(0, vocab_size - len(weights)), weights.shape[1]))
        module.weight = torch.nn.Parameter(torch.cat([weights, extra])[:vocab_size])
        setattr(module, name, vocab_size)
    copy.config.vocab_size = vocab_size
    return copy


SAMPLING = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 1}}
"""Sampling from one candidate is greedy, so that the outcome is known."""


@pytest.mark.parametrize("mode", SAMPLING)
def test_draft_may_have_more_padding_rows(target: PreTrainedModel, mode: str) -> None:
    draft = resized(target, BYTE_VOCAB_SIZE + 2)
    draft.lm_head.weight.data[BYTE_VOCAB_SIZE:] = 100 * draft.lm_head.weight.data[0]  # now and then the likeliest
    out = speculate(target, PROMPTS, SmallModel(draft), max_new_tokens=NUM_NEW, **SAMPLING[mode])
    assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.acceptance_rate == 1


@pytest.mark.parametrize("mode", SAMPLING)
def test_draft_may_have_fewer_padding_rows(target: PreTrainedModel, mode: str) -> None:
    """The draft can neither propose nor read the last two tokens, which this target does write."""
    reference = plain_alone(target, PROMPTS, NUM_NEW)
    assert bool((reference >= BYTE_VOCAB_SIZE - 2).any())
    draft = resized(target, BYTE_VOCAB_SIZE - 2)
    out = speculate(target, PROMPTS, SmallModel(draft), max_new_tokens=NUM_NEW, **SAMPLING[mode])
    assert_same_tokens(target, reference, out.sequences, PROMPTS["attention_mask"])
    assert 0 < out.stats.acceptance_rate < 1


@pytest.mark.parametrize("tree", [Chain(2), Fixed((2, 1))], ids=["chain", "tree"])
@pytest.mark.parametrize("difference", [-1, 1], ids=["fewer", "more"])
def test_samples_follow_the_target_whatever_its_padding(
    difference: int, tree: GrowthPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model, "_PADDING_ROWS", 0.2)  # of six tokens
    model = tiny(seed=1)
    draft = SmallModel(resized(tiny(seed=2), VOCAB_SIZE + difference))
    assert_ragged_rows_are_exact(model, draft, tree=tree)


@pytest.mark.parametrize("mode", SAMPLING)
def test_processors_may_leave_tokens_only_that_the_draft_lacks(target: PreTrainedModel, mode: str) -> None:
    def allowed(_: int, text: Tensor) -> list[int]:
        return [BYTE_VOCAB_SIZE - 1] if len(text) % 2 else [7, 9]

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": NUM_NEW}
    reference = target.generate(**ONE_PROMPT, **options, do_sample=False)
    draft = SmallModel(resized(target, BYTE_VOCAB_SIZE - 2))
    for tree in (Chain(3), Fixed((2, 2))):
        out = speculate(target, ONE_PROMPT, draft, tree=tree, **options, **SAMPLING[mode])
        assert torch.equal(out.sequences, reference)


def test_draft_of_another_vocabulary_is_refused(target: PreTrainedModel) -> None:
    with pytest.raises(DraftError, match="vocabulary of 128 and the target one of 259"):
        specdec.generate(target, **PROMPTS, drafter=tiny_model("llama", vocab_size=128), max_new_tokens=4)
    assert speculate(target, PROMPTS, SmallModel(target)).stats.acceptance_rate == 1


def test_embeddings_are_refused(target: PreTrainedModel) -> None:
    embeds = target.get_input_embeddings()(PROMPTS["input_ids"])
    with pytest.raises(UnsupportedOptionError, match="inputs_embeds"):
        specdec.generate(target, inputs_embeds=embeds, drafter=SmallModel(target), max_new_tokens=4)


def test_draft_that_cannot_roll_back_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        SmallModel(tiny_model("rwkv", attention_hidden_size=32))


def test_draft_of_another_family_and_dtype(target: PreTrainedModel) -> None:
    draft = tiny_model("gpt2", dtype=torch.bfloat16, seed=1)
    out = speculate(target, PROMPTS, SmallModel(draft), max_new_tokens=NUM_NEW)
    assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_drafted > 0
