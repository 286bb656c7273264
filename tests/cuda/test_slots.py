"""Slots of a tail arranged in all layers at once: the twin against slot by slot, the kernel against it, whole runs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.cuda import slots
from specdec.cuda.arena import StaticTreeCache
from specdec.cuda.graphs import standing_in
from specdec.cuda.seen import Buffers
from specdec.drafters import Drafter, EarlyExit, SmallModel
from specdec.testing import assert_same_tokens, random_prompts
from specdec.tree_model.cache import TreeCache
from tests.support.early_exits import early_model
from tests.support.interpreter import INTERPRETS, interpreted, run_interpreted
from tests.support.references import plain_alone
from trees import DySpec, Fixed, GrowthPolicy

ROWS, CAPACITY = 3, 80
STARTS_B = torch.tensor([3, 40, 0])
SOURCES = {
    "one": [[2]] * 3,
    "a path": [[0, 2, 3, 7], [1, 2, 5, 6], [0, 1, 2, 3]],
    "any order": [[3, 0, 1, 2, 2], [4, 3, 2, 1, 0], [0, 0, 0, 4, 1]],
    "many": [[*range(29, -1, -1)], [*range(1, 31)], [*range(0, 30)]],
}
NUM_NEW = 16
RAGGED, ONE = random_prompts([5, 12, 9, 18]), random_prompts([12])


def parts_of(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Buffers of so many heads and channels. What is no number is copied too, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn((ROWS, heads, CAPACITY, size), generator=generator).to(dtype) for heads, size in sizes]
    for part in parts:
        part[:, :, ::7] = torch.nan
    return parts


ALIKE, OTHERS = ((2, 16),) * 4, ((2, 16), (4, 8), (1, 5))


def bits(part: Tensor) -> Tensor:
    return part.view({2: torch.int16, 4: torch.int32}[part.element_size()])


def expected(part: Tensor, sources: list[list[int]]) -> Tensor:
    """Slot by slot."""
    arranged = part.clone()
    for row, (start, own) in enumerate(zip(STARTS_B.tolist(), sources, strict=True)):
        for place, source in enumerate(own):
            arranged[row, :, start + place] = part[row, :, start + source]
    return bits(arranged)


def check(arrange: object, sizes: tuple[tuple[int, int], ...], name: str, dtype: torch.dtype = torch.float32) -> None:
    parts = parts_of(*sizes, dtype=dtype)
    wanted = [expected(part, SOURCES[name]) for part in parts]
    arrange(slots.buffers_of(parts), STARTS_B, torch.tensor(SOURCES[name]))
    assert all(torch.equal(bits(part), want) for part, want in zip(parts, wanted, strict=True))


@pytest.mark.parametrize("sizes", [ALIKE, OTHERS], ids=["alike", "others"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_twin(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    check(slots.arrange, sizes, name)


def test_which_buffers_it_is_for() -> None:
    parts = [torch.empty(ROWS, 2, 8, 4, device="meta") for _ in range(2)]
    assert slots.can_arrange(parts)
    assert not slots.can_arrange([*parts, torch.empty(ROWS, 2, 8, 4)]), "another device"
    assert not slots.can_arrange([*parts, parts[0].transpose(1, 2)])
    assert not slots.can_arrange(parts_of(*ALIKE)), "there are native kernels on a CPU"


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    """The tests around, in a minute."""
    run_interpreted(__file__)


@pytest.fixture
def kernels() -> ModuleType:
    return importlib.import_module("specdec.cuda.kernels")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [ALIKE, OTHERS], ids=["alike", "others"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_kernel(name: str, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, kernels: ModuleType) -> None:
    check(kernels.arrange, sizes, name, dtype)


@interpreted
def test_sources_that_lie_otherwise(kernels: ModuleType) -> None:
    """As `TreeCache.commit` uploads them."""
    parts, sources_BK = parts_of(*ALIKE), torch.tensor(SOURCES["a path"])
    wanted = [expected(part, SOURCES["a path"]) for part in parts]
    kernels.arrange(slots.buffers_of(parts), STARTS_B, sources_BK.t().contiguous().t())
    assert all(torch.equal(bits(part), want) for part, want in zip(parts, wanted, strict=True))


@interpreted
def test_a_tile_of_few_words(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs have words of the same slots."""
    monkeypatch.setattr(kernels, "_TILE_WORDS", 16)
    for name in SOURCES:
        check(kernels.arrange, OTHERS, name)


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [1, 8, 64, 512])
def test_compiled_not_in_the_interpreter(num_slots: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a GPU that need not be there: all is read before something is written, whichever threads do it."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (`make test-all` does)")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("specdec.cuda.kernels")
    pointers, numbers = (
        ("table", "starts", "sources"),
        ("source_stride_0", "source_stride_1", "num_slots", "most_heads"),
    )
    constants = {"WORD": triton.language.int64, "SLOTS": num_slots, "WORDS": min(32, 2048 // num_slots)}
    kinds = dict.fromkeys(pointers, "*i64") | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=kernels._arrange, signature=kinds, constexprs=constants)
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target).asm["ptx"]
    reads, barriers, writes = (
        [place for place, line in enumerate(ptx.splitlines()) if name in line]
        for name in ("ld.global", "bar.sync", "st.global")
    )
    assert any(max(reads) < barrier < min(writes) for barrier in barriers)


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Layers of all calls: as on a GPU, where no native kernels are, by what stands in for it or by the interpreter."""
    calls: list[int] = []
    kernel = importlib.import_module("specdec.cuda.kernels").arrange if INTERPRETS else slots.arrange

    def counted(buffers: Buffers, *given: Tensor) -> None:
        calls.append(len(buffers.parts) // 2)
        kernel(buffers, *given)

    monkeypatch.setattr("specdec.tree_model.cache.can_move", lambda _: False)
    monkeypatch.setattr("specdec.cuda.arena.can_arrange", lambda _: True)
    monkeypatch.setattr("specdec.cuda.arena.arrange", counted)
    with standing_in():
        yield calls


def nearly(model: PreTrainedModel) -> PreTrainedModel:
    """One that often says the same."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in other.parameters():
        weight.data += 0.05 * weight.data.std() * torch.randn(weight.shape, generator=generator)
    return other


@pytest.mark.parametrize("prompts", [RAGGED, ONE], ids=["ragged", "one"])
@pytest.mark.parametrize("tree", [Fixed((3, 2)), DySpec(9, max_depth=3)], ids=["fixed", "dyspec"])
@pytest.mark.parametrize("drafter", ["small model", "early exit"])
def test_greedy_equality(drafter: str, tree: GrowthPolicy, prompts: dict[str, Tensor], arranged: list[int]) -> None:
    """Once a round at most, in all layers, or in those below the exit."""
    model = early_model.__wrapped__("llama")
    drafts: dict[str, Drafter] = {"small model": SmallModel(nearly(model)), "early exit": EarlyExit(2)}
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "return_dict_in_generate": True}
    out = specdec.generate(model, **prompts, drafter=drafts[drafter], tree=tree, **settings)
    assert_same_tokens(model, plain_alone(model, prompts, NUM_NEW), out.sequences, prompts["attention_mask"])
    assert set(arranged) == ({4} if drafter == "small model" else {2, 4})


@torch.no_grad()
def test_commits_leave_what_others_leave(arranged: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that grow in between are found again; a part of the layers, and paths too long for the kernel."""
    generator = torch.Generator().manual_seed(0)
    caches = [StaticTreeCache(2, 2), TreeCache(2, 2)]
    for step in range(30):
        monkeypatch.setattr("specdec.cuda.arena.MOST_SLOTS", 2 if step % 5 == 4 else 512)
        states = torch.randn((2, 2, 6, 4), generator=generator)
        kept = [torch.randperm(6, generator=generator)[:count].sort().values.tolist() for count in (3, 1 + step % 4)]
        order = torch.stack([torch.randperm(6, generator=generator)[:5] for _ in range(2)])
        for cache in caches:
            for index in range(2):
                cache.update(states + index, -states, index)
            if step % 3 == 0:
                cache.arrange_tail(1, order)
                cache.cut_tail(2, 5)
            cache.commit(kept if step % 3 else [[0, 2], [1]])
            assert torch.equal(cache.lengths_on(torch.device("cpu")), torch.tensor(cache.lengths))
    rows = [[cache.row_states(row).slots for row in range(2)] for cache in caches]
    for own, wanted in zip(*rows, strict=True):
        assert all(torch.equal(*pair) for layers in zip(own, wanted, strict=True) for pair in zip(*layers, strict=True))
    assert {1, 2} == set(arranged)
