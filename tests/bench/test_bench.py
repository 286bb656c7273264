"""What `specdec bench` measures with: prompts, method names, verdicts, and the arithmetic of the report.

Its peers have `test_peers.py`, what it prints and draws `test_output.py`.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import specdec
import trees
from specdec import drafters
from specdec.bench.harness import BatchResult, Harness, Method, Settings
from specdec.bench.intervals import Timing, speedup_interval
from specdec.bench.methods import choose_methods
from specdec.bench.ranks import measure_ranks
from specdec.bench.report import mismatches, summarise, token_costs_ms
from specdec.bench.running import Run, without_padding
from specdec.errors import SpecdecError
from specdec.specs import AUTO, TRANSFORMERS, DrafterSpec, TreeSpec, choose_drafter
from specdec.suites import Prompt, load_suite, of_lengths
from specdec.testing.equality import TIE_BOUND, Comparison, Verdict, compare, compare_texts
from tests.support.references import with_noise

GREEDY = {"max_new_tokens": 12, "do_sample": False}
METHODS = [
    Method("transformers", None),
    Method("plain", drafters.Plain()),
    Method("prompt-lookup", drafters.PromptLookup()),
    Method("lookup tree", drafters.PromptLookup(min_match=1), trees.DySpec(8)),
]


@pytest.fixture(scope="module")
def model(tiny: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny)


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# Prompts


def test_builtin_suite_has_six_prompts_in_each_category() -> None:
    suite = load_suite()
    assert suite.categories == ["code", "edit", "summarise", "math", "chat"]
    for category in suite.categories:
        assert len({prompt.text for prompt in suite.select([category]).prompts}) == 6


def test_suite_reads_prompts_and_first_turns(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "mixed.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
        "",
        {"prompt": "a line\u2028separator", "category": "odd"},
        {"prompt": "no category"},
    )
    suite = load_suite(path)
    assert suite.name == "mixed.jsonl"
    assert suite.prompts == [
        Prompt(text="Compose a post.", category="writing"),
        Prompt(text="a line\u2028separator", category="odd"),
        Prompt(text="no category", category="prompts"),
    ]


def test_selection_groups_by_category_and_limits_each(tmp_path: Path) -> None:
    lines = [{"prompt": f"{category}{index}", "category": category} for index in range(3) for category in "ab"]
    suite = load_suite(write_lines(tmp_path / "two.jsonl", *lines))
    assert [prompt.text for prompt in suite.select(limit=2).prompts] == ["a0", "a1", "b0", "b1"]
    assert [prompt.text for prompt in suite.select(["b"]).prompts] == ["b0", "b1", "b2"]
    with pytest.raises(ValueError, match=r"unknown category 'c' in suite two.jsonl; it has: a, b"):
        suite.select(["c"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "unfinished', "line 2: Unterminated string"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"category": "a"}, "line 2: expected either 'prompt'"),
        ({"prompt": "a", "turns": ["b"]}, "line 2: expected either 'prompt'"),
        ({"prompt": " "}, "line 2: a prompt must be a non-empty string"),
        ({"prompt": 3}, "line 2: a prompt must be a non-empty string, got 3"),
        ({"turns": []}, "line 2: 'turns' must be a non-empty list"),
        ({"turns": "text"}, "line 2: 'turns' must be a non-empty list"),
        ({"prompt": "a", "category": 5}, "line 2: 'category' must be a non-empty string"),
        ({"prompt": "a", "category": "all"}, "line 2: the category name 'all' is taken"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"prompt": "good"}, line)
    with pytest.raises(ValueError, match=message):
        load_suite(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the prompts"):
        load_suite(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"):
        load_suite(write_lines(tmp_path / "empty.jsonl", ""))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the prompts"):
        load_suite(binary)


def test_prompts_of_a_length_are_cut_from_the_suite(tokenizer: PreTrainedTokenizerBase) -> None:
    suite = load_suite().select(["math"])
    texts = [prompt.text for prompt in suite.prompts]
    cut = of_lengths(suite, [5, 700], tokenizer, count=7)
    assert [(prompt.category, len(prompt.token_ids or ())) for prompt in cut.prompts] == [
        *[("5 tokens", 5)] * 7,
        *[("700 tokens", 700)] * 7,
    ]
    long = [tokenizer.decode(prompt.token_ids) for prompt in cut.prompts[7:]]
    assert long[0].startswith(f"{texts[0]}\n\n{texts[1]}")
    assert long[5].startswith(f"{texts[5]}\n\n{texts[0]}")
    assert long[6] == long[0]


# Method names


def test_names_become_drafters(model: PreTrainedModel) -> None:
    lookup = DrafterSpec.parse("prompt-lookup:num_tokens=8:min_match=3").build()
    assert isinstance(lookup, drafters.PromptLookup)
    assert (lookup.num_tokens, lookup.min_match) == (8, 3)
    assert isinstance(DrafterSpec.parse("plain").build(), drafters.Plain)
    assert isinstance(DrafterSpec.parse("small-model:num_tokens=3").build(model), drafters.SmallModel)
    mixed = DrafterSpec.parse("mixed:budget=12").build(model)
    assert isinstance(mixed, drafters.Mixed)
    assert mixed.budget == 12
    assert [type(drafter).__name__ for drafter in mixed.drafters] == ["PromptLookup", "SmallModel"]
    cascade = DrafterSpec.parse("cascade:num_tokens=6").build(model)
    assert isinstance(cascade, drafters.Cascade)
    assert (type(cascade.cheap).__name__, cascade.num_tokens) == ("PromptLookup", 6)
    assert DrafterSpec.parse("auto").build() == AUTO


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagle", "unknown method 'eagle'; choose from: auto, plain, prompt-lookup, small-model"),
        ("", "unknown method ''"),
        ("transformers", "unknown method 'transformers'"),
        ("plain:num_tokens=3", "plain has no parameter 'num_tokens'; it takes: none"),
        ("prompt-lookup:length=3", "it takes: num_tokens, min_match"),
        ("prompt-lookup:num_tokens", "num_tokens must be a whole number, got ''"),
        ("prompt-lookup:num_tokens=many", "num_tokens must be a whole number, got 'many'"),
    ],
)
def test_wrong_names_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrafterSpec.parse(name)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("chain:7", trees.Chain(7)),
        ("fixed:4x2x1", trees.Fixed((4, 2, 1))),
        ("dyspec", trees.DySpec()),
        ("dyspec:32", trees.DySpec(32)),
        ("dyspec:budget=32,max_depth=8", trees.DySpec(32, max_depth=8)),
        ("dyspec:32,shared=true", trees.DySpec(32, shared=True)),
        ("dyspec-threshold:16,threshold=0.1", trees.DySpecThreshold(0.1, max_nodes=16)),
    ],
)
def test_names_become_trees(name: str, policy: trees.GrowthPolicy) -> None:
    assert TreeSpec.parse(name).build() == policy


def test_sequoia_gets_what_was_measured() -> None:
    assert TreeSpec.parse("sequoia:8").build(acceptance=(0.5, 0.25)) == trees.Sequoia(8, (0.5, 0.25))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bush", "unknown tree 'bush'; choose from: chain, fixed, sequoia, dyspec, dyspec-threshold"),
        ("", "unknown tree ''"),
        ("fixed", r"fixed needs its branching, whole numbers joined by x \(4x2x1\): fixed:branching=..."),
        ("sequoia", "sequoia needs its budget, a whole number"),
        ("fixed:4x", "branching must be whole numbers joined by x"),
        ("dyspec:many", "dyspec: budget must be a whole number, got 'many'"),
        ("dyspec:32,8", "dyspec has no parameter '8'; it takes: budget, max_depth, shared"),
        ("dyspec:shared=yes", "shared must be true or false, got 'yes'"),
        ("sequoia:8,acceptance=0.5", "sequoia has no parameter 'acceptance'; it takes: budget"),
    ],
)
def test_wrong_trees_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeSpec.parse(name)


def test_trees_are_drafted_by_every_method_that_takes_them() -> None:
    names = "prompt-lookup,small-model:num_tokens=3,auto"
    methods = choose_methods(names, reference=TRANSFORMERS, draft="some/model", trees=["dyspec:8", "sequoia:8"])
    assert list(methods) == [
        "transformers",
        "plain",
        "prompt-lookup dyspec:8",
        "small-model:num_tokens=3 dyspec:8",
        "small-model:num_tokens=3 sequoia:8",
        "auto",
    ]
    assert methods["auto"].tree is None
    assert methods["prompt-lookup dyspec:8"].tree == TreeSpec.parse("dyspec:8")
    with pytest.raises(ValueError, match="no method takes the tree sequoia:8: ask for small-model or "):
        choose_methods("prompt-lookup", reference="plain", draft=None, trees=["dyspec:8", "sequoia:8"])


def test_the_draft_decides_the_default() -> None:
    assert choose_drafter(None, None).kind == AUTO
    assert choose_drafter(None, "some/model").kind == AUTO
    assert choose_drafter(None, "some/model", "dyspec:8").kind == "small-model"
    with pytest.raises(ValueError, match="give it with --draft"):
        choose_drafter("small-model", None)
    with pytest.raises(ValueError, match="--draft is for auto, small-model"):
        choose_drafter("plain", "some/model")


def test_reference_and_plain_always_run_first() -> None:
    default = choose_methods(None, reference=TRANSFORMERS, draft="some/model")
    assert list(default) == ["transformers", "plain", "prompt-lookup", "small-model", "auto"]
    assert default["transformers"].drafter is None
    assert list(choose_methods("auto, plain,auto", reference="plain", draft=None)) == ["plain", "auto"]
    with pytest.raises(ValueError, match="choose from: transformers, auto"):
        choose_methods("eagle", reference="plain", draft=None)


# Verdicts


def test_padding_ends_a_row_only_if_nothing_else_follows() -> None:
    assert without_padding([5, 6, 2, 0, 0], eos_ids=[2], pad_id=0) == [5, 6, 2]
    assert without_padding([5, 2, 2, 2], eos_ids=[2, 3], pad_id=2) == [5, 2]
    assert without_padding([5, 2, 7, 0], eos_ids=[2], pad_id=0) == [5, 2, 7, 0]
    assert without_padding([5, 6], eos_ids=[], pad_id=None) == [5, 6]


def test_verdicts(model: PreTrainedModel) -> None:
    prompt_ids = torch.tensor([40, 41, 42])
    best, *rest = greedy = model.generate(prompt_ids[None], **GREEDY)[0, 3:].tolist()
    twin = (best + 1) % 250

    def verdict(output: list[int]) -> Comparison:
        return compare(model, prompt_ids, greedy, output, GREEDY)

    assert verdict(greedy).verdict is Verdict.IDENTICAL
    different = verdict([twin, *rest])
    assert different.verdict is Verdict.DIFFERENT
    assert different.position == 0
    assert different.logit_gap > TIE_BOUND[torch.float32]
    shorter = verdict(greedy[:-1])
    assert shorter == Comparison(verdict=Verdict.DIFFERENT, position=len(greedy) - 1)


def test_equal_logits_are_a_tie_and_a_third_token_is_not(tiny: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    prompt_ids = torch.tensor([40, 41, 42])
    best = model.generate(prompt_ids[None], **GREEDY)[0, 3].item()
    twin, third = (best + 1) % 250, (best + 2) % 250
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[best]
    assert compare(model, prompt_ids, [best], [twin], GREEDY).verdict is Verdict.TIE
    assert compare(model, prompt_ids, [best], [third], GREEDY).verdict is Verdict.DIFFERENT


def test_gap_is_measured_after_the_processors(model: PreTrainedModel) -> None:
    prompt_ids = torch.tensor([40, 41, 42])
    best = model.generate(prompt_ids[None], **GREEDY)[0, 3].item()
    banned = GREEDY | {"suppress_tokens": [best]}
    assert compare(model, prompt_ids, [best], [best - 1], banned).logit_gap == float("inf")


def test_texts_are_compared_where_there_are_no_logits() -> None:
    assert compare_texts("abc", "abc").verdict is Verdict.IDENTICAL
    assert str(compare_texts("abcd", "abx")) == "another text from character 2 on"
    assert compare_texts("abc", "ab") == Comparison(verdict=Verdict.DIFFERENT, position=2, is_text=True)


# Measuring


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    methods: list[Method] = METHODS,
    **settings: object,
) -> list[BatchResult]:
    measure = Harness(model, tokenizer, methods, Settings(max_new_tokens=12, **settings))
    calls: list[None] = []
    results = list(measure.run(prompts, on_call=lambda call: call.is_over and calls.append(None)))
    assert len(calls) == measure.num_calls(prompts)
    return results


PROMPTS = [
    Prompt(text="to be or not to be or not to", category="repeat"),
    Prompt(text="one", category="repeat"),
    Prompt(text="a much longer prompt than the others", category="repeat"),
    Prompt(text="1 + 1 =", category="math"),
]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_method_says_the_same(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    results = run_harness(model, tokenizer, PROMPTS, batch_size=batch_size, repetitions=2)
    assert [len(result.prompts) for result in results] == ([1, 1, 1, 1] if batch_size == 1 else [2, 1, 1])
    assert not list(mismatches(results))
    for result in results:
        assert list(result.runs) == [method.name for method in METHODS]
        for runs in result.runs.values():
            assert len(runs) == 2
            assert all(run.num_tokens == sum(map(len, run.tokens)) for run in runs)
            assert all(run.token_seconds == sorted(run.token_seconds) for run in runs)
            assert all(0 < run.token_seconds[0] <= run.token_seconds[-1] <= run.seconds for run in runs)


def test_repetitions_are_interleaved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    original = Harness._run
    monkeypatch.setattr(
        Harness, "_run", lambda self, method, inputs: (order.append(method.name), original(self, method, inputs))[1]
    )
    run_harness(model, tokenizer, PROMPTS[:1], repetitions=2, warmup=1)
    names = [method.name for method in METHODS]
    assert order == [*names, *names, *names[1:], names[0]]  # the first one changes, so that neighbours do


def test_sampling_repeats_itself_and_is_not_compared(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    (result,) = run_harness(model, tokenizer, PROMPTS[:1], sample=True, temperature=0.9, seed=3, repetitions=2)
    assert result.comparisons == {}
    for runs in result.runs.values():
        assert runs[0].tokens == runs[1].tokens
    assert {(report.identical_to_plain, report.ties) for report in summarise([result])} == {(None, None)}


def test_wrong_output_is_a_mismatch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = specdec.generate

    def generate_wrongly(*args: object, drafter: object, **kwargs: object) -> object:
        out = generate(*args, drafter=drafter, **kwargs)
        if isinstance(drafter, drafters.PromptLookup):
            out.sequences[:, -1] = (out.sequences[:, -1] + 1) % 250
        return out

    monkeypatch.setattr(specdec, "generate", generate_wrongly, raising=False)
    results = run_harness(model, tokenizer, PROMPTS[:1], METHODS[:3], repetitions=1)
    (line,) = mismatches(results)
    assert "prompt-lookup differs from transformers on repeat prompt 'to be or not" in line
    assert "logit gap" in line
    identical = {(report.name, report.category): report.identical_to_plain for report in summarise(results)}
    assert identical == {
        (name, category): name != "prompt-lookup"
        for name in ("transformers", "plain", "prompt-lookup")
        for category in ("repeat", "all")
    }


def test_failing_method_fails_the_run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    methods = [*METHODS, Method("broken", object())]
    with pytest.raises(SpecdecError, match=r"broken failed on the prompt 'to be or not"):
        run_harness(model, tokenizer, PROMPTS, methods)


def test_prompt_that_does_not_fit_is_found_before_anything_runs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [*PROMPTS, Prompt(text="x" * 300, category="long")]
    with pytest.raises(ValueError, match=r"'x+' \(long\) has 3\d\d tokens; with 12 new ones"):
        run_harness(model, tokenizer, prompts, methods=[Method("broken", object())])


def test_ranks_are_measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that drafts for itself is right at once; a relative often, and sometimes with a later guess."""
    settings = Settings(max_new_tokens=12)
    itself = measure_ranks(model, tokenizer, drafters.SmallModel(model), PROMPTS[:2], settings)
    assert itself == (1.0,)
    relative = drafters.SmallModel(with_noise(model))
    found = measure_ranks(model, tokenizer, relative, PROMPTS[:2], settings)
    assert 0.3 < found[0] < 1
    assert 0 < sum(found[1:]) <= 1 - found[0]
    with pytest.raises(ValueError, match="allow more new tokens"):
        measure_ranks(model, tokenizer, relative, PROMPTS[:2], Settings(max_new_tokens=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetitions": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"warmup": -1},
        {"temperature": 0.5},
        {"verify": "traversal"},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


# The report


def make_run(seconds: float, num_tokens: int, stats: specdec.DecodingStats | None = None) -> Run:
    return Run(
        seconds=seconds,
        tokens=[[7] * num_tokens],
        token_seconds=[0.5 * seconds] * num_tokens,
        stats=stats,
        peak_memory_mib=100 * seconds,
    )


def test_speed_is_tokens_over_the_sum_of_medians() -> None:
    stats = specdec.DecodingStats(
        num_rounds=5,
        num_batch_rounds=5,
        num_drafted=20,
        num_levels=15,
        num_accepted=10,
        num_committed=15,
        num_new_tokens=16,
        target_forwards=8,
        draft_forwards=10,
        accepted_histogram=Counter({0: 1, 3: 2, 2: 2}),
    )
    results = [
        BatchResult(
            prompts=[Prompt(text="a", category=category)],
            runs={
                "plain": [make_run(seconds, 10) for seconds in plain_seconds],
                "fast": [make_run(seconds, 10, stats) for seconds in fast_seconds],
            },
            comparisons={},
        )
        for category, plain_seconds, fast_seconds in (
            ("x", (4.0, 9.0, 4.0), (2.0, 2.0, 7.0)),
            ("y", (2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
        )
    ]
    reports = {(report.name, report.category): report for report in summarise(results)}
    assert list(reports) == [(name, category) for category in ("x", "y", "all") for name in ("plain", "fast")]
    total = reports["fast", "all"]
    assert total.tokens_per_second == pytest.approx(20 / 3)
    assert total.tokens_per_second_mean == pytest.approx((20 / 3 + 20 / 3 + 20 / 8) / 3)
    assert total.tokens_per_second_std == pytest.approx(np.std([20 / 3, 20 / 3, 20 / 8], ddof=1))
    assert total.speedup_vs_plain == pytest.approx(2.0)
    low, high = total.speedup_interval
    assert 4 / 7 < low < 2 <= high <= 9 / 2
    assert reports["plain", "all"].speedup_interval is None
    assert total.accepted_histogram == [6, 0, 12, 12]
    assert total.acceptance_per_position == pytest.approx([0.8, 0.8, 0.4])
    assert (total.tokens_per_round, total.acceptance_rate) == (3.0, 0.5)
    assert (total.mean_depth, total.mean_size) == (3.0, 4.0)
    assert (total.draft_forwards_per_round, total.tokens_per_target_forward) == (2.0, 2.0)
    assert (total.num_prompts, total.num_tokens) == (2, 20)
    assert total.peak_memory_mib == 700
    assert total.ttft_ms == pytest.approx(750)
    assert total.ms_per_token == {"p50": None, "p90": None, "p99": None}
    assert reports["plain", "x"].tokens_per_round is None


def test_time_between_commits_is_shared_by_their_tokens() -> None:
    assert token_costs_ms([1.0, 2.0, 2.0, 5.0]) == [500.0, 500.0, 3000.0]
    assert token_costs_ms([1.0]) == []


def timing(seconds: list[float], plain_seconds: list[float], stratum: str = "x") -> Timing:
    return Timing(stratum=stratum, seconds=seconds, num_tokens=10, plain_seconds=plain_seconds, num_plain_tokens=10)


def test_nothing_to_resample_has_no_interval() -> None:
    assert speedup_interval([timing([1.0], [2.0])]) is None
    assert speedup_interval([timing([1.0, 1.0], [2.0, 2.0])]) == (2.0, 2.0)
    assert speedup_interval([timing([1.0], [2.0]), timing([3.0], [6.0])]) == (2.0, 2.0)


def test_repetitions_of_both_sides_are_drawn_together() -> None:
    """A turn in which the machine was three times slower leaves the ratio as it is."""
    assert speedup_interval([timing([1.0, 3.0, 1.0, 3.0], [2.0, 6.0, 2.0, 6.0])]) == pytest.approx((2.0, 2.0))


def test_categories_are_not_drawn_against_each_other() -> None:
    """One prompt each: neither can take the other's place, and nothing is left to chance."""
    fast, slow = timing([1.0], [9.0], "fast"), timing([5.0], [5.0], "slow")
    assert speedup_interval([fast, slow]) == pytest.approx((14 / 6, 14 / 6))


def test_intervals_hold_the_truth() -> None:
    """12 prompts with a speed-up of 2 in the mean, 100 times. At a coverage of 0.90 or more (a percentile interval of
    few prompts is a little narrow) fewer than 78 hits have a probability below 0.001."""
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(100):
        plain = generator.lognormal(sigma=0.1, size=(12, 3))
        ours = plain.mean() / 2 * generator.lognormal(-(0.1**2) / 2, sigma=0.1, size=(12, 3))
        low, high = speedup_interval([timing(list(a), list(b)) for a, b in zip(ours, plain, strict=True)])
        hits += low <= 2 <= high
    assert hits >= 78
    assert high - low < 0.5
