"""What heads draft leaves the target's distribution as it is: every draw enumerated, rows sampled, requests joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from specdec.drafters import DraftHead, Plain
from specdec.engine import Engine
from specdec.testing import tiny_model
from tests.support.block_heads import TinyBlockHead, save_authors
from tests.support.engine_requests import BanAfter, alone, random_prompt, request_of
from tests.support.enumeration import ToyModel
from tests.support.exact_rounds import CAUGHT, VERIFIERS, total_variation
from tests.support.heads import Listener, TinyHead, save_speculators, small_vocab_model
from tests.support.mtp_heads import TinyMtp
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact
from tests.support.session_drafts import every_draft
from trees import Chain, DySpec, Fixed, GrowthPolicy

TREES: dict[str, GrowthPolicy] = {"chain": Chain(3), "fixed": Fixed((2, 1)), "dyspec": DySpec(3, max_depth=2)}
ROUNDING = 1e-5


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "mtp"])
def test_q_is_what_tokens_are_drawn_from(
    kind: str, tree: str, verify: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft that a head can make after a text, verified by a toy target: what is committed is the target's."""
    size = 4
    model = tiny_model("llama", vocab_size=size, num_hidden_layers=4)
    options: dict[str, Any] = {"vocab_size": size, "drafts": (0, 1, 3), "layers": (1, 2, 3)}
    if kind == "dflash":
        drafter = DraftHead(save_authors(tmp_path, TinyBlockHead(**options, mask=2)))
    elif kind == "mtp":
        tiny = TinyMtp("deepseek", "llama", torch.float32, vocab_size=size, num_hidden_layers=4)
        model, drafter = tiny.target, DraftHead(tiny.save(tmp_path))
    else:
        drafter = DraftHead(save_speculators(tmp_path, TinyHead(**options, seed=1)))
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(3)]
    drafts = every_draft(model, drafter, TREES[tree], warpers, monkeypatch)
    assert sum(prob for prob, _ in drafts) == pytest.approx(1, abs=ROUNDING)
    assert kind == "mtp" or not any(2 in draft.trees.row(0).tokens for _, draft in drafts)
    target = ToyModel(3, vocab_size=size)
    error, num_accepted = total_variation(drafts, target, verify, monkeypatch)
    assert error < ROUNDING < CAUGHT
    assert num_accepted > 0.5


@pytest.mark.parametrize("tree", TREES)
def test_processors_that_name_tokens_see_the_targets(
    tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's own token 1 is the target's 2, which is not to be drafted."""
    model = tiny_model("llama", vocab_size=4, num_hidden_layers=4)
    head = TinyHead(vocab_size=4, drafts=(0, 2, 3), layers=(1, 2, 3), seed=1)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(0.8), SuppressTokensLogitsProcessor([2])]
    drafts = every_draft(model, DraftHead(save_speculators(tmp_path, head)), TREES[tree], warpers, monkeypatch)
    assert {token for _, draft in drafts for token in draft.trees.row(0).tokens} == {0, 3}
    error, _ = total_variation(drafts, ToyModel(3, vocab_size=4), "topdown", monkeypatch)
    assert error < ROUNDING


@pytest.mark.parametrize("verify", VERIFIERS)
@pytest.mark.parametrize("tree", TREES)
def test_sampled_rows_follow_the_target(tree: str, verify: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=4, hidden_size=16, initializer_range=0.6)
    head = TinyHead(target_channels=16, vocab_size=VOCAB_SIZE, drafts=(0, 1, 3, 4), layers=(1, 2, 3))
    drafter = DraftHead(save_speculators(tmp_path, head))
    assert_ragged_rows_are_exact(model, drafter, tree=TREES[tree], verify=verify)


REQUESTS = (
    request_of(random_prompt(9, 1), max_new_tokens=20),
    request_of(random_prompt(1, 2), max_new_tokens=7),
    request_of(random_prompt(41, 3), repetition_penalty=1.3, max_new_tokens=15),
    request_of(random_prompt(17, 4), processors=[BanAfter(3)], max_new_tokens=11),
    request_of(random_prompt(33, 6), eos_token_id=[3, 7], max_new_tokens=25),
    request_of([*random_prompt(41, 3), 5, 2], max_new_tokens=20),
    request_of(random_prompt(41, 3)[:33], max_new_tokens=20),
    request_of(random_prompt(3, 9), max_new_tokens=1),
)


@pytest.mark.parametrize("chunk", [5, 512])
def test_requests_that_join_and_leave(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, listener = small_vocab_model(dtype=torch.float64), Listener(monkeypatch)
    drafter = DraftHead(save_speculators(tmp_path, TinyHead()))
    engine = Engine(model, drafter=drafter, max_rows=3, prefill_chunk=chunk)
    generations = [engine.submit(request) for request in REQUESTS]
    engine.run()
    for request, generation in zip(REQUESTS, generations, strict=True):
        assert generation.error is None
        assert generation.tokens == alone(model, request)
    assert sum(generation.stats.accepted for generation in generations) > 0
    assert {0, 32} <= {said.first for said in listener.said}, "the beginning of a prompt was known to the engine"
    listener.check(TinyHead(), model)


def test_sampled_requests_do_not_depend_on_the_head(tmp_path: Path) -> None:
    model = small_vocab_model()
    requests = [request_of(random_prompt(9 + i, i), do_sample=True, seed=i, max_new_tokens=16) for i in range(5)]
    texts = []
    for drafter in (DraftHead(save_speculators(tmp_path, TinyHead())), Plain()):
        engine = Engine(model, drafter=drafter, max_rows=2)
        generations = [engine.submit(request) for request in requests]
        engine.run()
        texts.append([generation.tokens for generation in generations])
    assert texts[0] == texts[1]
