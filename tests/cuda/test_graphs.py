"""Forwards that are replayed, with a stand-in for graphs: the same tokens, from buffers that outlive a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.cuda import GraphedTreeModel, tree_model_of
from specdec.cuda.arena import Arena
from specdec.cuda.graphs import StandInPool, standing_in
from specdec.cuda.model import why_not
from specdec.drafters import Drafter, Plain, PromptLookup, SmallModel
from specdec.kernels.model.profile import profile_of
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from tests.support.references import plain_alone, with_noise
from trees import DySpec

NUM_NEW = 24
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])


@pytest.fixture(autouse=True)
def _graphs() -> Iterator[None]:
    with standing_in():
        yield


def arena_of(model: PreTrainedModel) -> Arena:
    return profile_of(model).part(Arena)


def check(model: PreTrainedModel, drafter: Drafter, prompts: dict[str, Tensor], **options: Any) -> int:
    """Greedy, each row like the row alone; returns how many forwards of the target were replayed."""
    before = arena_of(model).num_replays
    out = specdec.generate(model, **prompts, drafter=drafter, max_new_tokens=NUM_NEW, do_sample=False, **options)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out, prompts["attention_mask"])
    assert arena_of(model).known.refusal is None
    return arena_of(model).num_replays - before


DRAFTERS: dict[str, tuple[Callable[[PreTrainedModel], Drafter], dict[str, Any]]] = {
    "plain": (lambda _: Plain(), {}),
    "prompt lookup": (lambda _: PromptLookup(), {}),
    "chain": (SmallModel, {}),
    "tree": (SmallModel, {"tree": DySpec(6)}),
}


def ways(model: PreTrainedModel) -> set[bool]:
    """Of the graphs of a model: whether they read used slots."""
    return {shape.reads_used for shape in arena_of(model)._graphs}


@pytest.fixture(params=[True, False], ids=["reads used", "biased"])
def reads_used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether graphs have the tree attention, or the model's own with a bias."""
    if not request.param:
        monkeypatch.setattr("specdec.cuda.model.can_attend", lambda _: False)
    return request.param


@pytest.mark.parametrize("prompts", [RAGGED, ONE], ids=["ragged", "one"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_equality(name: str, prompts: dict[str, Tensor], reads_used: bool) -> None:
    model = tiny_model("llama")
    make, options = DRAFTERS[name]
    draft = with_noise(tiny_model("llama"))
    assert check(model, make(draft), prompts, **options) > 3
    assert ways(model) == {reads_used}
    if name in ("chain", "tree"):
        assert arena_of(draft).num_replays > 3
        assert ways(draft) == {reads_used}


@pytest.mark.parametrize(
    "family", ["gpt2", "qwen3", "opt", "gpt_neox", "mixtral", "olmo2", "mistral", "starcoder2", "gemma3_text"]
)
def test_families(family: str) -> None:
    """Also of windows, which the longer prompts are past."""
    model = tiny_model(family)
    assert check(model, PromptLookup(), RAGGED) > 3
    assert check(model, SmallModel(with_noise(tiny_model(family))), RAGGED, tree=DySpec(6)) > 3
    assert ways(model) == {True}
    assert model.config._attn_implementation == "sdpa"


def test_families_whose_graphs_read_all() -> None:
    for model in (tiny_model("llama", attn_implementation="eager"), tiny_model("falcon")):
        assert check(model, PromptLookup(), RAGGED) > 3
        assert ways(model) == {False}
    assert "TypeError" in (arena_of(model).known.reads_all or "")


def test_padding_in_the_middle_of_a_prompt() -> None:
    model, prompts = tiny_model("llama"), {name: part.clone() for name, part in ONE.items()}
    prompts["attention_mask"][0, 3:5] = 0
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    expected = model.generate(**prompts, **settings)
    for _ in range(2):
        assert_same_tokens(model, expected, specdec.generate(model, **prompts, drafter=PromptLookup(), **settings))
    assert ways(model) == {False}


def test_a_length_past_the_bound_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cuda.model._BUCKETS", (80, 96))
    model = tiny_model("llama")
    assert check(model, Plain(), random_prompts([12])) > 3
    assert {shape.num_slots for shape in arena_of(model)._graphs} == {80, 96}


def test_a_graph_that_says_otherwise_is_not_used() -> None:
    model = tiny_model("llama")
    with pytest.MonkeyPatch.context() as patch:  # the last of the tail is forgotten
        patch.setattr("specdec.cuda.model.seen_bits", lambda seen_BTK: torch.zeros_like(seen_BTK[:, :, 0].long()))
        assert check(model, PromptLookup(), RAGGED) > 3
    assert ways(model) == {False}
    assert arena_of(model).known.reads_all == "a captured forward gives other logits"


@pytest.mark.parametrize("prompts", [RAGGED, ONE], ids=["ragged", "one"])
@torch.no_grad()
def test_states_of_a_replay(prompts: dict[str, Tensor]) -> None:
    """As those of the ordinary forward, for drafters that read them."""
    given, plain = prompts["input_ids"], tiny_model("llama")
    arena_of(plain).known.refusal = "not in this test"
    models = [tree_model_of(tiny_model("llama")), tree_model_of(plain)]
    for _ in range(4):
        states = []
        for model in models:
            model.keep_states((1, 2))
            model.prefill(given, attention_mask=prompts["attention_mask"])
            model.forward(
                given[:, :3], torch.arange(3).expand(len(given), 3), torch.ones(len(given), 3, 3).tril().bool()
            )
            states.append({depth: part.clone() for depth, part in model.states.items()})
            model.forget_tail()
            model.select_rows([])
        assert states[0].keys() == states[1].keys() == {1, 2}
        for depth, part in states[0].items():
            torch.testing.assert_close(part, states[1][depth])
    assert arena_of(models[0].model).num_replays > 2


def test_graphs_from_inference_mode_serve_outside_of_it() -> None:
    """Tensors made in it could not be written to."""
    model = tiny_model("llama")
    with torch.inference_mode():
        check(model, PromptLookup(), RAGGED)
    assert check(model, PromptLookup(), RAGGED) > 3


def test_the_next_call_has_the_graphs_of_the_last() -> None:
    """Also one of other rows."""
    model = tiny_model("llama")
    first = check(model, Plain(), ONE)
    assert check(model, Plain(), ONE) == first + 1  # the forward that came before the capture
    assert check(model, PromptLookup(), RAGGED) > 3
    check(model, Plain(), ONE)  # in other buffers, of four rows
    with pytest.MonkeyPatch.context() as patch:  # what is left of a run may be kept: it has no rows
        kept: list[object] = []
        patch.setattr(Arena, "lease", lambda *args, lease=Arena.lease: kept.append(args[1]) or lease(*args))
        assert check(model, Plain(), ONE) == check(model, Plain(), ONE) == first + 1
        assert len(kept) == 2


def test_buffers_that_grow_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.generation._MAX_RESERVED", 4)
    model, long = tiny_model("llama", max_position_embeddings=512), random_prompts([120])
    out = specdec.generate(model, **long, drafter=PromptLookup(), max_new_tokens=160, do_sample=False)
    assert_same_tokens(model, plain_alone(model, long, 160), out, long["attention_mask"])
    assert {layer[0].shape[2] for layer in arena_of(model)._buffers.values()} == {512}


def test_what_a_long_run_leaves_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any run is, beside these tiny weights."""
    monkeypatch.setattr("specdec.cuda.arena._KEPT_BYTES", 0)
    model = tiny_model("llama")
    assert check(model, Plain(), ONE) == check(model, Plain(), ONE) > 3
    assert not arena_of(model)._buffers
    assert not arena_of(model)._graphs


def test_nothing_outlives_the_model() -> None:
    """No cycle keeps it until Python's next collection."""
    model, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    specdec.generate(model, **ONE, drafter=SmallModel(draft), max_new_tokens=NUM_NEW)
    arenas = [arena_of(model), arena_of(draft)]
    parts = [model.lm_head, draft.lm_head, *arenas, *(arena._buffers[0][0] for arena in arenas)]
    known = [weakref.ref(part) for part in parts]
    del model, draft, parts, arenas
    assert [found() for found in known] == [None] * 6


def test_two_runs_at_once() -> None:
    """The second has no graphs, and leaves the first one's buffers alone."""
    model = tiny_model("llama")
    first, second = tree_model_of(model), tree_model_of(model)
    assert isinstance(first, GraphedTreeModel)
    logits = first.prefill(ONE["input_ids"])
    kept = [layer.keys.clone() for layer in first.cache.stored.values()]
    assert torch.equal(second.prefill(ONE["input_ids"]), logits)
    second.forward(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), None)
    assert all(torch.equal(*pair) for pair in zip(kept, [x.keys for x in first.cache.stored.values()], strict=True))


def test_samples_are_those_without_graphs() -> None:
    model, draft = tiny_model("llama"), with_noise(tiny_model("llama"))
    settings = {"max_new_tokens": NUM_NEW, "do_sample": True, "temperature": 0.7}
    torch.manual_seed(0)
    replayed = specdec.generate(model, **RAGGED, drafter=SmallModel(draft), **settings)
    assert arena_of(model).num_replays > 3
    plain = tiny_model("llama")
    arena_of(plain).known.refusal = arena_of(draft).known.refusal = "not in this test"
    torch.manual_seed(0)
    assert torch.equal(replayed, specdec.generate(plain, **RAGGED, drafter=SmallModel(draft), **settings))


def test_who_has_no_graphs() -> None:
    assert (
        why_not(tiny_model("lfm2", layer_types=["conv", "full_attention"]))
        == "a layer has chunks, a state or a selection"
    )
    model = tiny_model("mistral", attn_implementation="eager")
    assert why_not(model) == "a layer has a window, and its attention is not PyTorch's"
    model = tiny_model("llama")

    class Broken(StandInPool):
        def capture(self, *_: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.cuda.model.graphs_for", lambda _: Broken)
        out = specdec.generate(model, **ONE, drafter=Plain(), max_new_tokens=NUM_NEW, do_sample=False)
    assert_same_tokens(model, plain_alone(model, ONE, NUM_NEW), out)
    assert "not permitted" in (why_not(model) or "")


def test_what_a_replay_would_not_do() -> None:
    model = tiny_model("llama")
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert why_not(model) == "it has hooks, which a replay would not call"
    hook.remove()
    assert why_not(model) is None
    model.model.layers[0].mlp.up_proj.active_adapters = ["one"]
    assert why_not(model) == "it has adapters, which may be switched"


def test_moved_weights_are_captured_again() -> None:
    model = tiny_model("llama")
    check(model, Plain(), ONE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.flip(0).contiguous()
    assert check(model, Plain(), ONE) > 3
    assert not isinstance(tree_model_of(tiny_model("lfm2", layer_types=["conv", "full_attention"])), GraphedTreeModel)


class Packed(torch.Tensor):
    """As other libraries keep quantised weights: a tensor without an address, of others that have one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].inner, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default
        return cls(args[0].inner)


def test_packed_weights_that_are_replaced_are_captured_again() -> None:
    """Of such weights a graph reads the parts: it would have gone on with memory that is another's by now."""
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(Packed(linear.weight.detach()), requires_grad=False)
    check(model, Plain(), ONE)
    before = dict(arena_of(model)._graphs)
    check(model, Plain(), ONE)
    assert arena_of(model)._graphs == before
    linear.weight.inner = linear.weight.inner.flip(0).contiguous()
    check(model, Plain(), ONE)
    assert not set(map(id, before.values())) & set(map(id, arena_of(model)._graphs.values()))


def test_the_stand_in_spoils_what_a_graph_would() -> None:
    pool, inputs = StandInPool(), torch.ones(2)
    graphs = [pool.capture(lambda: (inputs * 2,), [inputs]), pool.capture(lambda: (inputs + 1,), [inputs])]
    (first,) = graphs[0].replay()
    graphs[1].replay()
    assert first.isnan().all()
    calls = iter([1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="other logits"):
        pool.capture(lambda: (inputs * next(calls),), [inputs])
