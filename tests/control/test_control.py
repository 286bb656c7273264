"""Costs, acceptance, worth: what rounds are chosen by, without a model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.control import (
    AcceptanceMemory,
    AcceptanceModel,
    ForwardCosts,
    Plan,
    RoundAverages,
    RoundControl,
    RunAverages,
    RunHistory,
    StepSeconds,
    prior_averages,
)
from specdec.control import costs as costs_module
from specdec.control.costs import costs_of, measure_forwards
from specdec.control.estimates import monotone
from specdec.control.rounds import UNKNOWN_PRIORS, Probes, Throughput
from specdec.testing import tiny_model

PLAIN = Plan(source=None, length=0, tokens=1.0, seconds=1.0)


def plan(tokens: float, seconds: float, source: int = 1) -> Plan:
    return Plan(source=source, length=4, tokens=tokens, seconds=seconds)


class TestForwardCosts:
    def test_between_and_past_what_was_measured(self) -> None:
        costs = ForwardCosts({1: 1.0, 4: 1.6, 8: 2.0})
        assert [costs.seconds(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.2, 1.6, 1.8, 2.0, 2.4])

    def test_a_disturbed_measurement_is_not_believed(self) -> None:
        assert ForwardCosts({1: 5.0, 2: 1.0, 4: 2.0}).seconds(1) == 1.0

    def test_one_measurement_stands_for_all(self) -> None:
        costs = ForwardCosts({4: 3.0})
        assert costs.seconds(1) == costs.seconds(64) == 3.0

    def test_it_follows_a_slower_machine_within_ten_rounds_and_back(self) -> None:
        costs = ForwardCosts({1: 1.0, 8: 2.0})
        for factor in (3.0, 1.0):
            for _ in range(10):
                costs.update(1, factor)
            assert costs.seconds(1) == pytest.approx(factor)
            assert costs.seconds(8) == pytest.approx(2 * factor), "the machine changed, so do all forwards"

    def test_a_single_slow_round_changes_nothing(self) -> None:
        costs = ForwardCosts({1: 1.0})
        for seconds in (50.0, 1.0, 1.0, 50.0, 1.0, 1.0):
            costs.update(1, seconds)
            assert costs.seconds(1) == pytest.approx(1.0)

    def test_a_width_that_is_dearer_than_measured_is_corrected_alone(self) -> None:
        costs = ForwardCosts({1: 1.0, 8: 2.0})
        for _ in range(20):
            costs.update(1, 1.0)
            costs.update(8, 4.0)
        assert costs.seconds(1) == pytest.approx(1.0, rel=0.1)
        assert costs.seconds(8) == pytest.approx(4.0, rel=0.1)

    def test_a_round_takes_no_longer_than_wider_ones_have_taken(self) -> None:
        costs = ForwardCosts({1: 1.0, 2: 1.0, 4: 3.0, 8: 3.1})
        for _ in range(5):
            costs.update(1, 1.0)
            costs.update(8, 1.24)
        assert costs.seconds(4) == pytest.approx(1.24)
        assert costs.seconds(2) == pytest.approx(1.0)
        assert costs.seconds(16) > 3.1, "nothing is known of wider ones"

    def test_measured_once_for_a_model_and_corrected_by_batch_size(self) -> None:
        model = tiny_model("llama")
        costs = costs_of(model)
        assert costs is costs_of(model)
        assert costs_of(model, 4) is not costs
        assert costs_of(model, 3) is costs_of(model, 4)
        assert costs.seconds(1) > 0

    def test_a_longer_past_adds_what_each_slot_of_it_adds(self) -> None:
        asked = []
        costs = ForwardCosts({1: 1.0, 8: 2.0}, slopes=lambda: asked.append(1) or {1: 0.001, 8: 0.002})
        assert costs.at(100) is costs
        assert not asked, "short runs need not know"
        longer = costs.at(2032)
        assert [longer.seconds(width) for width in (1, 8)] == pytest.approx([3.0, 6.0])
        assert longer.at(4032).seconds(1) == pytest.approx(5.0)
        assert longer.seconds(1) == pytest.approx(3.0)
        assert costs.seconds(1) == pytest.approx(1.0)
        assert costs.at(4032).seconds(1) == pytest.approx(5.0)
        assert longer.at(100) is costs
        assert len(asked) == 1

    def test_rounds_of_any_length_correct_the_costs_of_all(self) -> None:
        costs = ForwardCosts({1: 1.0, 8: 2.0}, slopes=lambda: {1: 0.001, 8: 0.002})
        for _ in range(20):
            costs.at(2032).update(1, 6.0)
            costs.at(4032).update(8, 40.0)
        assert costs.at(3032).seconds(1) == pytest.approx(2 * 4.0)
        assert costs.seconds(8) == pytest.approx(2 * 2 * 2.0)

    def test_forwards_with_a_long_past_are_timed_without_reading_it(self) -> None:
        for model in (
            tiny_model("gemma2", max_position_embeddings=4096),
            tiny_model("gpt2", max_position_embeddings=2400),
        ):
            assert set(measure_forwards(model, context=2048)) == {1, 2, 4, 8, 16, 32, 64}
            wanted = costs_of(model)
            assert wanted.at(2200).measured(8) > 0
            assert wanted.at(2200) is not wanted
        short = costs_of(tiny_model("gpt2", max_position_embeddings=256))
        assert short.at(2200) is short

    def test_a_slow_model_is_timed_at_both_ends_of_what_rounds_are_made_of(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter(0.3 * step for step in range(1000))
        monkeypatch.setattr(costs_module, "perf_counter", lambda: next(clock))
        assert set(measure_forwards(tiny_model("llama"), time_limit_s=1.0)) == {1, 8, 16}

    def test_measuring_stops_at_its_time_limit(self) -> None:
        assert set(measure_forwards(tiny_model("llama"), time_limit_s=0.0)) == {1, 8, 16}

    def test_a_model_that_is_loaded_for_every_forward_is_timed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(6.0 * step for step in range(1000))
        monkeypatch.setattr(costs_module, "perf_counter", lambda: next(clock))
        assert set(measure_forwards(tiny_model("llama"))) == {1}

    def test_forwards_of_several_tokens_read_the_experts_of_several_tokens(self) -> None:
        """Of equal tokens all would go to the same two experts, and a round would cost more than was measured."""
        model = tiny_model("mixtral", num_local_experts=16, num_experts_per_tok=2)
        num_read: dict[int, int] = {}

        def count(router: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            num_read[len(outputs[2])] = len(outputs[2].unique())

        with model.model.layers[0].mlp.gate.register_forward_hook(count):
            measure_forwards(model)
        assert num_read[1] == 2
        assert num_read[2] > 2
        assert num_read[8] >= 8
        assert num_read[64] >= 12

    def test_a_source_that_is_known_to_agree_is_believed_to(self) -> None:
        assert prior_averages(0.0) is UNKNOWN_PRIORS
        (run,) = prior_averages(0.5)
        assert run.tokens == pytest.approx(2, abs=0.01)
        memory = AcceptanceMemory(prior_acceptance=0.9)
        assert AcceptanceModel(memory).chance(0.05) == pytest.approx(0.905)
        model = AcceptanceModel(memory)
        for _ in range(40):
            model.update(0.05, False)
        assert model.chance(0.05) < 0.1, "until it shows that it does not"


class TestStepSeconds:
    def test_steps_are_told_from_the_first(self) -> None:
        steps = StepSeconds()
        assert steps.expected(3.0) == 3.0
        for num_steps, seconds in ((1, 5.0), (1, 5.0), (1, 90.0), (1, 5.0), (3, 9.0), (2, 7.0), (4, 70.0), (5, 13.0)):
            steps.update(num_steps, seconds)
        assert steps.expected(3.0) == pytest.approx(2.0)

    def test_they_are_not_dearer_than_all_on_average_nor_much_cheaper(self) -> None:
        for seconds, expected in ((12.0, 3.0), (1.0, 0.75)):
            steps = StepSeconds()
            for num_steps in (1, 1, 1, 2, 2, 2):
                steps.update(num_steps, seconds if num_steps > 1 else 1.0)
            assert steps.expected(3.0) == expected


class TestAcceptance:
    def test_confidence_is_taken_at_its_word_until_seen(self) -> None:
        model = AcceptanceModel(AcceptanceMemory())
        assert model.chance(0.05) == pytest.approx(0.05)
        assert model.chance(0.99) == pytest.approx(0.99)

    def test_an_overconfident_drafter_is_found_out(self) -> None:
        model = AcceptanceModel(AcceptanceMemory())
        for _ in range(10):
            model.update(0.99, False)
        assert model.chance(0.99) < 0.3
        assert model.chance(0.85) < 0.3, "and does not believe it elsewhere either"

    def test_what_one_run_has_shown_is_where_the_next_begins(self) -> None:
        memory = AcceptanceMemory()
        first = AcceptanceModel(memory)
        for _ in range(200):
            first.update(0.55, True)
        assert AcceptanceModel(memory).chance(0.55) > 0.9

    def test_only_tested_tokens_count(self) -> None:
        memory = AcceptanceMemory()
        AcceptanceModel(memory).update_chain([0.95, 0.65, 0.35, 0.15], 1)
        assert sum(memory.seen) == 2
        assert sum(memory.accepted) == 1

    def test_reaches_are_products(self) -> None:
        model = AcceptanceModel(AcceptanceMemory())
        assert model.reaches([0.55, 0.55, 0.05]) == pytest.approx([0.55, 0.55**2, 0.55**2 * 0.05])

    def test_reaches_end_with_the_first_that_is_too_little(self) -> None:
        model = AcceptanceModel(AcceptanceMemory())
        all_of_them = model.reaches([0.55] * 8)
        assert model.reaches([0.55] * 8, least=all_of_them[2]) == all_of_them[:4]
        assert model.reaches([0.55] * 8, least=1.1) == all_of_them[:1]

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1.0, 2.0, 3.0])), min_size=1, max_size=4))
    def test_monotone_is_the_closest_non_falling_sequence(self, pairs: list[tuple[int, float]]) -> None:
        values, weights = zip(*pairs, strict=True)

        def distance(candidate: tuple[float, ...]) -> float:
            return sum(w * (c - v) ** 2 for c, v, w in zip(candidate, values, weights, strict=True))

        found = monotone([float(value) for value in values], weights)
        assert found == sorted(found)
        grid = [step / 2 for step in range(11)]
        rivals = (rival for rival in product(grid, repeat=len(values)) if list(rival) == sorted(rival))
        assert distance(tuple(found)) <= min(map(distance, rivals)) + 1e-9


class TestRounds:
    def test_the_pace_is_never_below_plain_decoding(self) -> None:
        throughput = Throughput()
        throughput.update(1, 100.0)
        assert throughput.now(PLAIN) == 1.0
        for _ in range(50):
            throughput.update(4, 2.0)
        assert throughput.now(PLAIN) == pytest.approx(2.0, rel=0.2)

    def test_a_long_round_that_brings_more_in_the_long_run_beats_a_short_one_of_better_ratio(self) -> None:
        assert plan(5.0, 2.6).worth(1.0) > plan(2.0, 1.0).worth(1.0)

    def test_after_a_burst_the_quickest_plan_is_taken_not_the_shortest(self) -> None:
        control = RoundControl()
        burst, good = plan(24.0, 2.0), plan(3.0, 2.0)
        for _ in range(5):
            control.update(burst, 24, 2.0)
        assert control.throughput.now(PLAIN) > 3
        assert control.choose(PLAIN, [good]) is good

    def test_plain_decoding_where_nothing_else_is_worth_it(self) -> None:
        control = RoundControl()
        assert control.choose(PLAIN, [plan(1.5, 1.6)]) is PLAIN
        good = plan(1.7, 1.6)
        assert control.choose(PLAIN, [good]) is good

    def test_a_round_that_another_program_held_up_is_no_loss_of_that_size(self) -> None:
        control, good = RoundControl(), plan(3.0, 1.0)
        control.update(good, 1, 1000.0)
        assert control.choose(PLAIN, [good]) is good

    def test_probes_are_rarer_the_more_fail(self) -> None:
        probes, waits = Probes(), []
        for _ in range(4):
            count = 0
            while not probes.is_due:
                probes.passed_over()
                count += 1
            waits.append(count)
            probes.chosen(as_probe=True)
        assert waits == [8, 16, 32, 64]
        probes.chosen(as_probe=False)
        assert sum(1 for _ in iter(lambda: probes.is_due or probes.passed_over(), True)) == 8

    def test_probes_cost_at_most_their_share(self) -> None:
        control, bad = RoundControl(), plan(1.0, 1.5)
        lost = elapsed = 0.0
        for _ in range(5000):
            chosen = control.choose(PLAIN, [bad], [bad])
            control.update(chosen, 1, chosen.seconds)
            elapsed += chosen.seconds
            lost += chosen.seconds - 1.0
        assert 0 < lost <= 0.01 * elapsed + 0.5


class TestYields:
    def test_a_run_moves_from_what_is_remembered_to_what_it_sees(self) -> None:
        memory = RunHistory()
        average = RunAverages(memory)
        assert average.now == memory.mean
        for _ in range(60):
            average.update(4.0, 5.0, 5.0)
        assert average.now.tokens == pytest.approx(4.0, rel=0.15)

    def test_finished_runs_are_remembered_idle_ones_are_not(self) -> None:
        memory = RunHistory()
        known = len(memory.runs)
        RunAverages(memory).close()
        assert len(memory.runs) == known
        average = RunAverages(memory)
        average.update(4.0, 5.0, 5.0)
        average.close()
        assert isinstance(memory.runs[-1], RoundAverages)
        assert len(memory.runs) == known + 1
