"""The real demo model over the built-in suite: the same tokens as plain decoding, alone and in a ragged batch."""

from pathlib import Path

import pytest
from torch import Tensor
from transformers import BatchEncoding

from specdec.drafters import Plain, PromptLookup, QuantizedSelf
from specdec.models import LoadedModel, load
from specdec.suites import Prompt, load_suite
from specdec.testing import assert_same_tokens
from specdec.text.prompting import encode_prompts
from tests.support.references import plain_alone, rows_of, speculate
from trees import DySpec, DySpecThreshold, Fixed, Sequoia

pytestmark = pytest.mark.network

NUM_NEW = 24
DRAFTERS = {"plain": Plain(), "lookup": PromptLookup()}
POLICIES = [Fixed((3, 2, 1)), Sequoia(12, (0.8, 0.1, 0.05)), DySpec(12), DySpecThreshold(max_nodes=12)]


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> LoadedModel:
    return load("demo")


def shortest_of_each_category() -> list[Prompt]:
    suite = load_suite()
    return [min(suite.select([category]).prompts, key=lambda prompt: len(prompt.text)) for category in suite.categories]


@pytest.fixture(scope="module")
def prompts(demo: LoadedModel) -> BatchEncoding:
    return encode_prompts(demo.tokenizer, [prompt.text for prompt in shortest_of_each_category()])


@pytest.fixture(scope="module")
def reference(demo: LoadedModel, prompts: BatchEncoding) -> Tensor:
    return plain_alone(demo.model, prompts, NUM_NEW)


@pytest.mark.rotated
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rows", [[0], [2], [4], [0, 1, 2, 3]], ids=str)
def test_same_tokens_as_plain_decoding(
    demo: LoadedModel, prompts: BatchEncoding, reference: Tensor, rows: list[int], drafter: str
) -> None:
    batch = rows_of(prompts, rows)
    out = speculate(demo.model, batch, DRAFTERS[drafter], max_new_tokens=NUM_NEW)
    length = out.sequences.shape[1]
    assert_same_tokens(demo.model, reference[rows, -length:], out.sequences, batch["attention_mask"])
    assert bool(out.stats.num_drafted) == (drafter == "lookup")


@pytest.mark.slow
def test_same_tokens_with_every_tree(demo: LoadedModel, prompts: BatchEncoding, reference: Tensor) -> None:
    rows, num_new = [0, 2, 4], NUM_NEW // 2
    batch, quantized = rows_of(prompts, rows), QuantizedSelf()
    expected = reference[rows, : num_new - NUM_NEW]
    for drafter, policy in ((PromptLookup(min_match=1), DySpec(12)), *((quantized, policy) for policy in POLICIES)):
        out = speculate(demo.model, batch, drafter, tree=policy, max_new_tokens=num_new)
        length = out.sequences.shape[1]
        assert_same_tokens(demo.model, expected[:, -length:], out.sequences, batch["attention_mask"])
        assert out.stats.num_accepted > 0
        assert out.stats.num_levels < out.stats.num_drafted
