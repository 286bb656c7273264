"""Jump heads: they compute what the target's layers compute of a predicted state, and output is the target's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec import DraftError
from specdec.drafters import Auto, DraftHead, EarlyExit
from specdec.drafters.head.fitting import fitted
from specdec.drafters.head.formats import JUMP, HeadConfig
from specdec.drafters.head.jump import Jump
from specdec.drafters.head.loading import load_head
from specdec.drafters.head.network import HeadNetwork
from specdec.drafters.model.growing import GrowingSession
from specdec.engine import Engine
from specdec.kernels import native, prepare
from specdec.kernels.model.head_step import HeadStep
from specdec.kernels.model.linear import BANDS, NATIVE
from specdec.testing import assert_same_tokens, random_prompts, tiny_model
from specdec.training.heads.export import save_head
from tests.support.engine_requests import alone, random_prompt, request_of
from tests.support.heads import Listener, hidden_states, small_vocab_model, take_turns
from tests.support.references import plain_alone, speculate
from tests.support.sampled_rows import VOCAB_SIZE, assert_ragged_rows_are_exact
from trees import Chain, Draft, DySpec, Fixed, GrowthPolicy

NUM_NEW, LANDING, START = 20, 2, 4
PROMPTS = random_prompts([5, 12, 2, 9])
DRAFTS = (0, 2, 3, 4)
TREES: dict[str, GrowthPolicy] = {"chain": Chain(4), "fixed": Fixed((3, 2, 1)), "dyspec": DySpec(9, max_depth=4)}


def saved(folder: Path, target: PreTrainedModel, *, landing: int = LANDING, start: int = START) -> tuple[Path, Jump]:
    """A head with the target's layers between, and random maps that leave it often right."""
    config = deepcopy(target.config)
    config.num_hidden_layers, config.dtype = start - landing, torch.float32
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[landing:start]
    sizes = {"vocab_size": config.vocab_size, "target_hidden_size": config.hidden_size}
    head_config = HeadConfig(kind=JUMP, layers=config, draft_vocab_size=len(DRAFTS), state_layers=(start,), **sizes)
    head = Jump(head_config, {"lm_head.weight", "d2t"})
    generator = torch.Generator().manual_seed(3)
    head.vocab_ids = torch.tensor(DRAFTS)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (weight.dim() == 1))
            weight.copy_(weight.bfloat16())
        head.lm_head.weight.copy_(target.get_output_embeddings().weight[head.vocab_ids])  # type: ignore[union-attr]
    save_head(folder / "head", head, target, "tiny", {}, 3)
    return folder / "head", head


def check(listener: Listener, head: Jump, target: PreTrainedModel) -> None:
    exact = deepcopy(head).to(target.dtype)
    config = deepcopy(target.config)
    config.num_hidden_layers = len(head.layers)
    inside: Any = type(target)(config).to(target.dtype).eval().model
    inside.layers, inside.norm = exact.layers, nn.Identity()
    assert listener.said
    for said in listener.sample():
        expected_V = reference_logits(exact, inside, target, said.text, said.drafted, said.first)
        error = (said.logits_V - expected_V).abs().max()
        assert error <= 1e-5 * (1 + expected_V.abs().max()), f"{error:.2e} after {said.text}, {said.drafted}"


@torch.no_grad()
def reference_logits(
    head: Jump, inside: Any, target: PreTrainedModel, text: Sequence[int], drafted: Sequence[int], first: int
) -> Tensor:
    """Logits [V] over what can be drafted, all computed again by a model of the layers between, without a cache."""
    states_1TC, tokens = hidden_states(target, tuple(text[:-1]))[START][:, first:], list(text[first + 1 :])
    for token in (*drafted, None):
        embeds_1TC = target.get_input_embeddings().weight[torch.tensor([tokens])]
        landed_1TC = torch.cat([embeds_1TC, states_1TC], -1) @ head.fc.weight.T
        output_1TC = inside(inputs_embeds=landed_1TC, use_cache=False).last_hidden_state
        states_1TC = torch.cat([states_1TC, output_1TC[:, -1:]], 1)
        tokens.append(token)
    assert head.lm_head is not None
    return (head.norm(output_1TC @ head.readout.weight.T) @ head.lm_head.weight.T)[0, -1]


@pytest.mark.parametrize(("family", "tree"), [("llama", "chain"), ("qwen2", "fixed"), ("qwen3", "dyspec")])
def test_heads_compute_what_the_layers_between_do(
    family: str, tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small_vocab_model(family, dtype=torch.float64)
    folder, head = saved(tmp_path, target)
    listener = Listener(monkeypatch)
    out = speculate(target, PROMPTS, DraftHead(folder), tree=TREES[tree], max_new_tokens=NUM_NEW)
    assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    check(listener, head, target)
    assert 0 < out.stats.num_accepted < out.stats.num_drafted


@pytest.mark.skipif(native.library() is None, reason="without kernels no layer is fused")
@pytest.mark.parametrize("tree", TREES)
def test_fused_layers_say_the_same(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    target = small_vocab_model(**sizes, head_dim=32)
    folder, _ = saved(tmp_path, target)
    native_calls: list[str] = []
    for name in ("states", "logits"):
        monkeypatch.setattr(HeadStep, name, _noted(getattr(HeadStep, name), native_calls))
    monkeypatch.setattr("specdec.kernels.model.prepare.calibrate", lambda _: dict.fromkeys(BANDS, NATIVE))
    said = []
    for is_fused in (True, False):
        with monkeypatch.context() as one:
            if not is_fused:
                one.setattr(Jump, "for_run", HeadNetwork.for_run)
            listener = Listener(one)
            fast = prepare(deepcopy(target))
            out = speculate(fast, PROMPTS, DraftHead(folder), tree=TREES[tree], max_new_tokens=NUM_NEW)
            assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
            said.append({(tuple(each.text), tuple(each.drafted)): each.logits_V for each in listener.said})
    assert said[0].keys() == said[1].keys()
    fused_IV, apart_IV = (torch.stack([each[key] for key in said[0]]) for each in said)
    distance_I = (fused_IV - apart_IV).norm(dim=-1) / (apart_IV - apart_IV.mean(-1, keepdim=True)).norm(dim=-1)
    # sums in another order; here and there an activation is rounded to the next of its 8-bit codes
    assert distance_I.median() <= 1e-5
    assert distance_I.max() <= 0.1
    assert min(map(native_calls.count, ("states", "logits"))) > NUM_NEW


def _noted(method: Callable[..., Tensor | None], calls: list[str]) -> Callable[..., Tensor | None]:
    """The method, whose calls that gave something are noted by its name."""

    def noted(*args: Any) -> Tensor | None:
        out = method(*args)
        calls.extend([method.__name__] * (out is not None))
        return out

    return noted


def test_the_first_map_is_narrowed_only_without_loss(tmp_path: Path) -> None:
    _, head = saved(tmp_path, small_vocab_model())
    fine = deepcopy(head)
    with torch.no_grad():
        fine.fc.weight[0, 0] = 1 + 2**-20
    assert torch.equal(head.narrow_fc_NK.float(), head.fc.weight)
    assert head.narrow_fc_NK.dtype is torch.bfloat16
    assert torch.equal(fine.narrow_fc_NK, fine.fc.weight)


def test_jumps_and_exits_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the target's lower layers, and what jumps over them, are choices of the same round."""
    target = small_vocab_model()
    (short, _), (far, _) = (saved(tmp_path / name, target, landing=m) for name, m in (("short", LANDING), ("far", 1)))
    take_turns(monkeypatch)
    grow, drafting = GrowingSession._grow, set()

    def noted(session: GrowingSession, max_depths: Sequence[int]) -> Draft:
        drafting.add(session)
        return grow(session, max_depths)

    monkeypatch.setattr(GrowingSession, "_grow", noted)
    drafters = [DraftHead(short), EarlyExit(2), DraftHead(far)]
    out = speculate(target, PROMPTS, Auto(*drafters), max_new_tokens=NUM_NEW)
    assert_same_tokens(target, plain_alone(target, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert len(drafting) == len(drafters)


@pytest.mark.skipif(native.library() is None, reason="without kernels a target has no copy")
@pytest.mark.parametrize("kind", ["DraftHead", "EarlyExit"])
def test_the_targets_copy_drafts_with_lookup_beside_what_cannot_take_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small_vocab_model()
    drafter = DraftHead(saved(tmp_path, target)[0]) if kind == "DraftHead" else EarlyExit(2)
    take_turns(monkeypatch)
    out = speculate(target, PROMPTS, Auto(drafter), max_new_tokens=40)
    assert_same_tokens(target, plain_alone(target, PROMPTS, 40), out.sequences, PROMPTS["attention_mask"])
    assert {"Cascade", kind} <= {str(each.get("drafter")) for each in out.stats.trace}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_targets_keep_their_type_of_head(dtype: torch.dtype, tmp_path: Path) -> None:
    target = small_vocab_model()
    folder, _ = saved(tmp_path, target)
    fast = prepare(deepcopy(target).to(dtype))
    out = speculate(fast, PROMPTS, DraftHead(folder), max_new_tokens=NUM_NEW)
    assert_same_tokens(fast, plain_alone(fast, PROMPTS, NUM_NEW), out.sequences, PROMPTS["attention_mask"])
    assert fitted(load_head(folder), fast).fc.weight.dtype is dtype


def test_sampled_rows_follow_the_target(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=3, initializer_range=0.3)
    folder, _ = saved(tmp_path, model, landing=1, start=2)
    assert_ragged_rows_are_exact(model, DraftHead(folder), tree=Chain(3), verify="topdown")


def test_requests_that_join_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = small_vocab_model(dtype=torch.float64)
    requests = [request_of(random_prompt(length, length), max_new_tokens=15) for length in (9, 1, 41, 17, 5)]
    folder, head = saved(tmp_path, target)
    listener = Listener(monkeypatch)
    engine = Engine(target, drafter=DraftHead(folder), max_rows=3, prefill_chunk=7)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    assert [generation.tokens for generation in generations] == [alone(target, request) for request in requests]
    check(listener, head, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_layer": 0}, "states after the layers"),
        ({"state_layer": None}, "cannot be used"),
        ({"specdec_head": "leap"}, "of the kind 'leap'"),
        ({"draft_vocab_size": 5}, "does not fit"),
    ],
)
def test_heads_that_cannot_be_read_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, small_vocab_model(dtype=torch.float64))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(DraftError, match=message):
        DraftHead(folder)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantising_a_target_leaves_its_head_both_of_what_it_reads(tmp_path: Path, weights: str) -> None:
    """States a thousand times as large as embeddings, and weights that make up for it, as the demo model has them."""
    target = tiny_model("llama")
    folder, _ = saved(tmp_path, target)
    head = load_head(folder).float()
    size, large = target.config.hidden_size, 1000.0
    with torch.no_grad():
        head.fc.weight[:, size:] /= large
    made = fitted(head, prepare(deepcopy(target), weights))
    inputs = torch.cat([torch.randn(3, size), large * torch.randn(3, size)], 1)
    torch.testing.assert_close(made.fc(inputs), head.fc(inputs), rtol=1e-4, atol=1e-4)
    assert not any(type(module) is nn.Linear for name, module in made.named_modules() if name != "fc")
