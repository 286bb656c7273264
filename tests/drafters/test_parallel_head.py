"""P-EAGLE heads: a block from the forward that reads what is pending, and output is the target's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdec import DraftError
from specdec.drafters import DraftHead
from specdec.drafters.head import drafter
from specdec.engine import Engine
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.block_heads import BlockListener
from tests.support.engine_requests import alone, random_prompt, request_of
from tests.support.heads import BLOCK_SIZE, TinyHead, reference_slots, save_parallel, small_vocab_model
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact
from trees import Chain, DySpec, Fixed, GrowthPolicy

NUM_NEW, MASK = 20, 9
PROMPTS = random_prompts([5, 12, 2, 9])
DOUBLE = small_vocab_model(dtype=torch.float64)
HEADS = {
    "two layers": TinyHead(is_parallel=True, num_layers=2),
    "normed, residual too": TinyHead(is_parallel=True, norm_before_fc=True, norm_before_residual=True),
    "normed apart, like Qwen3": TinyHead(is_parallel=True, fc_norm=True, has_head_norms=True, num_layers=3),
}
TREES: dict[str, GrowthPolicy] = {"chain": Chain(9), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(12)}


def check(listener: BlockListener, head: TinyHead) -> None:
    exact = replace(head, tensors={name: tensor.double() for name, tensor in head.tensors.items()})
    assert listener.said
    for said in listener.said:
        expected_SV = reference_slots(exact, DOUBLE, said.text, said.first, MASK)
        expected_MV = expected_SV[said.depths_M.clamp(max=BLOCK_SIZE - 1)]
        error = (said.logits_MV - expected_MV).abs().max()
        assert error <= 1e-5 * (1 + expected_MV.abs().max()), f"{error:.2e} after {said.text}"


@pytest.mark.parametrize(("name", "tree"), list(zip(HEADS, TREES, strict=True)))
def test_slots_are_what_speculators_means(
    name: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter, "_CHUNK", 7)
    head, listener = HEADS[name], BlockListener(monkeypatch)
    folder = save_parallel(tmp_path, head, MASK)
    out = speculate(DOUBLE, PROMPTS, DraftHead(folder), tree=TREES[tree], max_new_tokens=NUM_NEW)
    assert_same_tokens(DOUBLE, plain_alone(DOUBLE, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    check(listener, head)
    assert 0 < out.stats.num_accepted < out.stats.num_drafted
    assert max(out.stats.accepted_histogram) <= BLOCK_SIZE
    assert out.stats.draft_forwards <= out.stats.num_rounds + 1, "a block takes one forward"


def test_sampled_rows_follow_the_target(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=4, initializer_range=0.3)
    head = TinyHead(is_parallel=True, vocab_size=VOCAB_SIZE, drafts=(0, 1, 3, 4), layers=(1, 2, 3))
    drafter_ = DraftHead(save_parallel(tmp_path, head, 5))
    assert_ragged_rows_are_exact(model, drafter_, tree=DySpec(3), verify="traversal")


def test_requests_that_join_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(random_prompt(length, length), max_new_tokens=15) for length in (9, 1, 41, 17, 5)]
    requests.append(request_of(requests[2].prompt[:34], max_new_tokens=9))
    head, listener = HEADS["two layers"], BlockListener(monkeypatch)
    engine = Engine(DOUBLE, drafter=DraftHead(save_parallel(tmp_path, head, MASK)), max_rows=3, prefill_chunk=7)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(DOUBLE, request) for request in requests]
    assert {said.first for said in listener.said} >= {0, 32}
    check(listener, head)


def test_a_head_without_its_mask_is_refused(tmp_path: Path) -> None:
    folder = save_parallel(tmp_path, TinyHead(), MASK)
    with pytest.raises(DraftError, match="mask_hidden"):
        DraftHead(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "mask_token_id": None}))
    with pytest.raises(DraftError, match="cannot be used"):
        DraftHead(folder)
