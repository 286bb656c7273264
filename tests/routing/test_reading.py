"""What a writer knows of its cache without comparing whole texts."""

from __future__ import annotations

import random

import pytest
import torch

from specdec.decoding.sequences import Sequences, num_shared
from specdec.routing import reading
from specdec.routing.reading import TextReader
from specdec.testing import tiny_model
from specdec.tree_model.model import TreeModel

NUM_TOKENS = 3
"""Few, so that texts go on alike after they were taken back."""


PROMPTS_BP = torch.tensor([[0, 1, 2], [2, 1, 1]])
MASK_BP = torch.tensor([[0, 1, 1], [1, 1, 1]])


def read_prompts(target: TreeModel, rows: object) -> None:
    target.prefill(PROMPTS_BP, attention_mask=MASK_BP, capacity=40)


@pytest.mark.parametrize("seed", range(3))
def test_what_two_texts_share_with_one_cache_is_what_a_comparison_says(seed):
    choose, model = random.Random(seed), tiny_model("llama")
    readers = [
        TextReader(
            target=TreeModel(model),
            sequences=Sequences(PROMPTS_BP, MASK_BP, 40),
            prefill=read_prompts,
            vocab_size=model.config.vocab_size,
        )
        for _ in range(2)
    ]
    readers[0].share_cache_of(readers[1])
    for _ in range(30):
        reader, row = choose.choice(readers), choose.randrange(2)
        text = reader.sequences.tokens[row]
        kept = choose.randint(2 + row, len(text))  # the prompt stays
        text = [*text[:kept], *(choose.randrange(NUM_TOKENS) for _ in range(choose.randint(0, 4)))]
        reader.replace(row, text[:30])
        reader.get_ready([row])
        held = reader._held.tokens[row]
        assert len(held) == reader.target.cache.lengths[row]
        for each in readers:
            assert each.cached(row) == num_shared(held, each.sequences.prefix(row)[:-1].tolist())
        if lead := reader.unread(row):
            reader.forward({row: [*lead, reader.root(row)]})
            reader.keep([range(len(lead) if index == row else 0) for index in range(2)])
            assert reader.cached(row) == reader.sequences.lengths[row] - 1


@pytest.mark.parametrize("slots_of_a_token", [0, 1000])
def test_a_row_that_writes_is_read_alone_where_copying_its_states_is_cheaper(slots_of_a_token, monkeypatch):
    monkeypatch.setattr(reading, "_SLOTS_OF_A_TOKEN", slots_of_a_token)
    model = tiny_model("llama")
    reader = TextReader(
        target=TreeModel(model),
        sequences=Sequences(PROMPTS_BP, MASK_BP, 40),
        prefill=read_prompts,
        vocab_size=model.config.vocab_size,
    )
    reader.get_ready([0])
    widths = []
    verify = TreeModel.verify
    monkeypatch.setattr(
        TreeModel, "verify", lambda self, trees, roots: widths.append(len(roots)) or verify(self, trees, roots)
    )
    logits_RTV = reader.forward({0: [reader.root(0), 1]})
    assert widths == [1 if slots_of_a_token else 2]
    alone_1TV = model(torch.tensor([[1, 2, 1]])).logits[:, -2:]
    torch.testing.assert_close(logits_RTV, alone_1TV, atol=1e-5, rtol=1e-4)
    reader.sequences.put_all([[1], []])
    reader.keep([range(2), range(0)])
    assert reader.target.cache.lengths == [4, 2]
