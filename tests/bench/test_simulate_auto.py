"""The simulator of `Auto`: traces come back as they were saved, and its seconds are those of the real control."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from bench.auto_ablations import ABLATIONS, without
from bench.auto_clock import Noise
from bench.auto_replay import Machine, renumbered
from bench.auto_traces import DEPTH, RANKS, Trace, load_traces, propose_everywhere, read_answer, save
from bench.simulate_auto import MACHINES, TRACES, parse_args, simulate
from specdec.testing import tiny_model

SILENT = Noise(sigma=0.0, slow_share=0.0)
TARGET = {1: 10.0, 8: 13.0, 16: 18.0, 64: 60.0}
DRAFT = {1: 2.0, 64: 20.0}


def trace(seed: int, *, accuracy: float, length: int = 60) -> Trace:
    """A text without repetitions, and a draft that is right so often and says so."""
    random = Random(seed)
    text = [1000 * (seed + 1) + position for position in range(20 + length)]
    prompt, answer = text[:20], text[20:]
    tokens_ADK, probs_ADK = np.full((length, DEPTH, RANKS), 7, np.int32), np.zeros((length, DEPTH, RANKS))
    for position in range(1, length):
        for depth in range(min(DEPTH, length - position)):
            tokens_ADK[position, depth, 0] = answer[position + depth] if random.random() < accuracy else 7
            probs_ADK[position, depth, 0] = accuracy
    return Trace(
        category=f"category {seed % 2}",
        prompt=prompt,
        answer=answer,
        draft_tokens_ADK=tokens_ADK,
        draft_probs_ADK=probs_ADK,
        copy_tokens_A=np.array(answer, np.int32),
        copy_probs_A=np.full(length, 0.9),
    )


def traces(accuracy: float) -> list[Trace]:
    return [trace(seed, accuracy=accuracy) for seed in range(6)]


def test_traces_come_back_as_they_were(tmp_path: Path) -> None:
    saved = [trace(0, accuracy=0.5), Trace(category="bare", prompt=[1], answer=[2, 3])]
    save(tmp_path / "some.npz", saved)
    found, bare = load_traces(tmp_path / "some.npz")
    assert (found.category, found.prompt, found.answer) == (saved[0].category, saved[0].prompt, saved[0].answer)
    assert np.array_equal(found.draft_tokens_ADK, saved[0].draft_tokens_ADK)
    assert np.allclose(found.copy_probs_A, saved[0].copy_probs_A, atol=1e-4)
    assert bare == saved[1]


def test_chains_are_what_the_draft_says_step_by_step() -> None:
    model = tiny_model("llama")
    prompt, answer = [5, 6, 7, 8], [9, 30, 31, 32, 33]
    tokens_ADK, probs_ADK = propose_everywhere(model, prompt, answer)
    for position in range(1, len(answer)):
        text = [*prompt, *answer[:position]]
        depth = int((probs_ADK[position, :, 0] > 0).sum())
        assert depth, "every position has a proposal"
        expected = model.generate(torch.tensor([text]), max_new_tokens=depth, min_new_tokens=depth, do_sample=False)
        assert tokens_ADK[position, :depth, 0].tolist() == expected[0, len(text) :].tolist()
    said_A, _ = read_answer(model, prompt, answer)
    assert said_A[1:].tolist() == tokens_ADK[1:, 0, 0].tolist()


@pytest.mark.parametrize(
    "machine",
    [
        Machine(traces="", target=TARGET, draft=DRAFT),
        Machine(traces="", target=TARGET, draft=DRAFT, rows=2),
        Machine(traces="", target={1: 40.0, 64: 400.0}, copy=TARGET, draft=DRAFT),
    ],
    ids=["alone", "in a batch", "under a copy"],
)
def test_a_good_draft_is_used_and_pays(machine: Machine) -> None:
    result = simulate(machine, traces(0.97), SILENT, seed=0)
    assert result.mean > 1.5
    assert result.sources["Draft"] + result.sources["Cascade"] > 0.8 * result.sources.total()
    assert 0 < result.slowest <= result.slowest_category <= result.mean


@pytest.mark.parametrize(("machine", "least"), [("demo-avx2-packed-4", 0.985), ("demo-avx512-packed-4", 1.06)])
def test_rows_that_copy_do_not_slow_down_their_neighbours(machine: str, least: float) -> None:
    """By the sum of tokens their long drafts were worth it; batches then took 1.03 and 0.96 times as long as plain."""
    recorded = load_traces(TRACES / "demo.npz")
    assert simulate(MACHINES[machine], recorded, SILENT, seed=0).mean > least


def test_an_overconfident_draft_costs_little() -> None:
    machine = Machine(traces="", target=TARGET, draft=DRAFT, wrong_until=1.0)
    assert simulate(machine, traces(0.97), SILENT, seed=0).mean > 0.94


def test_a_seed_says_everything() -> None:
    machine, noise = Machine(traces="", target=TARGET, draft=DRAFT), Noise(sigma=0.2, slow_share=0.1, switch_share=0.1)
    first, again, other = (simulate(machine, traces(0.7), noise, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_small_numbers_for_the_same_texts() -> None:
    before = traces(0.9)
    after, size = renumbered(before)
    numbers = dict(zip(before[0].prompt, after[0].prompt, strict=True))
    assert len(numbers) == 20
    assert 0 < min(after[0].prompt) <= max(after[-1].answer) < size < 600


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_finds_what_it_replaces_and_puts_it_back(name: str) -> None:
    replacements = ABLATIONS[name]
    before = [getattr(owner, attribute) for owner, attribute, _ in replacements]
    with without([name]):
        assert all(
            getattr(owner, attribute) is not old
            for (owner, attribute, _), old in zip(replacements, before, strict=True)
        )
        simulate(Machine(traces="", target=TARGET, draft=DRAFT), traces(0.8)[:2], SILENT, seed=0)
    assert [getattr(owner, attribute) for owner, attribute, _ in replacements] == before


def test_what_the_command_takes() -> None:
    args = parse_args(["run", "--without", "trials", "leaves", "--machine", "liar"])
    assert (args.without, args.machine, args.noise) == (["trials", "leaves"], ["liar"], ["quiet"])
    with pytest.raises(SystemExit):
        parse_args(["run", "--without", "everything"])
