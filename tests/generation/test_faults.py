"""Whatever breaks a run off, anywhere: the error comes out as it is, and nothing of the run stays behind."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import specdec
import trees
from specdec.drafters import Auto, DraftSession, EarlyExit, PromptLookup, QuantizedSelf, Run, SmallModel
from specdec.hf import CACHE
from specdec.testing import tiny_model
from tests.support.faults import Bomb, Watched, _WatchedSession

PROMPT = torch.tensor([list(b"mind the gap, mind the")])
GREEDY = {"max_new_tokens": 20, "do_sample": False}
NUM_CACHED = 9


class BombedStreamer(BaseStreamer):
    def __init__(self, bomb: Bomb):
        self.bomb = bomb

    def put(self, value: Tensor) -> None:
        self.bomb.touch()

    def end(self) -> None:
        pass


class BombedProcessor(LogitsProcessor):
    def __init__(self, bomb: Bomb):
        self.bomb = bomb

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bomb.touch()
        return scores


class BombedCriterion(StoppingCriteria):
    def __init__(self, bomb: Bomb):
        self.bomb = bomb

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.bomb.touch()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=8)


@pytest.fixture(scope="module")
def draft_model() -> PreTrainedModel:
    return tiny_model("llama", seed=8, num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, **GREEDY)


@contextmanager
def bombed_forward(model: torch.nn.Module, bomb: Bomb) -> Iterator[None]:
    hook = model.register_forward_hook(lambda *_: bomb.touch())
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def bombed_layer(model: PreTrainedModel, bomb: Bomb) -> Iterator[None]:
    """Between two layers: one has written to the cache, the next has not."""
    with bombed_forward(model.model.layers[-1], bomb):
        yield


@contextmanager
def watched_caches(*models: PreTrainedModel) -> Iterator[list[weakref.ref[Any]]]:
    """Weak references to every cache that the models' forwards are given."""
    caches: list[weakref.ref[Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(CACHE) is not None:
            caches.append(weakref.ref(kwargs[CACHE]))

    hooks = [model.register_forward_pre_hook(note, with_kwargs=True) for model in models]
    try:
        yield caches
    finally:
        for hook in hooks:
            hook.remove()


def cache_of_prompt(model: PreTrainedModel) -> DynamicCache:
    return model(PROMPT[:, :NUM_CACHED], use_cache=True)[CACHE]


def states_of(cache: DynamicCache) -> list[Tensor]:
    return [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]


PLACES = (
    "streamer",
    "processor",
    "criterion",
    "prefix function",
    "drafter's start",
    "propose",
    "observe",
    "target's forward",
    "target's layer",
    "draft's forward",
)


@contextmanager
def bombed_call(
    place: str, bomb: Bomb, model: PreTrainedModel, draft_model: PreTrainedModel
) -> Iterator[dict[str, Any]]:
    """The options of a call with the bomb in its place."""
    drafter = Watched(SmallModel(draft_model, num_tokens=3))
    options: dict[str, Any] = {"drafter": drafter, **GREEDY}
    match place:
        case "streamer":
            options["streamer"] = BombedStreamer(bomb)
        case "processor":
            options["logits_processor"] = LogitsProcessorList([BombedProcessor(bomb)])
        case "criterion":
            options["stopping_criteria"] = StoppingCriteriaList([BombedCriterion(bomb)])
        case "prefix function":
            options["prefix_allowed_tokens_fn"] = lambda row, ids: bomb.touch() or list(range(200))
        case "drafter's start" | "propose" | "observe":
            drafter.bombs[place.removeprefix("drafter's ")] = bomb
        case "target's forward" | "draft's forward":
            with bombed_forward(model if place.startswith("target") else draft_model, bomb):
                yield options
            return
        case "target's layer":
            with bombed_layer(model, bomb):
                yield options
            return
    yield options


def catch(error: BaseException, model: PreTrainedModel, **options: Any) -> BaseException | None:
    """Run the call and return what it raised, without its traceback (which would keep the run alive)."""
    try:
        specdec.generate(model, PROMPT, **options)
    except type(error) as caught:
        return caught.with_traceback(None)
    return None


ERRORS = {"error": LookupError("bang"), "Ctrl-C": KeyboardInterrupt(), "out of memory": torch.OutOfMemoryError("full")}


@pytest.mark.rotated
@pytest.mark.parametrize("fuse", [1, 4])
@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_breaks_off(
    model: PreTrainedModel,
    draft_model: PreTrainedModel,
    expected: Tensor,
    place: str,
    error: BaseException,
    fuse: int,
):
    if place == "drafter's start":
        fuse = 1
    cache = cache_of_prompt(model)
    before, attributes = states_of(cache), set(vars(model))
    with (
        watched_caches(model, draft_model) as caches,
        bombed_call(place, Bomb(error, fuse), model, draft_model) as options,
    ):
        assert catch(error, model, past_key_values=cache, **options) is error
    drafter = options["drafter"]
    assert drafter.num_opened == drafter.num_closed

    assert cache.get_seq_length() == NUM_CACHED
    assert all(torch.equal(now, then) for now, then in zip(states_of(cache), before, strict=True))
    gc.collect()
    assert {reference() for reference in caches} <= {None, cache}

    assert set(vars(model)) == attributes
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    drafter.bombs.clear()
    assert torch.equal(specdec.generate(model, PROMPT, past_key_values=cache, drafter=drafter, **GREEDY), expected)


def test_a_finished_run_closes_its_session_and_keeps_no_cache(
    model: PreTrainedModel, draft_model: PreTrainedModel, expected: Tensor
):
    drafter = Watched(SmallModel(draft_model))
    with watched_caches(model, draft_model) as caches:
        assert torch.equal(specdec.generate(model, PROMPT, drafter=drafter, **GREEDY), expected)
    assert drafter.num_opened == drafter.num_closed == 1
    gc.collect()
    assert caches
    assert {reference() for reference in caches} == {None}


def test_a_fault_in_a_batch_with_rows_that_have_finished(model: PreTrainedModel):
    """Rows have left the cache when the fault comes; the caller's cache knows nothing of it."""
    prompts = torch.cat([PROMPT, PROMPT.roll(1, 1)])
    cache = model(prompts[:, :NUM_CACHED], use_cache=True)[CACHE]
    before = states_of(cache)
    options = {**GREEDY, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    eos = int(model.generate(prompts, **options)[0, PROMPT.shape[1] + 1])
    error = LookupError("bang")
    criterion = BombedCriterion(Bomb(error, 12))
    with pytest.raises(LookupError, match="bang"):
        specdec.generate(
            model,
            prompts,
            past_key_values=cache,
            eos_token_id=eos,
            stopping_criteria=StoppingCriteriaList([criterion]),
            drafter=PromptLookup(min_match=1),
            **options,
        )
    assert all(torch.equal(now, then) for now, then in zip(states_of(cache), before, strict=True))


def test_a_session_is_closed_once_when_closing_fails(model: PreTrainedModel, expected: Tensor):
    """An error of `close` itself comes out too, and the next run is not affected."""

    class ClosesBadly(_WatchedSession):
        def close(self) -> None:
            super().close()
            raise LookupError("stuck")

    class Drafts(Watched):
        def start(self, run: Run) -> DraftSession:
            return ClosesBadly(self, self.drafter.start(run))

    drafter = Drafts(PromptLookup())
    with pytest.raises(LookupError, match="stuck"):
        specdec.generate(model, PROMPT, drafter=drafter, **GREEDY)
    assert drafter.num_closed == 1
    assert torch.equal(specdec.generate(model, PROMPT, drafter=PromptLookup(), **GREEDY), expected)


# a run broken off anywhere, whoever drafts


DRAFTERS: dict[str, Callable[[PreTrainedModel, PreTrainedModel], dict[str, Any]]] = {
    "chain": lambda model, draft: {"drafter": SmallModel(draft)},
    "tree": lambda model, draft: {"drafter": SmallModel(draft), "tree": trees.DySpec(6)},
    "sampled tree": lambda model, draft: {
        "drafter": SmallModel(draft),
        "tree": trees.Fixed((2, 2)),
        "verify": "traversal",
        "do_sample": True,
    },
    "lookup": lambda model, draft: {"drafter": PromptLookup(min_match=1)},
    "exit": lambda model, draft: {"drafter": EarlyExit(1)},
    "adaptive exit": lambda model, draft: {"drafter": EarlyExit()},
    "int8 copy": lambda model, draft: {"drafter": QuantizedSelf()},
    "auto": lambda model, draft: {"drafter": Auto(SmallModel(draft))},
}


ALWAYS_BROKEN_OFF = {"chain", "sampled tree", "auto"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS_BROKEN_OFF else [pytest.mark.slow]) for name in DRAFTERS]
)
def test_ctrl_c_at_random_moments(
    model: PreTrainedModel, draft_model: PreTrainedModel, expected: Tensor, name: str
) -> None:
    """Inside a random module of the target: the next call, with the same drafter, knows nothing of it."""
    options = {**GREEDY, **DRAFTERS[name](model, draft_model)}
    modules = [module for module in model.modules() if not list(module.children())]
    chance = random.Random(name)
    num_broken = 0
    for _ in range(12):
        bomb = Bomb(KeyboardInterrupt(), chance.randrange(1, 25))
        cache = cache_of_prompt(model)
        before = states_of(cache)
        with watched_caches(model, draft_model) as caches, bombed_forward(chance.choice(modules), bomb):
            broken = catch(bomb.error, model, past_key_values=cache, **options)
        if broken is not None:
            num_broken += 1
            assert all(torch.equal(now, then) for now, then in zip(states_of(cache), before, strict=True))
        gc.collect()
        assert {reference() for reference in caches} <= {None, cache}
    assert num_broken > 3
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert torch.equal(specdec.generate(model, PROMPT, **{**options, "do_sample": False}), expected)


# logits that are no numbers


@contextmanager
def poisoned(model: PreTrainedModel, value: float, from_forward: int) -> Iterator[None]:
    """The model's logits are all `value` from some forward on."""
    count = 0

    def replace(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count >= from_forward:
            output.logits = torch.full_like(output.logits, value)
        return output

    hook = model.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("from_forward", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_target_whose_logits_become_nan(
    model: PreTrainedModel, draft_model: PreTrainedModel, expected: Tensor, do_sample: bool, from_forward: int
) -> None:
    options = {**GREEDY, "do_sample": do_sample, "drafter": SmallModel(draft_model)}
    with poisoned(model, torch.nan, from_forward), pytest.raises(specdec.NumericalError, match="not numbers"):
        specdec.generate(model, PROMPT, **options)
    assert torch.equal(specdec.generate(model, PROMPT, **{**options, "do_sample": False}), expected)


@pytest.mark.rotated
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [None, trees.DySpec(6), trees.Fixed((2, 2))], ids=["chain", "DySpec", "Fixed"])
def test_a_draft_whose_logits_are_no_numbers_costs_speed_only(
    model: PreTrainedModel, draft_model: PreTrainedModel, expected: Tensor, tree: Any, options: Any, value: float
) -> None:
    options = {**GREEDY, **options, "drafter": SmallModel(draft_model), "tree": tree}
    with poisoned(draft_model, value, 3):
        assert torch.equal(specdec.generate(model, PROMPT, **options), expected)


# threads


def test_threads_share_a_model_and_drafters(model: PreTrainedModel, draft_model: PreTrainedModel) -> None:
    """Calls at the same time do not see each other."""
    prompts = [PROMPT, PROMPT.roll(3, 1), torch.cat([PROMPT, PROMPT.roll(5, 1)])]
    expected = [model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY) for ids in prompts]
    calls = [DRAFTERS[name](model, draft_model) for name in DRAFTERS if name != "sampled tree"]
    wrong: list[Any] = []

    def work(start: int) -> None:
        for turn in range(2 * len(calls)):
            options, index = calls[(start + turn) % len(calls)], (start + turn) % len(prompts)
            try:
                mask = torch.ones_like(prompts[index])
                out = specdec.generate(model, prompts[index], attention_mask=mask, **options, **GREEDY)
                if not torch.equal(out, expected[index]):
                    wrong.append((options, out))
            except Exception as error:
                wrong.append((options, error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
