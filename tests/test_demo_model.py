"""The real demo model over the built-in suite: the same tokens as plain decoding, alone and in a ragged batch."""

import pytest
from torch import Tensor
from transformers import BatchEncoding

from specdec import ModelError
from specdec.bench.suite import Prompt, load_suite
from specdec.drafters import Plain, PromptLookup
from specdec.models import LoadedModel, load
from specdec.prompting import encode_prompts
from specdec.testing import assert_same_tokens
from tests.references import plain_alone, rows_of, speculate

NUM_NEW = 24
DRAFTERS = {"plain": Plain(), "lookup": PromptLookup()}


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    try:
        return load("demo")
    except ModelError as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")


def shortest_of_each_category() -> list[Prompt]:
    suite = load_suite()
    return [min(suite.select([category]).prompts, key=lambda prompt: len(prompt.text)) for category in suite.categories]


@pytest.fixture(scope="module")
def prompts(demo: LoadedModel) -> BatchEncoding:
    return encode_prompts(demo.tokenizer, [prompt.text for prompt in shortest_of_each_category()])


@pytest.fixture(scope="module")
def reference(demo: LoadedModel, prompts: BatchEncoding) -> Tensor:
    return plain_alone(demo.model, prompts, NUM_NEW)


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
