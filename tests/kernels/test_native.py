"""The native library's products and attention against their naive twins, on every instruction set there is."""

import copy
import os
import threading

import pytest
import torch
from torch import nn

from specdec.kernels import naive, native
from specdec.kernels.model import linear as linears
from specdec.kernels.model.quantized_linear import LINEARS, Int4Linear, Int8Linear

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.describe())


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    library = native.library()
    library.use_all_threads(True)
    yield
    library.use_all_threads(False)
    torch.set_num_threads(before)


@pytest.fixture(params=native.INSTRUCTION_SETS)
def library(request):
    best = native.library().instruction_set
    try:
        native.library().select(request.param)
    except OSError as error:
        pytest.skip(str(error))
    yield native.library()
    native.library().select(best)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


SHAPES = [(64, 64), (1, 1), (17, 70), (130, 200), (192, 576)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_product_equals_its_naive_twin(library, n, k):
    linear, x_MK = nn.Linear(k, n), torch.randn(11, k)
    x_MK[3] = 0
    x_MK[4, 0] = 1000  # an outlier costs precision in its own group only
    actual = Int8Linear(linear)(x_MK)
    torch.testing.assert_close(
        actual, naive.int8_linear(x_MK, linear.weight.data, linear.bias.data), rtol=1e-5, atol=1e-5
    )


def hard_rows(num_rows, k):
    """Rows of noise, one of zeros, and one with an outlier, which costs precision in its own group only."""
    x_MK = torch.randn(num_rows, k, generator=torch.Generator().manual_seed(k))
    x_MK[3] = 0
    x_MK[4, 0] = 1000
    return x_MK


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (70, 33), (16, 640)])
def test_int4_product_equals_its_naive_twin(library, n, k):
    linear, x_MK = nn.Linear(k, n).requires_grad_(False), hard_rows(11, k)
    found = naive.quantize_weight4(linear.weight)
    linear.weight.copy_(naive.dequantize4(found).flatten(1)[:, :k])  # whose codes both find
    expected_MN = naive.int4_linear(x_MK, naive.quantize_weight4(linear.weight), linear.bias)
    torch.testing.assert_close(Int4Linear(linear)(x_MK), expected_MN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("highest", [127, -127])
def test_the_largest_int4_sums_do_not_overflow(library, highest):
    """Codes of 15 and rows of 127: the sums of 32 inputs are the largest that 16 bits ever see."""
    linear = nn.Linear(128, 16, bias=False).requires_grad_(False)
    linear.weight.copy_(15.0)
    linear.weight[:, ::32] = 0  # so that there is a scale
    x_MK = torch.full((8, 128), float(highest))
    torch.testing.assert_close(Int4Linear(linear)(x_MK), linear(x_MK), rtol=1e-6, atol=0)


def test_int4_weights_are_chosen_better_than_by_rounding(library):
    """What is packed is as good as the naive search finds, and better than the nearest codes for the whole range."""
    linear = nn.Linear(576, 64, bias=False).requires_grad_(False)
    linear.weight.normal_(generator=torch.Generator().manual_seed(2))
    packed_NK = library.linear(Int4Linear(linear).matrix(), torch.eye(576), weight_only=True).T
    naive_NK = naive.dequantize4(naive.quantize_weight4(linear.weight)).flatten(1)
    group_NGK = linear.weight.unflatten(1, (-1, 32))
    low_NG1, high_NG1 = group_NGK.amin(2, keepdim=True), group_NGK.amax(2, keepdim=True)
    steps_NGK = ((group_NGK - low_NG1) / (high_NG1 - low_NG1) * 15).round()
    rounded_NK = (steps_NGK / 15 * (high_NG1 - low_NG1) + low_NG1).flatten(1)
    assert relative(packed_NK, linear.weight) == pytest.approx(relative(naive_NK, linear.weight), rel=1e-3)
    assert relative(packed_NK, linear.weight) < 0.92 * relative(rounded_NK, linear.weight)


def test_weights_that_have_four_bits_stay_what_they_are(library):
    """As those of a GGUF file of type Q4_1 do."""
    random = torch.Generator().manual_seed(3)
    codes_NGK = torch.randint(0, 16, (48, 6, 32), generator=random)
    codes_NGK[..., :2] = torch.tensor([0, 15])
    scale_NG1, offset_NG1 = (torch.rand(48, 6, 1, generator=random).half().float() for _ in range(2))
    linear = nn.Linear(192, 48, bias=False).requires_grad_(False)
    linear.weight.copy_((codes_NGK * scale_NG1 - offset_NG1).flatten(1))
    packed_NK = library.linear(Int4Linear(linear).matrix(), torch.eye(192), weight_only=True).T
    torch.testing.assert_close(packed_NK, linear.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_native_float_product_equals_torch(library, n, k):
    linear, x_MK = nn.Linear(k, n).requires_grad_(False), torch.randn(11, k)
    assert relative(library.linear(linears.float_matrix(linear), x_MK), linear(x_MK)) < 1e-6


def test_a_row_is_bit_identical_in_every_company(library):
    """Over every number of rows up to 64, on one thread and on several: for all number formats."""
    x_MK, linear = torch.randn(64, 192), nn.Linear(192, 200).requires_grad_(False)
    for matrix in (*(kind(linear).matrix() for kind in LINEARS.values()), linears.float_matrix(linear)):
        whole_MN = library.linear(matrix, x_MK)
        for num_rows in range(1, 65):
            rows = torch.randperm(64)[:num_rows]
            torch.set_num_threads(1 + num_rows % 2)
            assert torch.equal(library.linear(matrix, x_MK[rows]), whole_MN[rows])


@pytest.mark.parametrize("weights", LINEARS)
def test_instruction_sets_say_the_same_to_the_bit(library, weights):
    """Whatever product a processor takes, also for wide forwards, the tokens stay the same."""
    matrix, x_MK = LINEARS[weights](nn.Linear(1000, 130)).matrix(), torch.randn(40, 1000)
    own = [library.linear(matrix, x_MK[:num_rows]) for num_rows in (1, 8, 9, 16, 17, 40)]
    library.select(native.INSTRUCTION_SETS[0])
    expected_MN = library.linear(matrix, x_MK)
    for out_MN in own:
        torch.testing.assert_close(out_MN, expected_MN[: len(out_MN)], rtol=0, atol=0)


def test_torch_int8_rows_are_bit_identical_too(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    x_MK, linear = torch.randn(64, 192), Int8Linear(nn.Linear(192, 200))
    whole_MN = linear(x_MK)
    assert all(torch.equal(linear(x_MK[:num_rows]), whole_MN[:num_rows]) for num_rows in range(1, 65))


@pytest.mark.parametrize("choice", [linears.STOCK, linears.TURNED])
def test_every_choice_of_calibration_is_right(choice):
    linear = nn.Linear(96, 130).requires_grad_(False)
    x = torch.randn(2, 3, 96)
    choices = dict.fromkeys(linears.BANDS, choice)
    assert relative(linears.float_linear(linear, choices, x), linear(x)) < 1e-5


def test_calibration_prefers_native_unless_it_costs():
    def choose(native_s):
        return linears._choose({band: {"stock": 2.0, "turned": 1.0, "native": native_s} for band in linears.BANDS})

    assert set(choose(1.9).values()) == {linears.NATIVE}
    assert set(choose(2.1).values()) == {linears.TURNED}


@pytest.mark.parametrize("kind", ["causal", "bool", "float", "per-head", "padded"])
@pytest.mark.parametrize(
    ("B", "T", "S", "H", "K", "D"), [(1, 1, 1, 1, 1, 32), (2, 5, 77, 6, 2, 64), (1, 8, 130, 4, 4, 96)]
)
def test_attention_equals_its_naive_twin(library, kind, B, T, S, H, K, D):
    query_BTHD = torch.randn(B, T, H, D)
    key_BKSD = torch.randn(B, S + 9, K, D).transpose(1, 2)[:, :, 4 : 4 + S]  # strides as of a cache's buffer
    value_BKSD = torch.randn(K, B, S, 2 * D).transpose(0, 1)[..., :D]
    mask = {
        "causal": None,
        "bool": torch.rand(B, 1, T, S) < 0.5,
        "float": torch.randn(1, 1, T, S),
        "per-head": torch.rand(B, H, T, S + 3)[..., :S] < 0.5,
        "padded": (torch.arange(S) >= torch.tensor([S, S // 2])[:B, None])[:, None, None].expand(B, 1, T, S),
    }[kind]
    attention = native.attention(query_BTHD, key_BKSD, value_BKSD, mask, 0.2)
    actual = library.attend(query_BTHD, attention)
    expected = naive.attention(query_BTHD, key_BKSD, value_BKSD, mask, 0.2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_attention_depends_only_on_the_keys_that_are_seen(library):
    """The keys of a path through a tree, scattered or compact, in company or alone: the same bits."""
    D = 64
    query_BTHD, key_BKSD, value_BKSD = torch.randn(1, 7, 2, D), torch.randn(1, 1, 100, D), torch.randn(1, 1, 100, D)
    seen = torch.rand(100).argsort()[:37].sort().values
    mask = (torch.rand(1, 1, 7, 100) < 0.5).index_fill(2, torch.tensor([3]), False)
    mask[0, 0, 3, seen] = True
    attention = native.attention(query_BTHD, key_BKSD, value_BKSD, mask, 0.125)
    together = library.attend(query_BTHD, attention)[:, 3:4]
    alone_BTHD = query_BTHD[:, 3:4].contiguous()
    attention = native.attention(alone_BTHD, key_BKSD[:, :, seen], value_BKSD[:, :, seen], None, 0.125)
    assert torch.equal(library.attend(alone_BTHD, attention), together)


# ---- the pool ----


def test_calls_from_several_threads_and_after_a_fork_are_right():
    torch.set_num_threads(3)
    linear, x_MK = Int8Linear(nn.Linear(576, 576)), torch.randn(3, 576)
    expected, wrong = linear(x_MK), []

    def work():
        wrong.extend(i for i in range(200) if not torch.equal(linear(x_MK), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x_MK), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_results_are_the_same_while_the_pool_looks_for_free_cores():
    """Whatever number of threads it finds, which changes in the course of a quarter of a second of work."""
    native.library().use_all_threads(False)
    torch.set_num_threads(3)
    linear, x_MK = Int8Linear(nn.Linear(576, 576)), torch.randn(3, 576)
    expected = linear(x_MK)
    assert all(torch.equal(linear(x_MK), expected) for _ in range(3000))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bfloat16_weights_give_the_bits_of_the_same_weights_in_float32(library, n, k):
    linear, x_MK = nn.Linear(k, n).bfloat16().requires_grad_(False), torch.randn(40, k)
    matrix, wide = linears.float_matrix(linear), linears.float_matrix(copy.deepcopy(linear).float())
    assert matrix.bits == 16
    for num_rows in (1, 3, 40):
        assert torch.equal(library.linear(matrix, x_MK[:num_rows]), library.linear(wide, x_MK[:num_rows]))
