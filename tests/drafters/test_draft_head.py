"""Heads on the target's hidden states: what they compute is what their authors mean, and output is the target's."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec import DraftError
from specdec.drafters import Auto, Drafter, DraftHead, EarlyExit, Mixed, PromptLookup
from specdec.drafters.head import drafter
from specdec.drafters.head.loading import load_head
from specdec.drafters.speculation import Speculation
from specdec.hf import CACHE
from specdec.testing import assert_same_tokens, random_prompts
from tests.support.heads import (
    LAYOUTS,
    VOCAB_SIZE,
    Listener,
    TinyHead,
    save_original,
    save_speculators,
    small_vocab_model,
    take_turns,
)
from tests.support.recurrent_models import recurrent_model
from tests.support.references import forget_drafters, plain_alone, speculate
from trees import Chain, DySpec, Fixed, GrowthPolicy

NUM_NEW = 20
PROMPTS = random_prompts([5, 12, 2, 9])
TREES: dict[str, GrowthPolicy] = {"chain": Chain(4), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(9, max_depth=4)}
HEADS = {
    "plain": TinyHead(),
    "residual normed": TinyHead(norm_before_residual=True),
    "states normed together": TinyHead(norm_before_fc=True),
    "states normed apart": TinyHead(fc_norm=True, norm_output=True),
    "like Qwen3": TinyHead(has_head_norms=True),
    "three layers": TinyHead(num_layers=3),
    "narrower, two states": TinyHead(channels=16, layers=(1, 3)),
    "biased": TinyHead(has_bias=True),
    "shared embeddings": TinyHead(has_embedding=False),
    "shared head": TinyHead(drafts=None, has_lm_head=False, has_embedding=False),
}


DOUBLE = small_vocab_model(dtype=torch.float64)
"""What rounding does to seven random layers is no matter of the heads."""


def check_equality(head: Path | Drafter, model: Any = DOUBLE, **options: Any) -> Any:
    drafter_ = DraftHead(head) if isinstance(head, Path) else head
    out = speculate(model, PROMPTS, drafter_, max_new_tokens=NUM_NEW, **options)
    assert_same_tokens(model, plain_alone(model, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    return out.stats


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_compute_what_their_authors_mean(
    layout: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the prompt, rounds, rejected drafts and rows of different lengths, which end apart."""
    head, listener = TinyHead(), Listener(monkeypatch)
    stats = check_equality(LAYOUTS[layout](tmp_path, head), tree=TREES[tree])
    listener.check(head.variant(layers=(2, 3, 4)) if layout == "original" else head, DOUBLE)
    assert 0 < stats.num_accepted < stats.num_drafted
    assert len(listener.said) > stats.num_rounds


@pytest.mark.parametrize("name", HEADS)
def test_variants(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(monkeypatch)
    check_equality(save_speculators(tmp_path, HEADS[name]), tree=Fixed((2, 2)))
    listener.check(HEADS[name], DOUBLE)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2", "olmo2"])
def test_any_family_can_be_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vocab_model(family, dtype=torch.float64)
    listener = Listener(monkeypatch)
    check_equality(save_speculators(tmp_path, HEADS["plain"]), model)
    listener.check(HEADS["plain"], model)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_targets_that_keep_states(family: str, tmp_path: Path) -> None:
    model = recurrent_model(family, vocab_size=VOCAB_SIZE)
    head = DraftHead(save_speculators(tmp_path, TinyHead(layers=(1, 2))))
    assert check_equality(head, model, tree=Fixed((3, 2))).num_accepted


def test_a_wrong_layer_changes_acceptance_and_no_token(tmp_path: Path) -> None:
    folder = save_speculators(tmp_path, TinyHead())
    right, wrong = check_equality(folder), check_equality(DraftHead(folder, state_layers=(2, 3, 5)))
    assert right.num_accepted != wrong.num_accepted


def test_half_precision_rounds_no_angle(tmp_path: Path) -> None:
    """Far positions would be rotated wrongly, which costs acceptance and shows nowhere else."""
    head = load_head(save_speculators(tmp_path, TinyHead()))
    expected = head.rotary_emb.inv_freq.clone()
    assert head.to(torch.bfloat16).fc.weight.dtype == torch.bfloat16
    assert torch.equal(head.rotary_emb.inv_freq, expected)
    check_equality(DraftHead(head))


def test_long_texts_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "_CHUNK", 3)
    listener = Listener(monkeypatch)
    check_equality(save_speculators(tmp_path, TinyHead()))
    listener.check(TinyHead(), DOUBLE)


def test_a_chain_ends_where_the_head_is_unsure(tmp_path: Path) -> None:
    """Unless the call says how long it is to be."""
    folder = save_speculators(tmp_path, TinyHead())
    own, named = check_equality(folder), check_equality(folder, tree=Chain(5))
    assert 0 < own.num_accepted < own.num_drafted < named.num_drafted
    assert own.draft_forwards < named.draft_forwards


def test_a_cache_that_is_continued_hides_its_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads what the call has read, at the positions where it stands."""
    prompt_1P = PROMPTS["input_ids"][1:2]
    cache = DynamicCache(config=DOUBLE.config)
    DOUBLE(prompt_1P[:, :7], **{CACHE: cache})
    listener = Listener(monkeypatch)
    head = DraftHead(save_speculators(tmp_path, TinyHead()))
    out = specdec.generate(DOUBLE, prompt_1P, drafter=head, max_new_tokens=NUM_NEW, do_sample=False, **{CACHE: cache})
    assert torch.equal(out, DOUBLE.generate(prompt_1P, max_new_tokens=NUM_NEW, do_sample=False))
    assert {said.first for said in listener.said} == {7}
    listener.check(TinyHead(), DOUBLE)


def test_embeddings_may_take_the_place_of_a_prompt(tmp_path: Path) -> None:
    embeds = DOUBLE.get_input_embeddings()(PROMPTS["input_ids"][1:2])
    head = DraftHead(save_speculators(tmp_path, TinyHead()))
    out = specdec.generate(DOUBLE, inputs_embeds=embeds, drafter=head, max_new_tokens=NUM_NEW, do_sample=False)
    assert torch.equal(out, DOUBLE.generate(inputs_embeds=embeds, max_new_tokens=NUM_NEW, do_sample=False))


def test_rows_end_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(monkeypatch)
    head = DraftHead(save_speculators(tmp_path, TinyHead()))
    options = {"eos_token_id": 3, "pad_token_id": 0, "max_new_tokens": NUM_NEW}
    expected = DOUBLE.generate(**PROMPTS, **options, do_sample=False)
    out = speculate(DOUBLE, PROMPTS, head, tree=Fixed((2, 2)), **options)
    assert_same_tokens(DOUBLE, expected, out.sequences, PROMPTS["attention_mask"], **options)
    assert len({row.index(3) for row in expected[:, -NUM_NEW:].tolist() if 3 in row}) > 1
    listener.check(TinyHead(), DOUBLE)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_prepared_target_has_a_prepared_head(weights: str | None, tmp_path: Path) -> None:
    model = specdec.prepare(deepcopy(small_vocab_model()), weights=weights)
    head = DraftHead(save_speculators(tmp_path, HEADS["shared embeddings"]))
    stats = check_equality(head, model, tree=Fixed((2, 2)))
    assert stats.num_accepted
    assert isinstance(head.model.fc, torch.nn.Linear), "the head that was given stays as it is"


@pytest.mark.parametrize("drafters", ["head", "head and exit", "mixed"])
def test_one_of_several_drafters(drafters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others have drafted the head reads all that is committed."""
    model, listener = small_vocab_model(), Listener(monkeypatch)
    forget_drafters()
    head = DraftHead(save_speculators(tmp_path, TinyHead()))
    made = {
        "head": lambda: Auto(head),
        "head and exit": lambda: Auto(head, EarlyExit(2)),
        "mixed": lambda: Mixed([PromptLookup(), head]),
    }
    drafter_ = made[drafters]()
    take_turns(monkeypatch)
    check_equality(drafter_, model)
    assert listener.said
    listener.check(TinyHead(), model, bound=1e-3)


def test_texts_past_what_a_head_was_trained_on_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_speculators(tmp_path, TinyHead())
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"]["max_position_embeddings"] = 20
    (folder / "config.json").write_text(json.dumps(config))
    check_equality(folder)
    assert [record.message for record in caplog.records if "20 positions" in record.message]
    assert len(caplog.records) == 1


def test_a_folder_or_a_loaded_head_may_be_named_alone(tmp_path: Path) -> None:
    folder = save_speculators(tmp_path, TinyHead())
    assert isinstance(Speculation.of(load_head(folder), tree=Chain(2)).drafter, DraftHead)
    made = Speculation.of(load_head(folder)).drafter
    assert isinstance(made, Auto)
    assert isinstance(made.drafters[0], DraftHead)
    out = speculate(DOUBLE, PROMPTS, str(folder), tree=Chain(2), max_new_tokens=NUM_NEW)
    assert out.stats.draft_forwards > 0


# Heads of strangers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_channels": 48}, "states of 48 channels and the target has 32"),
        ({"vocab_size": 99}, "vocabulary of 99 and the target has one of 12"),
        ({"layers": (2, 5, 9)}, r"after the layers \(2, 5, 9\) and the target has 7"),
        ({"has_embedding": False, "channels": 16}, "no embeddings of its own"),
    ],
)
def test_heads_of_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    head = DraftHead(save_speculators(tmp_path, TinyHead().variant(**changes)))
    with pytest.raises(DraftError, match=message):
        speculate(DOUBLE, PROMPTS, head)


def test_state_layers_are_as_many_as_the_head_reads(tmp_path: Path) -> None:
    head = DraftHead(save_speculators(tmp_path, TinyHead()), state_layers=(1, 2))
    with pytest.raises(DraftError, match="states of 3 layers, and 2 were named"):
        speculate(DOUBLE, PROMPTS, head)


def test_files_that_hold_no_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match=r"cannot read the config.json"):
        DraftHead(tmp_path / "nothing")
    small_vocab_model().save_pretrained(tmp_path / "model")
    with pytest.raises(DraftError, match="is no draft head"):
        DraftHead(tmp_path / "model")
    folder = save_original(tmp_path / "pickled", TinyHead())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"no \*.safetensors weights, and pickled ones are never read"):
        DraftHead(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DraftError, match="cannot read the head in"):
        DraftHead(folder)
    with pytest.raises(ValueError, match="pass a folder"):
        DraftHead(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), "norm.weight"),
        (lambda tensors: tensors.pop("d2t"), "d2t is missing"),
        (lambda tensors: tensors.update({"d2t": torch.arange(3)}), "d2t has 3 entries for 8"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda tensors: tensors.update({"other.weight": torch.ones(3)}), "other.weight"),
        (lambda tensors: tensors.update({"fc.weight": torch.ones(3, 4)}), "size mismatch for fc.weight"),
    ],
)
def test_damaged_heads_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    head = TinyHead().variant()
    damage(head.tensors)
    with pytest.raises(DraftError, match=f"(?s)does not fit its config.json.*{message}"):
        DraftHead(save_speculators(tmp_path, head))


@pytest.mark.parametrize("kind", ["dflash2", "medusa"])
def test_heads_of_other_kinds_are_named(kind: str, tmp_path: Path) -> None:
    folder = save_speculators(tmp_path, TinyHead())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "speculators_model_type": kind}))
    with pytest.raises(DraftError, match=f"of the kind '{kind}': what can be read is EAGLE-3"):
        DraftHead(folder)
