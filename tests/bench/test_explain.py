"""`specdec bench --explain`: what was chosen, and what was expected of it."""

from collections import defaultdict

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import drafters
from specdec.bench.explain import NOBODY, explain, to_grid
from specdec.bench.harness import Harness, Method, Settings
from specdec.suites import Prompt
from tests.support.references import with_noise

PROMPTS = [Prompt(text="to be or not to be or not to", category="repeat"), Prompt(text="1 + 1 =", category="math")]


def test_every_round_is_explained_once(tiny: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    methods = [
        Method("plain", drafters.Plain()),
        Method("auto", drafters.Auto(drafters.SmallModel(with_noise(model)))),
        Method("lookup", drafters.PromptLookup()),
    ]
    harness = Harness(model, tokenizer, methods, Settings(max_new_tokens=24, repetitions=2, warmup=0))
    results = list(harness.run(PROMPTS))
    explanations = explain(results)
    assert {each.method for each in explanations} == {"auto"}
    assert {each.drafter for each in explanations} <= {NOBODY, "PromptLookup", "SmallModel"}
    by_category = defaultdict(list)
    for each in explanations:
        by_category[each.category].append(each)
    assert set(by_category) == {"repeat", "math"}
    for result in results:
        parts, runs = by_category[result.category], result.runs["auto"]
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert sum(part.num_rounds for part in parts) == sum(run.stats.num_rounds for run in runs)
        committed = sum(part.committed * part.num_rounds for part in parts)
        assert committed == pytest.approx(sum(run.stats.num_committed for run in runs))
        assert all(part.predicted > 0 and part.actual > 0 and part.plain > 0 for part in parts)
    (rows,) = to_grid(explanations).sections
    assert len(rows) == len(explanations)
