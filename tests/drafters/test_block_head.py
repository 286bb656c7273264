"""Heads that draft a block in one forward: what they compute is what their authors mean, and output is the target's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec import DraftError
from specdec.drafters import DraftHead
from specdec.drafters.head import drafter
from specdec.engine import Engine
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.block_heads import BLOCK_LAYOUTS, BlockListener, TinyBlockHead, save_authors, save_block_speculators
from tests.support.engine_requests import alone, random_prompt, request_of
from tests.support.exact_rounds import VERIFIERS
from tests.support.heads import small_vocab_model
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact
from trees import Chain, ConfidentChain, DySpec, Fixed, GrowthPolicy

NUM_NEW = 20
PROMPTS = random_prompts([5, 12, 2, 9])
TREES: dict[str, GrowthPolicy] = {"chain": Chain(9), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(12)}
HEADS = {
    "plain": TinyBlockHead(),
    "own vocabulary": TinyBlockHead(drafts=(0, 2, 3, 5, 7, 8, 11)),
    "from the root": TinyBlockHead(drafts_at_root=True),
    "dspark": TinyBlockHead(markov="vanilla", drafts_at_root=True, drafts=(0, 2, 3, 5, 7, 8, 11)),
    "dspark, gated": TinyBlockHead(markov="gated"),
    "confidence alone": TinyBlockHead(markov="none", drafts_at_root=True),
}
DOUBLE = small_vocab_model(dtype=torch.float64)


@pytest.mark.parametrize(
    ("layout", "tree"),
    [("authors", "chain"), ("authors", "fixed"), ("speculators", "dyspec")],
)
@pytest.mark.parametrize("name", HEADS)
def test_blocks_are_what_their_authors_mean(
    name: str, layout: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, listener = HEADS[name], BlockListener(monkeypatch)
    out = speculate(
        DOUBLE, PROMPTS, DraftHead(BLOCK_LAYOUTS[layout](tmp_path, head)), tree=TREES[tree], max_new_tokens=NUM_NEW
    )
    assert_same_tokens(DOUBLE, plain_alone(DOUBLE, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    listener.check(head, DOUBLE)
    assert 0 < out.stats.num_accepted < out.stats.num_drafted
    assert out.stats.draft_forwards <= out.stats.num_rounds, "a block takes one forward"
    assert max(out.stats.accepted_histogram) <= head.block_size - (0 if head.drafts_at_root else 1)


def test_causal_blocks_and_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "_CHUNK", 3)
    head, listener = TinyBlockHead(is_causal=True), BlockListener(monkeypatch)
    out = speculate(DOUBLE, PROMPTS, DraftHead(save_authors(tmp_path, head)), max_new_tokens=NUM_NEW)
    assert_same_tokens(DOUBLE, plain_alone(DOUBLE, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    listener.check(head, DOUBLE)


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize(
    ("markov", "tree"),
    [
        (None, Chain(3)),
        (None, Fixed((2, 1))),
        (None, DySpec(3)),
        ("vanilla", Fixed((2, 1))),
        ("vanilla", DySpec(3)),
        ("vanilla", ConfidentChain(3, 0.5)),
    ],
    ids=["chain", "fixed", "dyspec", "markov-fixed", "markov-dyspec", "markov-confident"],
)
def test_sampled_rows_follow_the_target(markov: str | None, tree: GrowthPolicy, verify: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=4, initializer_range=0.3)
    head = TinyBlockHead(vocab_size=VOCAB_SIZE, mask=5, drafts=(0, 1, 3, 4), layers=(1, 2, 3), markov=markov)
    assert_ragged_rows_are_exact(model, DraftHead(save_authors(tmp_path, head)), tree=tree, verify=verify)


@pytest.mark.parametrize("markov", [None, "vanilla"])
def test_requests_that_join_and_leave(markov: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(random_prompt(length, length), max_new_tokens=15) for length in (9, 1, 41, 17, 5)]
    requests.append(request_of(requests[2].prompt[:34], max_new_tokens=9))
    head, listener = TinyBlockHead(markov=markov), BlockListener(monkeypatch)
    engine = Engine(DOUBLE, drafter=DraftHead(save_authors(tmp_path, head)), max_rows=3, prefill_chunk=7)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(DOUBLE, request) for request in requests]
    assert {said.first for said in listener.said} >= {0, 32}
    listener.check(head, DOUBLE)


def test_states_of_other_layers_change_acceptance_and_no_token(tmp_path: Path) -> None:
    head = TinyBlockHead(markov="vanilla", drafts_at_root=True)
    folder, plain = save_block_speculators(tmp_path, head), plain_alone(DOUBLE, PROMPTS, NUM_NEW)
    accepted = []
    for layers in (None, (2, 4, 5)):
        out = speculate(DOUBLE, PROMPTS, DraftHead(folder, state_layers=layers), max_new_tokens=NUM_NEW)
        assert_same_tokens(DOUBLE, plain, out.sequences, PROMPTS["attention_mask"])
        accepted.append(out.stats.accepted_histogram)
    assert accepted[0] != accepted[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_head_type": "rnn"}, "'rnn'"),
        ({"markov_rank": 0}, "there is none"),
        ({"markov_rank": 5}, "size mismatch"),
    ],
)
def test_dspark_heads_that_are_not_read_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = save_block_speculators(tmp_path, TinyBlockHead(markov="vanilla"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DraftError, match=message):
        DraftHead(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_swa": True}, "sliding windows"),
        ({"block_size": 1}, "a block of 1"),
        ({"mask_token_id": None}, "TypeError"),
    ],
)
def test_settings_that_are_not_read_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = save_authors(tmp_path, TinyBlockHead())
    config = json.loads((folder / "config.json").read_text())
    config["dflash_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DraftError, match=message):
        DraftHead(folder)
