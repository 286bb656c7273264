"""What a run says about itself adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec.decoding.stats import DecodingStats
from specdec.drafters import Drafter, DraftSession, Plain, PromptLookup, Run, SmallModel
from specdec.testing import ScriptedDrafter, tiny_model
from trees import ROOT, Chain, Draft, Fixed, GrowthPolicy, TokenTree, TreeBatch

PROMPT = torch.tensor([list(b"count me in, count me")])
PROMPTS = torch.tensor([list(b"one two one"), [0, 0, 0, *b"two one!"], [0] * 7 + [*b"four"]])
NUM_NEW = 25
GREEDY = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=11)


def drafters(model: PreTrainedModel) -> dict[str, Drafter]:
    return {
        "target": SmallModel(model, num_tokens=4),
        "other model": SmallModel(tiny_model("llama", seed=12), num_tokens=3),
        "PromptLookup": PromptLookup(min_match=1),
        "Plain": Plain(),
    }


def assert_adds_up(stats: DecodingStats, num_rows: int) -> None:
    assert stats.num_new_tokens == stats.num_committed + num_rows, "the prefill yields a token of every row"
    assert stats.accepted_histogram.total() == stats.num_rounds
    assert sum(count * rounds for count, rounds in stats.accepted_histogram.items()) == stats.num_accepted
    assert stats.num_accepted <= stats.num_levels <= stats.num_drafted
    assert len(stats.row_rounds) == len(stats.row_committed) == num_rows
    assert sum(stats.row_rounds) == stats.num_rounds
    assert sum(stats.row_committed) == stats.num_committed
    assert stats.target_forwards == 1 + stats.num_batch_rounds == 1 + max(stats.row_rounds)
    assert stats.tokens_per_round == pytest.approx(stats.num_committed / stats.num_rounds)
    assert stats.acceptance_rate == pytest.approx(stats.num_accepted / max(1, stats.num_drafted))
    assert stats.mean_size == pytest.approx(stats.num_drafted / stats.num_rounds)
    assert stats.tokens_per_round <= 1 + stats.mean_depth <= 1 + stats.mean_size
    assert stats.tokens_per_target_forward == pytest.approx(stats.num_new_tokens / stats.target_forwards)


def assert_times_add_up(stats: DecodingStats) -> None:
    parts = (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds)
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(stats.total_seconds)
    assert len(stats.token_seconds) == stats.num_new_tokens
    assert all(earlier <= later for earlier, later in pairwise(stats.token_seconds))
    assert 0 < stats.ttft_seconds == stats.token_seconds[0]
    assert stats.token_seconds[-1] <= stats.total_seconds
    assert stats.tokens_per_second == pytest.approx(stats.num_new_tokens / stats.total_seconds)


@pytest.mark.parametrize("name", ["target", "other model", "PromptLookup", "Plain"])
@pytest.mark.parametrize("batch", [PROMPT, PROMPTS], ids=["one row", "ragged rows"])
def test_a_run_to_the_length_limit(model: PreTrainedModel, batch: torch.Tensor, name: str):
    """No draft is longer than what can be committed, so every round commits what it accepted and one token."""
    out = specdec.generate(model, batch, attention_mask=(batch > 0).long(), drafter=drafters(model)[name], **GREEDY)
    stats = out.stats
    assert_adds_up(stats, len(batch))
    assert_times_add_up(stats)
    assert stats.num_new_tokens == NUM_NEW * len(batch)
    assert stats.num_committed == stats.num_accepted + stats.num_rounds
    assert (stats.draft_forwards > 0) == (name in ("target", "other model"))


@pytest.mark.parametrize("name", ["target", "PromptLookup", "Plain"])
def test_a_run_that_stops_inside_a_draft(model: PreTrainedModel, name: str):
    """The round of the stop commits less than it accepted."""
    free = model.generate(PROMPTS, attention_mask=(PROMPTS > 0).long(), **GREEDY).sequences[:, PROMPTS.shape[1] :]
    eos = [int(row[place]) for row, place in zip(free, (3, 9, 17), strict=True)]
    options = {**GREEDY, "attention_mask": (PROMPTS > 0).long(), "eos_token_id": eos}
    out = specdec.generate(model, PROMPTS, drafter=drafters(model)[name], **options)
    assert_adds_up(out.stats, len(PROMPTS))
    assert_times_add_up(out.stats)
    new = out.sequences[:, PROMPTS.shape[1] :]
    assert out.stats.num_new_tokens == int((new != 0).sum())
    assert [1 + count for count in out.stats.row_committed] == (new != 0).sum(1).tolist()
    assert out.stats.num_committed <= out.stats.num_accepted + out.stats.num_rounds


def test_a_known_course_of_events(model: PreTrainedModel):
    """Six rounds in which we know what is drafted and what is accepted."""
    truth = model.generate(PROMPT, **GREEDY).sequences[0, PROMPT.shape[1] :].tolist()
    wrong = [(token + 1) % 250 for token in truth]
    script = [
        [truth[1:4]],  # all of 3, and the bonus: truth[1:5]
        [[*truth[5:7], wrong[7], truth[8]]],  # 2 of 4: truth[5:8]
        [[wrong[8]]],  # 0 of 1: truth[8]
        [[]],  # nothing drafted: truth[9]
        [TokenTree(tokens=[wrong[10], truth[10], wrong[11], truth[11]], parents=[ROOT, ROOT, 1, 1])],  # 2 of 4
        [TokenTree(tokens=[truth[13], wrong[14]], parents=[ROOT, 0])],  # 1 of 2: truth[13:15]
    ]
    out = specdec.generate(model, PROMPT, drafter=ScriptedDrafter(script), **{**GREEDY, "max_new_tokens": 15})
    assert out.sequences[0, PROMPT.shape[1] :].tolist() == truth[:15]
    stats = out.stats
    assert (stats.num_rounds, stats.num_drafted, stats.num_accepted, stats.num_committed) == (6, 13, 8, 14)
    assert stats.accepted_histogram == Counter({0: 2, 1: 1, 2: 2, 3: 1})
    assert stats.tokens_per_round == pytest.approx(14 / 6)
    assert stats.acceptance_rate == pytest.approx(8 / 13)
    assert stats.target_forwards == 7
    assert stats.draft_forwards == stats.draft_forwards_per_round == 0
    assert stats.num_levels == 3 + 4 + 1 + 0 + 2 + 1  # the last tree was cut at the length limit
    assert stats.mean_depth == pytest.approx(11 / 6)
    assert stats.mean_size == pytest.approx(13 / 6)
    assert stats.tokens_per_target_forward == pytest.approx(15 / 7)


class DrawnElsewhere(Drafter, DraftSession):
    """Trees that are known on the device only: row 0 gets a fork of depth 2, row 1 a fork of depth 1."""

    def start(self, run: Run) -> DraftSession:
        return self

    def propose(self, max_depths: Sequence[int]) -> Draft:
        tokens_BN = torch.tensor([[7, 8, 9], [7, 8, 0]])[: len(max_depths)]
        parents_BN = torch.tensor([[ROOT, ROOT, 0], [ROOT, ROOT, ROOT]])[: len(max_depths)]
        sizes = (3, 2)[: len(max_depths)]
        return Draft(trees=TreeBatch(tokens_BN=tokens_BN, parents_BN=parents_BN, sizes=sizes, depth=2, is_chain=False))


def test_depths_are_those_of_each_row(model: PreTrainedModel):
    options = {**GREEDY, "max_new_tokens": 3, "attention_mask": (PROMPTS[:2] > 0).long()}
    stats = specdec.generate(model, PROMPTS[:2], drafter=DrawnElsewhere(), **options).stats
    assert stats.num_drafted == 5 * stats.num_batch_rounds
    assert stats.num_levels == 3 * stats.num_batch_rounds


@pytest.mark.parametrize("tree", [Chain(4), Fixed((3, 1, 1))], ids=repr)
def test_draft_forwards_of_a_round(model: PreTrainedModel, tree: GrowthPolicy):
    """As many as the tree is deep, and the prefill."""
    draft = tiny_model("llama", seed=12)
    stats = specdec.generate(model, PROMPT, drafter=SmallModel(draft), tree=tree, **GREEDY).stats
    assert stats.draft_forwards == 1 + stats.num_levels
    assert stats.draft_forwards_per_round == pytest.approx(stats.mean_depth + 1 / stats.num_batch_rounds)


def test_one_line_for_people(model: PreTrainedModel):
    stats = specdec.generate(model, PROMPT, drafter=SmallModel(model, num_tokens=4), **GREEDY).stats
    line = str(stats)
    assert "\n" not in line
    assert line.startswith(f"{NUM_NEW} tokens in ")
    assert f"{stats.tokens_per_round:.2f} tokens per round" in line
    assert f"{stats.num_accepted}/{stats.num_drafted} drafted tokens accepted (100%)" in line


def test_a_run_without_a_round(model: PreTrainedModel):
    stats = specdec.generate(model, PROMPT, **{**GREEDY, "max_new_tokens": 1}).stats
    assert (stats.num_rounds, stats.num_new_tokens, stats.target_forwards) == (0, 1, 1)
    assert stats.tokens_per_round == stats.acceptance_rate == stats.mean_depth == stats.mean_size == 0.0
    assert (stats.draft_forwards_per_round, stats.tokens_per_target_forward) == (0.0, 1.0)
    assert str(stats)
    assert str(DecodingStats.for_rows(1))


def test_statistics_are_shown_in_a_line_and_in_a_notebook():
    stats = DecodingStats(
        num_new_tokens=48, num_rounds=10, num_committed=47, num_drafted=50, num_accepted=37, total_seconds=3.0
    )
    stats.setup_seconds = 1.0
    stats.accepted_histogram.update({0: 1, 4: 9})
    line = "48 tokens in 2.00 s (24.0 tokens/s): 4.70 tokens per round, 37/50 drafted tokens accepted (74%)"
    assert str(stats) == f"{line}; one-off setup 1.00 s"
    assert repr(stats) == f"<DecodingStats: {stats}>"
    page = stats._repr_html_()
    assert page.startswith("<table>")
    assert "<td>37 of 50 (74%)</td>" in page
    assert "▂▁▁▁█" in page
    assert DecodingStats()._repr_html_()  # nothing to divide by


def test_what_auto_expected_of_plain_rounds_is_set_beside_what_was_spent():
    stats = DecodingStats()
    assert stats.estimated_speedup is None
    assert "plain decoding" not in str(stats)
    stats.trace = [
        {"plain_ms": 20.0, "ms": 30.0, "committed": [4, 2]},  # three tokens a row: 60 ms of plain rounds
        {"plain_ms": 20.0, "ms": 20.0, "committed": [1, 1]},
        {"drafted": [3], "committed": [2]},  # of a drafter that expects nothing
    ]
    assert stats.estimated_speedup == pytest.approx(80 / 50)
    assert str(stats).endswith("about 1.6x plain decoding (estimated)")
