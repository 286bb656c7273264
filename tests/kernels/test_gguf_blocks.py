"""Blocks of GGUF files, repacked: weights are those of the package gguf, and rows do not depend on their company."""

import copy
import pickle

import numpy as np
import pytest
import torch

from specdec.kernels import naive, native
from specdec.kernels.model.gguf_modules import BLOCK_TYPES, Blocks, GgufEmbedding, GgufLinear
from tests.support.gguf_blocks import random_blocks

TYPES = sorted(kind.name for kind in BLOCK_TYPES)
needs_native = pytest.mark.skipif(native.library() is None, reason=native.describe())


@pytest.fixture(params=["avx2", "avxvnni", "avx512", "amx"])
def library(request):
    library = native.library()
    if library is None:
        pytest.skip(native.describe())
    best = library.instruction_set
    try:
        library.select(request.param)
    except OSError as error:
        pytest.skip(str(error))
    yield library
    library.select(best)


def width(name: str) -> int:
    return 512 if name.endswith("K") else 96


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_the_file(library, name):
    blocks = random_blocks(name, 70, width(name))
    rows_N = torch.arange(70).flip(0)
    weight_NK = library.linear(GgufLinear(blocks, None, rows_N).matrix(), torch.eye(width(name)), weight_only=True).T
    # K-quants' scales, products of two numbers, are rounded to 11 bits
    torch.testing.assert_close(weight_NK, blocks.floats()[rows_N], rtol=0, atol=1e-3 if name.endswith("K") else 1e-7)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weight_only", [False, True])
def test_products_are_right_and_the_same_bits_in_every_batch(library, name, weight_only):
    k = width(name)
    random = torch.Generator().manual_seed(1)
    x_MK, bias_N = torch.randn(23, k, generator=random), torch.randn(70, generator=random)
    linear = GgufLinear(random_blocks(name, 70, k), bias_N)
    weight_NK = library.linear(linear.matrix(), torch.eye(k), weight_only=True).T - bias_N[:, None]
    rows_MK = x_MK
    if not weight_only:
        q_MGK, scale_MG = naive.quantize_rows(x_MK, naive.GROUP4)
        rows_MK = (q_MGK * scale_MG[..., None]).flatten(1)[:, :k]
    whole_MN = library.linear(linear.matrix(), x_MK, weight_only=weight_only)
    torch.testing.assert_close(whole_MN, rows_MK @ weight_NK.T + bias_N, rtol=1e-4, atol=1e-4)
    for count in range(1, 17):
        part_MN = library.linear(linear.matrix(), x_MK[5 : 5 + count].contiguous(), weight_only=weight_only)
        assert torch.equal(part_MN, whole_MN[5 : 5 + count])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_the_largest_sums_do_not_overflow(library, name, byte):
    blocks, k = random_blocks(name, 16, width(name)), width(name)
    edges = blocks.rows.reshape(
        16, -1, {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}.get(name, blocks.rows.shape[1] * 32 // k)
    )
    before = edges.copy()
    edges[:] = byte
    for place in (
        range(4) if name.startswith(("Q4_1", "Q5_1", "Q4_K", "Q5_K")) else (208, 209) if name == "Q6_K" else (0, 1)
    ):
        edges[..., place] = before[..., place]
    linear = GgufLinear(Blocks(rows=edges.reshape(16, -1), block_type=blocks.block_type))
    weight_NK = library.linear(linear.matrix(), torch.eye(k), weight_only=True).T
    for sign in (1, -1):
        x_MK = torch.full((3, k), float(sign))
        torch.testing.assert_close(library.linear(linear.matrix(), x_MK), x_MK @ weight_NK.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_without_native_kernels_torch_multiplies_by_the_file_s_weights(monkeypatch, name):
    monkeypatch.setattr(native, "library", lambda: None)
    blocks, x_MK = random_blocks(name, 20, width(name)), torch.randn(3, width(name))
    linear = GgufLinear(blocks, torch.ones(20), torch.arange(20).flip(0))
    torch.testing.assert_close(linear(x_MK), x_MK @ blocks.floats().flip(0).T + 1)
    assert torch.equal(pickle.loads(pickle.dumps(linear))(x_MK), linear(x_MK))


@pytest.mark.parametrize("name", TYPES)
def test_copies_and_pickles_are_whole(name):
    linear, x_MK = GgufLinear(random_blocks(name, 20, width(name))), torch.randn(3, width(name))
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(copied(x_MK), linear(x_MK))


@needs_native
@pytest.mark.parametrize("half", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_no_number_is_refused(half):
    blocks = random_blocks("Q4_0", 20, 64)
    blocks.rows[7, 18:20] = np.array([half], dtype=np.float16).view(np.uint8)
    with pytest.raises(OverflowError, match="scales are beyond float16"):
        GgufLinear(blocks)


@pytest.mark.parametrize("name", [*TYPES, "F16", "BF16", "F32"])
def test_an_embedding_reads_the_rows_that_are_asked_for(name):
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    floats = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    blocks = (
        random_blocks(name, 20, width(name))
        if kind in BLOCK_TYPES
        else Blocks(rows=gguf.quantize(floats, kind).view(np.uint8).reshape(20, -1), block_type=kind)
    )
    embedding, ids_BT = GgufEmbedding(blocks), torch.tensor([[3, 19, 0], [3, 3, 7]])
    assert torch.equal(embedding(ids_BT), blocks.floats()[ids_BT])
    assert torch.equal(pickle.loads(pickle.dumps(embedding))(ids_BT), embedding(ids_BT))
    for outside in (-1, 20):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]))
    with pytest.raises(AttributeError, match="no float weight"):
        embedding.weight  # noqa: B018
