"""Models whose layers keep states say with every drafter, in every company, what they say alone.

States of a drafted token that was refused must leave no trace, and those of an accepted one must be as if it had been
decoded plainly: by chains and by trees, in ragged batches, and where rows come and go.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import specdec
from routers import AlwaysDraft
from specdec import UnsupportedModelError, UnsupportedOptionError
from specdec.drafters import Auto, Cascade, ForeignModel, Plain, PromptLookup, QuantizedSelf, SmallModel
from specdec.engine import Engine, Request
from specdec.hf import CACHE, cache_name
from specdec.testing import ByteTokenizer, ScriptedDrafter, assert_same_tokens, random_prompts, tiny_model
from specdec.tree_model.cache import RowStates
from specdec.tree_model.compatibility import check_layers, check_model
from specdec.tree_model.levels import COMMITTED
from specdec.tree_model.model import TreeModel
from specdec.tree_model.recurrent import StateLayer, states_of
from specdec.tree_model.state_owners import reads_on
from tests.support.recurrent_models import KINDS, RECURRENT, recurrent_model
from tests.support.references import PartlyWrongScript, plain_alone, rows_of, speculate, with_noise
from trees import ROOT, Fixed, TokenTree, TreeBatch

NUM_NEW = 24
PROMPTS = random_prompts([5, 12, 9, 18])


@lru_cache(maxsize=4)
def reference(family: str) -> Tensor:
    return plain_alone(recurrent_model(family), PROMPTS, NUM_NEW)


DRAFTERS = {
    "plain": lambda model: Plain(),
    "lookup": lambda model: PromptLookup(min_match=1),
    "stranger": lambda model: SmallModel(tiny_model("llama", seed=1, hidden_size=16), num_tokens=2),
    "relative": lambda model: SmallModel(with_noise(model)),
    "itself": lambda model: SmallModel(model, num_tokens=5),
    "int8 self": lambda model: QuantizedSelf(num_tokens=3),
    "cascade": lambda model: Cascade(PromptLookup(min_match=1), num_tokens=6, min_tokens=3),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", KINDS)
def test_output_equals_plain_decoding(family: str, drafter: str) -> None:
    model = recurrent_model(family)
    drafts = DRAFTERS[drafter](model)
    alone_prompt = rows_of(PROMPTS, [1])
    alone = speculate(model, alone_prompt, drafts, max_new_tokens=NUM_NEW)
    together = speculate(model, PROMPTS, drafts, max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference(family)[1:2, -NUM_NEW - 12 :], alone.sequences, alone_prompt["attention_mask"])
    assert_same_tokens(model, reference(family), together.sequences, PROMPTS["attention_mask"])
    if drafter == "itself":
        assert together.stats.accepted_histogram == {5: 12, 4: 4}
    if drafter == "relative":
        assert 0 < together.stats.num_accepted < together.stats.num_drafted


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("drafter", ["relative", "int8 self"])
def test_draft_model_with_states_grows_trees(family: str, drafter: str) -> None:
    model = recurrent_model(family)
    out = speculate(model, PROMPTS, DRAFTERS[drafter](model), tree=Fixed((2, 2, 1)), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference(family), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted > 0


@pytest.mark.parametrize("family", RECURRENT)
def test_every_family_passes_its_trial_and_takes_trees(family: str) -> None:
    model = recurrent_model(family)
    check_model(model)
    script = PartlyWrongScript(reference(family))
    out = speculate(model, PROMPTS, ScriptedDrafter(script), max_new_tokens=NUM_NEW)
    assert_same_tokens(model, reference(family), out.sequences, PROMPTS["attention_mask"])
    assert out.stats.num_accepted == script.num_true > 0


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("drafter", ["lookup", "itself", "int8 self"])
def test_requests_that_come_and_go_get_what_they_get_alone(family: str, drafter: str) -> None:
    model = recurrent_model(family)
    prompts = [list(range(3, 3 + length)) for length in (20, 1, 7, 20, 2)]
    settings = {"do_sample": False}
    engine = Engine(model, max_rows=2, prefill_chunk=8, drafter=DRAFTERS[drafter](model))
    lengths = (12, 20, 5, 9, 14)
    generations = [
        engine.submit(Request(prompt=prompt, config=GenerationConfig(**settings, max_new_tokens=length)))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    engine.run()
    for prompt, length, generation in zip(prompts, lengths, generations, strict=True):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=length, **settings)[0, len(prompt) :]
        assert generation.tokens == plain.tolist()


@torch.no_grad()
def states_after(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[Tensor]:
    """Those that plain decoding leaves: some models clamp in prompts what they do not clamp in steps."""
    cache = DynamicCache(config=model.config)
    for part in (prompt, *([token] for token in tokens)):
        model(input_ids=torch.tensor([part]), use_cache=True, **{cache_name(model): cache})
    layers = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    return [state[0] for layer in layers for state in states_of(layer).values()]


def held(states: RowStates) -> list[Tensor]:
    return [state for layer in states.recurrent for state in layer.values()]


@torch.no_grad()
@pytest.mark.parametrize("family", RECURRENT)
def test_refused_branches_leave_no_trace_in_the_states(family: str) -> None:
    """Two rounds of trees of which another branch is kept in each row; then a rollback; rows leave and join."""
    model = recurrent_model(family)
    target = TreeModel(model)
    prompts = random_prompts([9, 6])
    texts: list[list[int]] = [[], []]
    target.prefill(**prompts)
    tree = TokenTree(tokens=[7, 8, 9, 10, 11], parents=[ROOT, ROOT, 1, 0, 2])
    for roots, leaves in (([3, 4], [4, 3]), ([5, 6], [3, ROOT])):
        trees = TreeBatch.stack([tree, tree])
        target.verify(trees, torch.tensor([[root] for root in roots]))
        target.forget_tail()
        target.verify(trees, torch.tensor([[root] for root in roots]))
        paths = [tree.path(leaf) for leaf in leaves]
        target.commit([[0, *(node + 1 for node in path)] for path in paths])
        for text, root, path in zip(texts, roots, paths, strict=True):
            text += [root, *(tree.tokens[node] for node in path)]
    target.join(target.cache.row_states(0))
    target.select_rows([2, 1])
    target.cache.check_integrity()
    for row, text in enumerate(texts):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()].tolist()
        wanted = states_after(model, prompt, text)
        own = held(target.cache.row_states(row))
        assert len(own) == len(wanted) > 0
        for state, expected in zip(own, wanted, strict=True):
            torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-4)


def count_call(calls: Counter[nn.Module], module: nn.Module, *_: Any) -> None:
    calls[module] += 1


@pytest.mark.parametrize("family", KINDS)
def test_weights_of_outer_products_are_read_once_a_forward(family: str) -> None:
    """Linears of a mixer's own input are called once for all tokens, and so is the one that makes its output."""
    model = recurrent_model(family)
    target = TreeModel(model)
    with torch.no_grad():
        target.prefill(**rows_of(PROMPTS, [1]))
        chain = TreeBatch.chains(torch.tensor([[7, 8, 9, 7, 8, 9, 7]]))
        for _ in range(2):  # in the first forward the last linear is found out
            target.forget_tail()
            calls: Counter[nn.Module] = Counter()
            count = partial(count_call, calls)
            hooks = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, nn.Linear)]
            target.verify(chain, torch.tensor([[3]]))
            for hook in hooks:
                hook.remove()
    inner = {"x_proj", "dt_proj", "f_b_proj", "g_b_proj"}
    names = {part: name.rpartition(".")[2] for name, part in model.named_modules()}
    assert {calls[part] for part in calls if names[part] not in inner} == {1}


def test_mixer_whose_last_linear_is_not_its_output_is_stepped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out of a mixer once is looked at every time."""
    model = copy.deepcopy(recurrent_model("lfm2"))
    target, twin = TreeModel(model), TreeModel(recurrent_model("lfm2"))
    chain, root_11 = TreeBatch.chains(torch.tensor([[7, 8, 9]])), torch.tensor([[3]])
    mixer = type(model.model.layers[0].conv)
    plain = mixer.forward
    with torch.no_grad():
        for each in (target, twin):
            each.prefill(**rows_of(PROMPTS, [1]))
            each.verify(chain, root_11)
            each.forget_tail()
        monkeypatch.setattr(mixer, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs) * 1.0)
        torch.testing.assert_close(target.verify(chain, root_11), twin.verify(chain, root_11))


def test_model_itself_is_not_touched() -> None:
    model = recurrent_model("jamba")
    before = {name: (id(part), dict(part.__dict__)) for name, part in model.named_modules()}
    speculate(model, PROMPTS, PromptLookup(min_match=1))
    after = {name: (id(part), dict(part.__dict__)) for name, part in model.named_modules()}
    assert {name: number for name, (number, _) in before.items()} == {
        name: number for name, (number, _) in after.items()
    }
    assert all(before[name][1].keys() == after[name][1].keys() for name in before)


def broken_commit(self: StateLayer, sources: Any) -> None:
    plain_commit(self, [(number, 0) for number, _ in sources])


plain_commit, plain_step = StateLayer.commit, StateLayer.begin_step


@pytest.mark.parametrize("family", KINDS)
def test_trial_finds_out_states_of_the_wrong_node(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, **RECURRENT[family])
    monkeypatch.setattr(StateLayer, "commit", broken_commit)
    with pytest.raises(UnsupportedModelError, match="as a tree"):
        check_model(model)


@pytest.mark.parametrize("family", KINDS)
def test_trial_finds_out_steps_from_the_wrong_state(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node goes on from its row's committed state."""
    model = tiny_model(family, **RECURRENT[family])

    def from_the_start(self: StateLayer, level: Any, keys: Any) -> None:
        plain_step(self, dataclasses.replace(level, sources=[(COMMITTED, row) for row in level.rows]), keys)

    monkeypatch.setattr(StateLayer, "begin_step", from_the_start)
    with pytest.raises(UnsupportedModelError, match="as a tree"):
        check_model(model)


def test_prompt_in_parts_is_read_by_steps_where_the_model_begins_anew() -> None:
    assert not reads_on(recurrent_model("mamba"))
    assert reads_on(recurrent_model("mamba2"))


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1", "qwen3_next"])
def test_returned_cache_goes_on_where_it_ended(family: str) -> None:
    model = recurrent_model(family)
    prompt = torch.tensor([list(range(3, 20))])
    whole = model.generate(prompt, max_new_tokens=24, do_sample=False)
    settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    first = specdec.generate(model, prompt, drafter=PromptLookup(), max_new_tokens=10, **settings)
    for continued in (model.generate, lambda *args, **given: specdec.generate(model, *args, **given)):
        cache = copy.deepcopy(first[CACHE])
        out = continued(first.sequences, **{CACHE: cache}, max_new_tokens=14, **settings)
        assert torch.equal(out.sequences, whole)


def test_cache_without_place_for_states_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"DynamicCache\(config=model.config\)"):
        specdec.generate(recurrent_model("lfm2"), torch.tensor([[3, 4]]), past_key_values=DynamicCache())


def test_what_would_take_back_states_is_refused() -> None:
    model, tokenizer = recurrent_model("mamba2"), ByteTokenizer()
    with pytest.raises(UnsupportedModelError, match="an exit would leave between two tokens"):
        check_layers(model)
    with pytest.raises(UnsupportedModelError, match="cannot take back what is translated otherwise"):
        ForeignModel(model, tokenizer, tokenizer)
    with pytest.raises(ValueError, match="take back what it has read"):
        Cascade(SmallModel(model))
    router = AlwaysDraft()
    for target, draft in ((model, tiny_model("llama")), (tiny_model("llama"), model)):
        with pytest.raises(UnsupportedModelError, match="cannot take back a step"):
            specdec.generate(target, torch.tensor([[3, 4]]), drafter=draft, router=router, tokenizer=tokenizer)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", KINDS)
def test_prepared_model_says_what_it_says(family: str, weights: str) -> None:
    """The quantised model's own tokens."""
    model = specdec.prepare(tiny_model(family, **RECURRENT[family]), weights=weights)
    expected = plain_alone(model, PROMPTS, 12)
    out = speculate(model, PROMPTS, ScriptedDrafter(PartlyWrongScript(expected)), max_new_tokens=12)
    assert_same_tokens(model, expected, out.sequences, PROMPTS["attention_mask"])


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_default_drafter(family: str) -> None:
    model = recurrent_model(family)
    for drafter in (None, Auto(SmallModel(with_noise(model)))):
        out = specdec.generate(model, **PROMPTS, drafter=drafter, max_new_tokens=NUM_NEW, do_sample=False)
        assert_same_tokens(model, reference(family), out, PROMPTS["attention_mask"])
