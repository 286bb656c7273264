"""Step-level routing: every step is exactly what its writer would have written, whoever wrote the text before it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import routers
import specdec
from routers import Decision, DraftedStep, Router, Steps, TargetView
from specdec.drafters import Plain, PromptLookup, SmallModel
from specdec.hf import CACHE
from specdec.streaming import RoundStreamer
from specdec.testing import ByteTokenizer, assert_same_tokens, random_prompts, tiny_model
from tests.support.goodness import assert_drawn_from
from tests.support.references import plain_alone, with_noise
from tests.support.routed_steps import NUM_NEW, PROMPTS, STEPS, Scripted, alternating, check_writers

TOKENIZER = ByteTokenizer()


class Asking(Scripted):
    """Puts every question to the target before it decides."""

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        self.log_probs, self.regrets = target.log_probs(steps), target.regrets(steps)
        self.answers = target.answers(steps[:2], "good?", "it is ", ["0", "9"])
        return super().decide(steps, target)


class Weighing(Scripted):
    """Asks for the likelihood of every other step."""

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        target.log_probs(steps[::2])
        return super().decide(steps, target)


class Comparing(Scripted):
    """Has the target write, and decides by script all the same."""

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        target.log_probs(steps)
        self.written = target.write(steps)
        return super().decide(steps, target)


def routed(model: PreTrainedModel, draft: PreTrainedModel, router: Router, prompts: dict = PROMPTS, **options):
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "tokenizer": TOKENIZER, "num_tokens": 3, **options}
    drafter = SmallModel(draft, num_tokens=settings.pop("num_tokens"))
    return specdec.generate(model, **prompts, drafter=drafter, router=router, return_dict_in_generate=True, **settings)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def draft(model: PreTrainedModel) -> PreTrainedModel:
    return with_noise(model, 0.03)


@pytest.mark.parametrize("drafted_first", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS, random_prompts([7])], ids=["ragged", "one row"])
def test_full_escalation_is_lossless(model, draft, prompts, drafted_first: bool):
    router = Scripted(lambda row, index: True) if drafted_first else routers.AlwaysTarget(steps=STEPS)
    out = routed(model, draft, router, prompts)
    expected = plain_alone(model, prompts, NUM_NEW)
    assert_same_tokens(model, expected, out.sequences, prompts["attention_mask"])
    assert not out.stats.is_lossy
    assert out.stats.escalation_rate == 1
    assert out.stats.num_accepted > 0


def test_no_escalation_is_the_draft_alone(model, draft):
    out = routed(model, draft, routers.AlwaysDraft(steps=STEPS))
    assert_same_tokens(draft, plain_alone(draft, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.is_lossy
    assert out.stats.target_forwards == 0, "the target has nothing to do, not even to read the prompt"
    assert CACHE not in out


@pytest.mark.rotated
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
@pytest.mark.parametrize("kind", [Scripted, Asking, Weighing, Comparing])
def test_every_step_is_its_writers(family: str, kind: type[Scripted]):
    model = tiny_model(family)
    draft = with_noise(model, 0.03)
    router = kind(alternating)
    out = routed(model, draft, router)
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}
    check_writers(model, draft, out)


@pytest.mark.parametrize("peek", [0, 1, 4, 50])
def test_early_escalation(model, draft, peek: int):
    out = routed(model, draft, Scripted(alternating, peek=peek))
    check_writers(model, draft, out)
    assert {step.writer for step in out.stats.steps} == {"draft", "target"}


def test_rows_do_not_wait_for_each_other(model, draft):
    """While the target writes in one row, the draft goes on in the others, and costs the target no forwards."""
    out = routed(model, draft, Scripted(lambda row, index: row == 0))
    rows = [step.row for step in out.stats.steps]
    leads = [rows[:end].count(1) - rows[:end].count(0) for end in range(len(rows))]
    assert max(leads) > 1, "in step they would be one step apart at most"
    check_writers(model, draft, out)
    alone = {name: value[:1] for name, value in PROMPTS.items()}
    forwards = routed(model, draft, Scripted(lambda row, index: True), alone).stats.target_forwards
    assert out.stats.target_forwards <= forwards + 1


@pytest.mark.parametrize("together", [False, True])
def test_steps_can_be_judged_together(model, draft, together: bool):
    """A router that has the target write sees a step of every row at once."""
    sizes = []

    class Counting(Comparing):
        judges_together = together

        def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
            sizes.append(len(steps))
            return super().decide(steps, target)

    out = routed(model, draft, Counting(alternating))
    check_writers(model, draft, out)
    assert (max(sizes) == 4) is together


def test_a_long_stretch_by_one_writer(model, draft):
    """What the other one has written is read when it is needed, in parts if it is long."""
    out = routed(model, draft, Scripted(lambda row, index: index >= 12), max_new_tokens=180)
    check_writers(model, draft, out)
    assert out.stats.steps[-1].writer == "target"


@pytest.mark.parametrize("longest", [7, 10_000])
def test_a_step_that_never_ends(model, draft, longest: int):
    """No separator comes: a step ends at its limit, and with the text."""
    steps = Steps(separators=("no such text",), max_tokens=longest)
    out = routed(model, draft, Scripted(alternating, steps=steps))
    check_writers(model, draft, out)
    lengths = [
        [step.num_tokens for step in out.stats.steps if step.row == row] for row in range(len(PROMPTS["input_ids"]))
    ]
    assert lengths == [[7, 7, 7, 7, 7, 5] if longest == 7 else [NUM_NEW]] * 4


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 30}])
def test_processors_see_the_whole_text(model, draft, option: dict):
    expected = model.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
    out = routed(model, draft, Scripted(lambda row, index: True), **option)
    assert torch.equal(out.sequences, expected)
    expected = draft.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
    assert torch.equal(routed(model, draft, Scripted(lambda row, index: False), **option).sequences, expected)


@pytest.mark.parametrize("escalates", [True, False])
def test_rows_stop_where_plain_decoding_stops(model, draft, escalates: bool):
    writer = model if escalates else draft
    plain = writer.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False)
    eos = [int(plain[0, -30]), int(plain[2, -20])]
    stops = {"eos_token_id": eos, "pad_token_id": 0}
    text = TOKENIZER.decode(plain[1, -12:-10])
    for option in (stops, {**stops, "stop_strings": [text], "tokenizer": TOKENIZER}):
        expected = writer.generate(**PROMPTS, max_new_tokens=NUM_NEW, do_sample=False, **option)
        assert expected.shape[1] < plain.shape[1] or (expected[:, -1] == 0).any()
        out = routed(model, draft, Scripted(lambda row, index: escalates), **option)
        assert torch.equal(out.sequences, expected)


def test_streamers_get_every_token_by_step(model, draft):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value)

        def end(self):
            self.ended = True

    streamer, prompts = Collect(), random_prompts([9])
    out = routed(model, draft, Scripted(alternating), prompts, streamer=streamer)
    prompt, *rest = streamer.tokens
    assert streamer.ended
    assert torch.equal(torch.cat([prompt[0], *rest]), out.sequences[0])


def test_a_round_streamer_is_told_of_steps(model, draft):
    class Rounds(RoundStreamer):
        def __init__(self):
            self.rounds = []

        def put(self, value):
            pass

        def end(self):
            pass

        def put_round(self, rows, tokens, num_accepted):
            self.rounds.append((list(rows), [len(step) for step in tokens], list(num_accepted)))

    streamer = Rounds()
    out = routed(model, draft, Scripted(alternating), streamer=streamer)
    flat = [step for round_ in streamer.rounds for step in zip(*round_, strict=True)]
    for (row, num_tokens, num_drafted), step in zip(flat, out.stats.steps, strict=True):
        assert (row, num_tokens) == (step.row, step.num_tokens)
        assert num_drafted == num_tokens if step.writer == "draft" else num_drafted <= num_tokens


def test_a_draft_equal_to_the_target_is_accepted_whole(model):
    out = routed(model, model, Scripted(lambda row, index: True))
    assert out.stats.num_accepted == out.stats.num_drafted
    assert all(step.num_discarded == 0 for step in out.stats.steps)


def test_scoring_a_step_is_its_verification(model, draft):
    """A router that asks for log p_target costs no forward more where the target then writes."""
    asked = routed(model, draft, Weighing(lambda row, index: True), random_prompts([9]))
    silent = routed(model, draft, Scripted(lambda row, index: True), random_prompts([9]))
    assert torch.equal(asked.sequences, silent.sequences)
    assert asked.stats.target_forwards == silent.stats.target_forwards


def test_signals_are_the_drafts_and_log_probs_the_targets(model, draft):
    router, prompts = Asking(lambda row, index: False), random_prompts([9])
    routed(model, draft, router, prompts)
    last = router.seen[-1]
    text = torch.tensor([[*last.prompt, *(token for step in last.previous for token in step), *last.tokens]])
    num = len(last.tokens)
    for writer, given in ((draft, last.signals.log_probs), (model, router.log_probs[-1])):
        log_p = writer(text).logits[0, -num - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, text[0, -num:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(given), expected, atol=1e-4, rtol=1e-4)
    regrets = log_p.amax(-1) - expected  # the target's
    torch.testing.assert_close(torch.from_numpy(router.regrets[-1]), regrets, atol=1e-4, rtol=1e-4)
    assert router.regrets[-1].max() > 0
    p = draft(text).logits[0, -num - 1 : -1].softmax(-1)
    torch.testing.assert_close(
        torch.from_numpy(last.signals.entropies), torch.special.entr(p).sum(-1), atol=1e-3, rtol=0
    )
    top = p.topk(2).values
    torch.testing.assert_close(torch.from_numpy(last.signals.margins), top[:, 0] - top[:, 1], atol=1e-4, rtol=0)


def test_answers_are_the_targets_next_token(model, draft):
    router, prompts = Asking(lambda row, index: False), random_prompts([9])
    routed(model, draft, router, prompts)
    last = router.seen[-1]
    turns = [
        {"role": "user", "content": "X"},
        {"role": "assistant", "content": "Y"},
        {"role": "user", "content": "good?"},
    ]
    asked = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split("Y")[-1] + "it is "
    text = [*last.prompt, *(token for step in last.previous for token in step), *last.tokens, *asked.encode()]
    expected = model(torch.tensor([text])).logits[0, -1, [ord("0"), ord("9")]].softmax(-1)
    torch.testing.assert_close(torch.from_numpy(router.answers[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[9], [9, 4, 12]], ids=["one row", "rows that leave one by one"])
def test_hidden_states_are_those_that_the_last_token_was_chosen_from(model, draft, lengths: list[int]):
    router, prompts = Scripted(lambda row, index: index % 3 == row), random_prompts(lengths)
    router.needs = frozenset({"hidden"})
    out = routed(model, draft, router, prompts)
    check_writers(model, draft, out, prompts)
    assert {step.row for step in router.seen} == set(range(len(lengths)))
    for step in router.seen:
        text = torch.tensor(
            [[*step.prompt, *(token for previous in step.previous for token in previous), *step.tokens]]
        )
        logits = draft.lm_head(draft.model.norm(torch.from_numpy(step.signals.hidden)))
        torch.testing.assert_close(logits, draft(text).logits[0, -2], atol=1e-3, rtol=1e-3)


class FirstToken(Router):
    """Looks at the drafted token: the worst that can happen to a verification that trusts q."""

    steps = Steps(max_tokens=1)

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        return [Decision(escalate=step.tokens[0] < 3) for step in steps]


@pytest.mark.parametrize("kind", ["draft", "target", "first token"])
def test_sampled_steps_have_their_writers_distribution(kind: str):
    """Also given that a router has rejected the draft's step: then its tokens are no sample of q any more."""
    model = tiny_model("llama", vocab_size=7, seed=3, initializer_range=0.2)
    draft = with_noise(model, 0.1)
    prompts = {name: tensor.repeat(1500, 1) for name, tensor in random_prompts([6], vocab_size=7).items()}
    steps = Steps(max_tokens=2)
    router = {
        "draft": routers.AlwaysDraft(steps=steps),
        "target": Scripted(lambda row, index: True, steps=steps),
        "first token": FirstToken(),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    out = routed(
        model, draft, router, prompts, max_new_tokens=2, do_sample=True, temperature=0.8, top_k=0, generator=generator
    )
    p, q = (two_tokens(writer, prompts["input_ids"][:1], 0.8) for writer in (model, draft))
    if kind == "first token":
        expected = mixture(p, q)
    else:
        joint = (q if kind == "draft" else p)[0][:, None] * (q if kind == "draft" else p)[1]
        expected = {(a, b): float(joint[a, b]) for a in range(7) for b in range(7)}
    assert_drawn_from([tuple(row) for row in out.sequences[:, 6:].tolist()], expected)


def two_tokens(writer: PreTrainedModel, prompt: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions of the first token, and of the second after each first."""
    with torch.no_grad():
        first = (writer(prompt).logits[0, -1] / temperature).softmax(-1)
        after = torch.cat([prompt.repeat(7, 1), torch.arange(7)[:, None]], 1)
        return first, (writer(after).logits[:, -1] / temperature).softmax(-1)


def mixture(p, q) -> dict[tuple[int, int], float]:
    """Each token is q's, or if that is below 3, one of p's."""

    def routed_token(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
        kept = q_V.clone()
        kept[:3] = 0
        return kept + q_V[:3].sum() * p_V

    first = routed_token(p[0], q[0])
    return {(a, b): float(first[a] * routed_token(p[1][a], q[1][a])[b]) for a in range(7) for b in range(7)}


def test_a_wider_vocabulary_of_the_target(model):
    """Rows that pad the target's embedding: the draft does not know them, and never writes them."""
    wide = tiny_model("llama", vocab_size=261)
    out = routed(wide, model, Scripted(alternating))
    check_writers(wide, model, out)


def test_a_draft_of_another_vocabulary_is_refused(model):
    with pytest.raises(specdec.DraftError, match="do not share a tokenizer"):
        routed(model, tiny_model("llama", vocab_size=100), routers.AlwaysDraft())


def test_a_draft_of_too_few_positions_is_refused(model):
    with pytest.raises(specdec.UnsupportedOptionError, match="has 32 positions"):
        routed(model, tiny_model("llama", max_position_embeddings=32), routers.AlwaysDraft())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "arbitrage"}, "pass a router"),
        ({"drafter": None}, "needs a draft model"),
        ({"drafter": PromptLookup()}, "needs a draft model"),
        ({"drafter": Plain()}, "needs a draft model"),
        ({"tokenizer": None}, "pass tokenizer="),
        ({"verify": "traversal"}, "does not go with a router"),
        ({"tree": SmallModel(tiny_model("llama")).policy}, "does not go with a router"),
        ({"output_scores": True}, "does not go with a router"),
        ({CACHE: DynamicCache()}, "does not go with a router"),
    ],
)
def test_what_does_not_go_with_a_router(model, draft, options: dict, message: str):
    settings = {
        "drafter": draft,
        "router": routers.AlwaysDraft(),
        "tokenizer": TOKENIZER,
        "max_new_tokens": 4,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        specdec.generate(model, **PROMPTS, **settings)


def test_an_interrupted_run_leaves_both_models_as_they_were(model, draft):
    class Interrupt(Scripted):
        def decide(self, steps, target):
            target.log_probs(steps)
            if steps[0].index == 2:
                raise KeyboardInterrupt
            return super().decide(steps, target)

    with pytest.raises(KeyboardInterrupt):
        routed(model, draft, Interrupt(alternating))
    check_writers(model, draft, routed(model, draft, Scripted(alternating)))


def test_seconds_and_tokens_of_steps(model, draft):
    out = routed(model, draft, Scripted(alternating))
    steps = out.stats.steps
    assert sum(step.num_tokens for step in steps) == out.stats.num_new_tokens == 4 * NUM_NEW
    assert all(step.seconds > 0 and step.num_tokens <= 11 for step in steps)
    assert all(step.num_discarded == 0 for step in steps if step.writer == "draft")
    assert any(step.num_discarded for step in steps if step.writer == "target")
    assert "steps by the target (lossy)" in str(out.stats)
