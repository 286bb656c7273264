"""Auto goes on without a drafter that raises: one warning, the same output; and threads share what it learns.

The default call used to fail where nothing but the target's own int8 copy was broken.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from specdec.control import ForwardCosts, costs_of
from specdec.drafters import Auto, Drafter, DraftSession, EarlyExit, Run, SmallModel
from specdec.drafters.auto import drafter as auto
from specdec.drafters.auto import sources
from specdec.drafters.auto.dropped import is_dropped
from specdec.drafters.auto.knowledge import Knowledge
from specdec.engine import Engine, Request
from specdec.errors import DraftError
from specdec.kernels.model.profile import profile_of
from specdec.testing import random_prompts, tiny_model
from tests.support.references import forget_drafters, plain_alone, speculate, with_noise

NUM_NEW = 40
ALONE = random_prompts([9])
RAGGED = random_prompts([5, 12, 9, 18])


class Breaks(SmallModel):
    """A draft model that raises when a method of its session is called for the n-th time.

    Raises:
        LookupError: then.
    """

    def __init__(self, model: PreTrainedModel, call: str, number: int, error: BaseException | None = None):
        super().__init__(model)
        self.call, self.number = call, number
        self.error = error or LookupError("the draft's weights have gone")
        self.num_started = self.num_closed = 0

    def start(self, run: Run) -> DraftSession:
        self.num_started += 1
        if self.call == "start":
            raise self.error
        session = super().start(run)
        for call in (self.call, "close"):
            setattr(session, call, self._bombed(call, getattr(session, call)))
        return session

    def _bombed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def bombed(*args: Any) -> Any:
            self.num_closed += name == "close"
            if name == self.call:
                self.number -= 1
                if self.number <= 0:
                    raise self.error
            return call(*args)

        return bombed


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    forget_drafters()
    yield
    forget_drafters()


class FixedCosts(ForwardCosts):
    def update(self, num_tokens: int, seconds: float) -> None:
        """The rounds of the test take what they take."""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost next to nothing, the target's forwards the same at any width: the drafter has its turn."""
    costs: dict[object, ForwardCosts] = {}

    def cheap(model: PreTrainedModel, num_rows: int = 1) -> ForwardCosts:
        return costs.setdefault(model, FixedCosts({1: 1e-6 if costs else 1.0}))

    for module in (auto, sources):
        monkeypatch.setattr(module, "costs_of", cheap)


@pytest.fixture
def only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target brings nothing along."""
    monkeypatch.setattr(auto, "_own_drafters", lambda run, auto: [])


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


FAULTS = [("start", 1), ("propose", 1), ("propose", 3), ("observe", 1), ("observe", 3), ("select_rows", 1)]


@pytest.mark.usefixtures("eager", "only_named")
@pytest.mark.parametrize("prompts", [ALONE, RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize(("call", "number"), FAULTS)
def test_a_drafter_that_raises_is_dropped(
    call: str, number: int, prompts: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    broken, sound = Breaks(with_noise(model), call, number), SmallModel(with_noise(model, 0.1))
    drafter, expected = Auto(broken, sound), plain_alone(model, prompts, NUM_NEW)
    used: set[str | None] = set()
    for _ in range(3):
        out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW)
        assert torch.equal(out.sequences, expected)
        used |= {choice["drafter"] for choice in out.stats.trace}
    assert broken.num_started == 1, "it is not tried again"
    assert broken.num_closed == (call != "start")
    (warning,) = warnings_in(caplog)
    assert "Breaks raised LookupError: the draft's weights have gone" in warning
    assert "SmallModel" in used, "the others go on"
    drafter.reset()
    speculate(model, prompts, drafter, max_new_tokens=4)
    assert broken.num_started == 2


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("call", "number"), [("start", 1), ("observe", 1), ("observe", 3)])
def test_beside_the_targets_own_copy_there_is_one_warning_too(
    call: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The drafter works for the target and for the copy."""
    model = tiny_model("llama")
    broken = Breaks(with_noise(model), call, number)
    for _ in range(2):
        out = speculate(model, ALONE, Auto(broken), max_new_tokens=NUM_NEW)
        assert torch.equal(out.sequences, plain_alone(model, ALONE, NUM_NEW))
    assert len(warnings_in(caplog)) == 1


@pytest.mark.skipif(auto.native.library() is None, reason="Auto makes copies for native kernels only")
@pytest.mark.parametrize("where", ["making", "drafting"])
def test_a_copy_that_fails_does_not_fail_the_default_call(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with models whose code read the weights of int8 linears."""
    model, made = tiny_model("llama"), []
    if where == "drafting":
        copy = auto._quantized_self.copy_of(model)
        monkeypatch.setattr(copy, "forward", lambda *args, **kwargs: copy.lm_head.weights)

    def fails(target: PreTrainedModel) -> PreTrainedModel:
        made.append(target)
        raise MemoryError("no room for it")

    if where == "making":
        monkeypatch.setattr(auto._quantized_self, "copy_of", fails)
    for _ in range(3):
        out = speculate(model, ALONE, None, max_new_tokens=NUM_NEW)
        assert torch.equal(out.sequences, plain_alone(model, ALONE, NUM_NEW))
    assert len(made) == (where == "making")
    (warning,) = warnings_in(caplog)
    assert "raised" in warning
    Auto().reset()
    assert not is_dropped(model, auto._quantized_self)


@pytest.mark.usefixtures("eager", "only_named")
def test_a_draft_that_broke_off_in_the_targets_layers_leaves_nothing_there() -> None:
    """An early exit runs layers of the target ahead; the next verification knows nothing of it."""
    model = tiny_model("llama", num_hidden_layers=3)

    class Exit(EarlyExit):
        def start(self, run: Run) -> DraftSession:
            session, scored = super().start(run), iter(range(100))

            def score(grown: object) -> Tensor:
                if next(scored) == 3:
                    raise LookupError("bang")
                return type(session)._score_nodes(session, grown)

            session._score_nodes = score
            return session

    drafter = Auto(Exit(1, num_tokens=3))
    for prompts in (ALONE, RAGGED):
        out = speculate(model, prompts, drafter, max_new_tokens=NUM_NEW)
        assert torch.equal(out.sequences, plain_alone(model, prompts, NUM_NEW))
    assert is_dropped(model, drafter.drafters[0])


@pytest.mark.usefixtures("eager", "only_named")
@pytest.mark.parametrize(
    ("call", "error"),
    [("start", DraftError("does not fit")), ("start", KeyboardInterrupt()), ("propose", KeyboardInterrupt())],
)
def test_what_is_the_callers_comes_out_as_it_is(call: str, error: BaseException) -> None:
    model = tiny_model("llama")
    broken = Breaks(with_noise(model), call, 2, error)
    with pytest.raises(type(error)) as caught:
        speculate(model, ALONE, Auto(broken), max_new_tokens=NUM_NEW)
    assert caught.value is error
    assert not is_dropped(model, broken)


@pytest.mark.usefixtures("eager", "only_named")
def test_an_error_of_the_callers_processor_comes_out_of_a_draft_too() -> None:
    class Refuses(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            frame, is_drafting = sys._getframe(), False
            while frame := frame.f_back:
                is_drafting |= frame.f_code.co_name == "_grow"
            if is_drafting:
                raise ValueError("not this one")
            return scores

    model = tiny_model("llama")
    drafter = Auto(SmallModel(with_noise(model)))
    with pytest.raises(ValueError, match="not this one"):
        speculate(model, ALONE, drafter, max_new_tokens=NUM_NEW, logits_processor=LogitsProcessorList([Refuses()]))
    assert not is_dropped(model, drafter.drafters[0])


@pytest.mark.usefixtures("eager", "only_named")
@pytest.mark.parametrize(("call", "number"), [("propose", 3), ("observe", 3), ("join", 2), ("select_rows", 1)])
def test_an_engine_goes_on(call: str, number: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    prompts = [list(range(5, 5 + length)) for length in (4, 9, 6)]
    engine = Engine(model, drafter=Auto(Breaks(with_noise(model), call, number)))
    configs = [GenerationConfig(max_new_tokens=12 + 4 * n, do_sample=False) for n in range(3)]
    pairs = zip(prompts, configs, strict=True)
    requests = [engine.submit(Request(prompt=prompt, config=config)) for prompt, config in pairs]
    engine.run()
    for prompt, generation in zip(prompts, requests, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=len(generation.tokens), do_sample=False)[0, len(prompt) :]
        assert generation.tokens == expected.tolist()
        assert generation.finish_reason == "length"
    assert len(warnings_in(caplog)) == 1


def test_threads_share_what_auto_learns() -> None:
    """Costs, yields and acceptance are read by some threads while others add to them."""
    model = tiny_model("llama")
    drafter: Drafter = Auto(SmallModel(with_noise(model)))
    prompts = [random_prompts([length]) for length in (5, 9, 14)]
    expected = [plain_alone(model, prompt, NUM_NEW) for prompt in prompts]
    wrong: list[object] = []

    def work(start: int) -> None:
        try:
            for turn in range(start, start + 6):
                out = speculate(model, prompts[turn % 3], drafter, max_new_tokens=NUM_NEW)
                if not torch.equal(out.sequences, expected[turn % 3]):
                    wrong.append(out)
        except Exception as error:
            wrong.append(error)

    run_threads([lambda start=start: work(start) for start in range(4)])
    assert not wrong
    assert costs_of(model) is costs_of(model)
    for known in profile_of(model).part(Knowledge).values():
        memory = known.acceptance
        assert all(0 <= taken <= seen for taken, seen in zip(memory.accepted, memory.seen, strict=True))
        assert len(known.history.runs) <= 2 + 24


def test_costs_are_read_while_rounds_are_noted() -> None:
    """It failed with "dictionary changed size during iteration" and "deque mutated during iteration"."""
    costs = ForwardCosts({1: 1.0, 64: 2.0})
    wrong: list[Exception] = []

    def work(read: Callable[[int], object]) -> None:
        try:
            for turn in range(2000):
                read(1 + turn % 500)
        except Exception as error:
            wrong.append(error)

    notes = [lambda: work(lambda width: costs.update(width, 1.5))] * 2
    run_threads([*notes, *[lambda: work(costs.seconds)] * 2])
    assert not wrong
    assert all(costs.seconds(width) > 0 for width in range(1, 100))


def run_threads(jobs: list[Callable[[], None]]) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
