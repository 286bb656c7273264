"""Rows in pages, verified as one list of tokens: the same tokens, less memory, nothing padded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as lp

import specdec
from specdec.drafters import Auto, Drafter, Plain, PromptLookup, SmallModel
from specdec.drafters.base import DraftSession
from specdec.engine import Engine, Generation, Request
from specdec.kernels import native
from specdec.kernels.model.packed import PackedLayers
from specdec.testing import tiny_model
from specdec.tree_model.pages import PAGE, PagedCache, PagePool, as_pages, one_after_another, row_pages
from tests.support.engine_requests import REQUESTS, TOKENIZER, BanAfter, random_prompt, request_of
from tests.support.goodness import assert_drawn_from
from trees import ROOT, Draft, Ragged, TokenTree, TreeBatch

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())

VOCAB_SIZE = 259


@cache
def int8_model(family: str = "llama") -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32} if family == "qwen3" else {}
    return specdec.prepare(tiny_model(family, **sizes), weights="int8")


def alone(model: PreTrainedModel, request: Request) -> list[int]:
    """What a request gets whose prompt and reply go through the model token by token, with nobody else there."""
    engine = Engine(model, drafter=Plain(), tokenizer=TOKENIZER, max_rows=1)
    generation = engine.submit(request)
    engine.run()
    return generation.tokens


@cache
def expected(number: int) -> tuple[int, ...]:
    return tuple(alone(int8_model(), REQUESTS[number]))


class _Compared:
    """Compares the logits of every slot that is verified with those of the whole text, read at once."""

    def __init__(self, engine: Engine):
        self._loop, self._verify = engine._loop, engine._loop.target.verify
        self.num_slots = 0
        engine._loop.target.verify = self

    @torch.no_grad()
    def __call__(self, trees: TreeBatch, roots_B1: torch.Tensor, grown: object = None) -> Ragged:
        logits = self._verify(trees, roots_B1, grown)
        assert logits.sizes == tuple(1 + size for size in trees.sizes), "no slot is for nothing"
        for row, size in enumerate(trees.sizes):
            tree, text = trees.row(row), self._loop.sequences.tokens[row]
            for slot in range(1 + size):
                path = tree.path(slot - 1) if slot else []
                ids = torch.tensor([[*text, *(tree.tokens[node] for node in path)]])
                assert torch.equal(logits[row][slot], self._loop.target.model(ids).logits[0, -1])
                self.num_slots += 1
        return logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_text_alone(family: str):
    model = int8_model(family)
    requests = [request_of(random_prompt(length, length), max_new_tokens=9) for length in (3, 40, 17)]
    texts = [alone(model, request) for request in requests]
    drafter = _Scripted([[*request.prompt, *text] for request, text in zip(requests, texts, strict=True)])
    engine = Engine(model, drafter=drafter, max_rows=3)
    compared = _Compared(engine)
    assert [generation.tokens for generation in run(engine, requests)] == texts
    assert compared.num_slots >= 30


class _Scripted(Drafter):
    """Drafts of 0 to 8 nodes, another number for every row in every round: some tokens of the text that is to come,
    then wrong ones; every other round with leaves beside them.

    Args:
        texts: prompt and reply of every request.
    """

    def __init__(self, texts: Sequence[Sequence[int]]):
        self.texts = [list(text) for text in texts]
        self.sizes: set[tuple[int, ...]] = set()

    def start(self, run):
        return _ScriptedSession(self, run)


class _ScriptedSession(DraftSession):
    takes_rows = True

    def __init__(self, drafter: _Scripted, run):
        self._drafter, self._run, self._round = drafter, run, 0

    def propose(self, max_depths: Sequence[int]) -> Draft:
        self._round += 1
        trees = []
        for row, depth in enumerate(max_depths):
            text = self._run.sequences.tokens[row]
            coming = next((t[len(text) :] for t in self._drafter.texts if t[: len(text)] == text), [])
            size = (7 * row + 3 * self._round) % 9
            num_right = (row + self._round) % (size + 1)
            tokens = [*coming[:num_right], *[(5 * row + self._round) % VOCAB_SIZE] * size][: min(size, depth)]
            parents = list(range(ROOT, len(tokens) - 1))
            if self._round % 2 and len(tokens) > 2:
                parents[-1] = ROOT  # a leaf beside the first token
            trees.append(TokenTree(tokens=tokens, parents=parents))
        batch = TreeBatch.stack(trees)
        self._drafter.sizes.add(batch.sizes)
        return Draft(trees=batch)

    def join(self) -> None:
        pass


def texts_of(numbers: Sequence[int]) -> list[list[int]]:
    return [[*REQUESTS[number].prompt, *expected(number)] for number in numbers]


def run(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Some arrive while others are at work; the cache is whole between rounds."""
    generations = []
    for request in requests:
        generations.append(engine.submit(request))
        engine.step()
        engine._loop.target.cache.check_integrity()
    while engine.step():
        engine._loop.target.cache.check_integrity()
    return generations


@pytest.mark.parametrize(
    ("name", "max_rows"), [("scripted", 1), ("scripted", 4), ("scripted", 9), ("lookup", 4), ("small", 4), ("auto", 4)]
)
def test_every_request_gets_what_it_would_get_alone(name: str, max_rows: int):
    numbers = range(len(REQUESTS))
    drafter = {
        "scripted": _Scripted(texts_of(numbers)),
        "lookup": PromptLookup(num_tokens=3, min_match=1),
        "small": SmallModel(tiny_model("llama", seed=3), num_tokens=3),
        "auto": Auto(SmallModel(int8_model())),
    }[name]
    engine = Engine(int8_model(), drafter=drafter, tokenizer=TOKENIZER, max_rows=max_rows, prefill_chunk=8)
    assert engine._loop.target.is_packed
    generations = run(engine, [REQUESTS[number] for number in numbers])
    assert [generation.tokens for generation in generations] == [list(expected(number)) for number in numbers]
    if name == "scripted":
        assert sum(generation.stats.accepted for generation in generations) > 5
        assert max_rows == 1 or any(0 in sizes and max(sizes) > 5 for sizes in drafter.sizes)
    assert PAGE * engine._pool.num_pages == engine._prefixes.num_tokens, "pages of rows that have gone"


def test_sampled_rows_of_mixed_widths_have_the_targets_distribution():
    """Pairs of tokens, under a processor that looks at the prefix, beside the probabilities of all pairs."""
    model, prompt = int8_model(), [1, 2, 3]
    warpers = LogitsProcessorList([BanAfter(1), lp.TopKLogitsWarper(2)])

    def probs(text: list[int]) -> dict[int, float]:
        ids = torch.tensor([text])
        with torch.no_grad():
            scores_1V = warpers(ids, model(ids).logits[:, -1].float())
        probs_V = scores_1V[0].double().softmax(-1)
        return {int(token): float(probs_V[token]) for token in probs_V.nonzero()[:, 0]}

    pairs = {(a, b): p * q for a, p in probs(prompt).items() for b, q in probs([*prompt, a]).items()}
    config = GenerationConfig(do_sample=True, top_k=2, max_new_tokens=2)
    drafter = _Scripted([[*prompt, *pair] for pair in pairs])
    engine = Engine(model, drafter=drafter, max_rows=6)
    generations = [
        engine.submit(
            Request(prompt=prompt, config=config, seed=seed, logits_processor=LogitsProcessorList([BanAfter(1)]))
        )
        for seed in range(300)
    ]
    engine.run()
    assert sum(generation.stats.accepted for generation in generations) > 10
    assert_drawn_from([tuple(generation.tokens) for generation in generations], pairs)


def test_prefixes_are_shared_not_copied():
    model, system = int8_model(), random_prompt(40, 1)
    engine = Engine(model, drafter=Plain(), max_rows=3)
    prompts = [[*system, *random_prompt(5, seed)] for seed in range(3)]
    first = engine.submit(request_of(prompts[0]))
    engine.run()
    others = [engine.submit(request_of(prompt)) for prompt in prompts[1:]]
    while engine._loop.target.cache.num_rows < 2:
        engine.step()
    rows = [engine._loop.target.cache.row_views(row).pages for row in range(2)]
    assert rows[0][:2] == rows[1][:2]
    assert len({id(page) for pages in rows for page in pages}) == len(rows[0]) + len(rows[1]) - 2
    engine.run()
    assert [generation.stats.num_reused_tokens for generation in (first, *others)] == [0, 32, 32]
    for generation, prompt in zip((first, *others), prompts, strict=True):
        assert generation.tokens == alone(model, request_of(prompt))


@pytest.mark.parametrize("is_packed", [True, False])
def test_rows_that_outgrow_the_memory_wait_and_go_on(is_packed: bool, monkeypatch: pytest.MonkeyPatch):
    model = int8_model() if is_packed else tiny_model("llama")
    monkeypatch.setattr("specdec.engine.engine.GROWTH_OF_NEW", 8)
    monkeypatch.setattr("specdec.engine.engine.GROWTH", 4)
    requests = [
        replace(request_of(random_prompt(12, seed), max_new_tokens=70, do_sample=bool(seed % 2)), seed=seed)
        for seed in range(4)
    ]
    texts = []
    for request in requests:
        single = Engine(model, drafter=Plain())
        texts.append(single.submit(request))
        single.run()
    engine, given_back = Engine(model, drafter=Plain(), max_rows=4, max_cached_tokens=160), []
    give_back = engine._waiting.give_back
    monkeypatch.setattr(engine._waiting, "give_back", lambda running: (given_back.append(running), give_back(running)))
    generations = [engine.submit(request) for request in requests]
    most_rows = 0
    while engine.step():
        most_rows = max(most_rows, engine.num_rows)
        assert engine.num_cached_tokens <= 160 + 4 * PAGE
    assert given_back
    assert most_rows > 160 // 82, "what a request may come to hold is not reserved"
    assert [generation.tokens for generation in generations] == [text.tokens for text in texts]
    assert all(generation.finish_reason == "length" for generation in generations)


def test_a_model_that_changes_under_way_goes_on_without_pages():
    model = int8_model("qwen2")
    requests = [request_of(random_prompt(length, length), max_new_tokens=20) for length in (5, 30)]
    texts = [alone(model, request) for request in requests]
    engine = Engine(model, drafter=PromptLookup(num_tokens=3), max_rows=2)
    first = engine.submit(requests[0])
    for _ in range(5):
        engine.step()
    assert engine._loop.target.is_packed
    hook = model.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    try:
        second = engine.submit(requests[1])
        engine.run()
        assert not engine._loop.target.is_packed
    finally:
        hook.remove()
    assert [first.tokens, second.tokens] == texts


def test_a_change_is_noticed_by_the_next_round():
    model = int8_model("qwen2")
    request = request_of(random_prompt(5, 5), max_new_tokens=12)
    text, engine, called = alone(model, request), Engine(model, drafter=PromptLookup(num_tokens=3)), []
    generation = engine.submit(request)
    for _ in range(4):
        engine.step()
    assert engine._loop.target.is_packed
    hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: called.append(1))
    try:
        engine.step()
        assert called
        assert not engine._loop.target.is_packed
        engine.run()
    finally:
        hook.remove()
    assert generation.tokens == text


def test_a_round_looks_at_every_weight_only_where_something_has_changed(monkeypatch: pytest.MonkeyPatch):
    model, looks = int8_model.__wrapped__("qwen2"), []  # one of its own, as it is changed for good
    is_current = PackedLayers.is_current
    monkeypatch.setattr(PackedLayers, "is_current", lambda packed: (looks.append(1), is_current(packed))[1])
    engine = Engine(model, drafter=Plain())
    generation = engine.submit(request_of(random_prompt(5, 5), max_new_tokens=20))
    for _ in range(3):
        engine.step()
    looks.clear()
    engine.step()
    assert not looks
    attn = model.get_decoder().layers[0].self_attn
    attn.q_proj = torch.nn.Linear(attn.q_proj.in_features, attn.q_proj.out_features)
    engine.step()
    assert not generation.is_finished
    assert not engine._loop.target.is_packed


def test_drafts_come_from_earlier_replies_of_a_kind():
    model = int8_model()
    request = request_of(random_prompt(9, 4, vocab_size=200), max_new_tokens=24)
    engine = Engine(model, drafter=PromptLookup(min_match=2))
    once = engine.submit(replace(request, kind="summaries"))
    engine.run()
    again, of_another = engine.submit(replace(request, kind="summaries")), engine.submit(request)
    engine.run()
    assert once.tokens == again.tokens == of_another.tokens
    assert once.stats.accepted == of_another.stats.accepted < again.stats.accepted


def test_equal_processors_of_several_rows_are_called_once_a_round(monkeypatch: pytest.MonkeyPatch):
    model, called = int8_model(), []
    requests = [request_of(random_prompt(n, n), repetition_penalty=1.3, max_new_tokens=8) for n in (3, 20, 9)]
    texts = [alone(model, request) for request in requests]
    engine = Engine(model, drafter=_Scripted([[*r.prompt, *t] for r, t in zip(requests, texts, strict=True)]))
    generations = [engine.submit(request) for request in requests]
    penalise = lp.RepetitionPenaltyLogitsProcessor.__call__
    monkeypatch.setattr(
        lp.RepetitionPenaltyLogitsProcessor, "__call__", lambda *args: (called.append(1), penalise(*args))[1]
    )
    num_rounds = 0
    while engine.step():
        num_rounds += 1
    assert [generation.tokens for generation in generations] == texts
    assert len(called) <= num_rounds + 1


def test_pages_keep_what_is_copied_into_them():
    pool = PagePool(2, 1, 4)
    cache = PagedCache(pool)
    slots = [tuple(torch.randn(1, 37, 4) for _ in range(2)) for _ in range(2)]
    states = specdec.tree_model.cache.RowStates(length=37, slots=slots, recurrent=[])
    cache.join(states)
    found = cache.row_states(0)
    for layer, other in itertools.product(range(2), range(2)):
        assert torch.equal(found.slots[layer][other], slots[layer][other])
    parts = [cache.row_views(0).part(0, PAGE), states.part(PAGE, 37)]
    assert torch.equal(one_after_another(parts).slots[1][0], slots[1][0])
    assert as_pages(pool, cache.row_views(0)).pages == cache.row_views(0).pages
    assert pool.num_pages == 3
    del found, parts
    cache.select_rows([])
    assert pool.num_pages == 0


def test_a_path_is_moved_across_pages():
    pool = PagePool(2, 2, 8)
    cache = PagedCache(pool)
    cache.join(row_pages(0, []))
    cache.append(0, 14)
    cache.commit([range(14)])
    cache.append(0, 6)
    for page in cache._pages[0]:
        page.states.copy_(torch.randn(pool.shape))
    before = torch.cat([page.states for page in cache._pages[0]], 3)
    cache.commit([[0, 2, 3, 5]])
    after = torch.cat([page.states for page in cache._pages[0]], 3)
    kept = [*range(14), 14, 16, 17, 19]
    assert cache.lengths == [18]
    assert torch.equal(after[:, :, :, :18], before[:, :, :, kept])
