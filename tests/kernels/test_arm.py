"""The kernels for ARM: compiled by a cross compiler, run on an emulated processor, compared with those for x86.

Sums of integers are exact, and what is added in float32 after them has one order, as has attention: equal to the bit.
A float32 product adds the lanes of a vector, of which ARM has fewer: equal where nothing is rounded.
"""

import itertools
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

from specdec.kernels import native
from specdec.kernels.model.linear import float_matrix
from specdec.kernels.model.quantized_linear import Int4Linear, Int8Linear
from specdec.kernels.native.compiling import FLAGS, SOURCES

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
DRIVER = SOURCES.parents[2] / "tests/kernels/arm/driver.c"
PACK, LINEAR, ATTEND, LAYER, TAKE = range(5)
INSTRUCTION_SETS = ("neon", "dotprod", "i8mm")
ROWS = (1, 2, 3, 5, 8, 11, 17, 40)
KINDS = {8: Int8Linear, 4: Int4Linear}

needs_x86 = pytest.mark.skipif(
    native.library() is None or native.INSTRUCTION_SETS[0] != "avx2",
    reason="compares with the kernels for x86",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if missing := [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user-static)")
    program = tmp_path_factory.mktemp("arm") / "driver"
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC")]  # -O0: it compiles much faster
    sources = [DRIVER, *sorted(SOURCES.glob("*.c"))]
    strict = ("-O0", "-static", "-Wall", "-Wextra", "-Werror")
    subprocess.run([COMPILER, *flags, *strict, f"-I{SOURCES}", "-o", program, *sources, "-lm"], check=True)
    return program


@pytest.fixture(params=INSTRUCTION_SETS)
def run(driver, request):
    """Commands -> the bytes that the emulated library answers."""

    def run(*commands, processor="max", name=request.param):
        given = b"".join(_encode(*command) for command in commands)
        command = [EMULATOR, "-cpu", processor, driver, name]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout

    return run


def _encode(command, numbers, *arrays):
    header = torch.tensor([command, *numbers, *[0] * (7 - len(numbers))])
    return b"".join(array.detach().contiguous().numpy().tobytes() for array in (header, *arrays))


def _floats(answer, *shape):
    return torch.frombuffer(bytearray(answer), dtype=torch.float32).reshape(shape)


def _weights(module):
    """As the driver reads them."""
    packed = module.matrix()
    return [tensor for tensor in packed.alive if tensor is not None], packed


@pytest.fixture(autouse=True)
def least_instructions():
    library = native.library()
    best = library and library.instruction_set
    if library:
        library.select(native.INSTRUCTION_SETS[0])
    yield
    if library:
        library.select(best)


@needs_x86
@pytest.mark.parametrize("bits", KINDS)
def test_packed_products_are_those_of_x86_to_the_bit(run, bits):
    commands, expected = [], []
    for (n, k), weight_only in itertools.product([(70, 200), (16, 64), (130, 33)], (False, True)):
        arrays, matrix = _weights(KINDS[bits](nn.Linear(k, n, bias=False)))
        x_MK = torch.randn(ROWS[-1], k)
        x_MK[3], x_MK[4, 0] = 0, 1000
        expected += [native.library().linear(matrix, x_MK, weight_only=weight_only)[:rows] for rows in ROWS]
        commands += [(LINEAR, (n, k, bits, rows, weight_only), *arrays, x_MK[:rows]) for rows in ROWS]
    expected_N = torch.cat([out.flatten() for out in expected])
    torch.testing.assert_close(_floats(run(*commands), -1), expected_N, rtol=0, atol=0)


@needs_x86
@pytest.mark.parametrize(
    ("block_type", "count", "size", "halves"), [(8, 32, 34, [0]), (6, 32, 22, [0]), (14, 256, 210, [208])]
)
def test_products_of_gguf_blocks_are_those_of_x86_to_the_bit(run, block_type, count, size, halves):
    """Q8_0, Q5_0 and Q6_K: weights in bytes of 8, 5 and 6 bits."""
    n, k = 70, 512
    blocks = torch.randint(0, 256, (n * k // count, size), dtype=torch.uint8)
    for at in halves:
        blocks[:, at : at + 2] = torch.tensor([0, 0x20], dtype=torch.uint8)  # 2 ** -7
    packed, bits = native.library().repack(block_type, blocks.numpy(), None, n, k)
    matrix = native.matrix(packed, n, k, bits=bits, scale=None, bias=None)
    x_MK = torch.randn(ROWS[-1], k)
    for weight_only in (False, True):
        expected = [native.library().linear(matrix, x_MK, weight_only=weight_only)[:rows].flatten() for rows in ROWS]
        commands = [(LINEAR, (n, k, bits, rows, weight_only), packed, x_MK[:rows]) for rows in ROWS]
        torch.testing.assert_close(_floats(run(*commands), -1), torch.cat(expected), rtol=0, atol=0)


@needs_x86
@pytest.mark.parametrize("highest", [127, -127])
def test_the_largest_sums_do_not_overflow(run, highest):
    linear = nn.Linear(128, 16, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    x_MK = torch.full((8, 128), float(highest))
    for bits, kind in KINDS.items():
        arrays, matrix = _weights(kind(linear))
        answer = _floats(run((LINEAR, (16, 128, bits, 8, 0), *arrays, x_MK)), 8, 16)
        assert torch.equal(answer, native.library().linear(matrix, x_MK))


@needs_x86
def test_float_products_are_exact_where_nothing_is_rounded_and_the_same_in_every_company(run):
    n, k = 70, 203
    weight_NK, x_MK = torch.randint(-8, 9, (n, k)).float(), torch.randint(-8, 9, (ROWS[-1], k)).float()
    expected_N = torch.cat([(x_MK[:rows] @ weight_NK.T).flatten() for rows in ROWS])
    for bits, weights in ((32, weight_NK), (16, weight_NK.bfloat16().view(torch.int16))):
        commands = [(LINEAR, (n, k, bits, rows, 0), weights, x_MK[:rows]) for rows in ROWS]
        assert torch.equal(_floats(run(*commands), -1), expected_N)
    x_MK = torch.randn(8, k)
    commands = [(LINEAR, (n, k, 32, 1, 0), weight_NK, row_K) for row_K in x_MK]
    alone_MN = _floats(run(*commands), 8, n)
    assert torch.equal(_floats(run((LINEAR, (n, k, 32, 8, 0), weight_NK, x_MK)), 8, n), alone_MN)
    torch.testing.assert_close(alone_MN, x_MK @ weight_NK.T, rtol=1e-4, atol=1e-4)


@needs_x86
@pytest.mark.parametrize(
    ("B", "T", "S", "H", "K", "D"), [(2, 1, 77, 6, 2, 64), (1, 3, 130, 4, 4, 96), (1, 40, 90, 4, 2, 64)]
)
def test_attention_is_that_of_x86_to_the_bit(run, B, T, S, H, K, D):
    query_BTHD, seen_BTS = torch.randn(B, T, H, D), torch.rand(B, T, S) < 0.5
    key_BKSD, value_BKSD = torch.randn(2, B, K, S, D)
    attention = native.attention(query_BTHD, key_BKSD, value_BKSD, seen_BTS[:, None], 0.125)
    answer = run((ATTEND, (B, T, S, H, K, D), query_BTHD, key_BKSD, value_BKSD, seen_BTS))
    assert torch.equal(_floats(answer, B, T, H, D), native.library().attend(query_BTHD, attention))


@needs_x86
def test_weights_are_packed_as_on_x86(run):
    weight_NK = torch.randn(70, 200)
    packed, scale_N = native.library().pack(weight_NK, 8)
    assert run((PACK, (70, 200, 8), weight_NK)) == packed.numpy().tobytes() + scale_N.numpy().tobytes()
    linear = nn.Linear(192, 64, bias=False).requires_grad_(False)
    answer = run((PACK, (64, 192, 4), linear.weight))
    packed = torch.frombuffer(bytearray(answer[: -4 * 64]), dtype=torch.int8)
    found = [
        native.library().linear(matrix, torch.eye(192), weight_only=True).T
        for matrix in (native.matrix(packed, 64, 192, bits=4, scale=None, bias=None), Int4Linear(linear).matrix())
    ]
    error, expected = [((weight_NK - linear.weight).norm() / linear.weight.norm()).item() for weight_NK in found]
    assert error == pytest.approx(expected, rel=1e-3)


@needs_x86
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_layer_is_that_of_x86_but_for_rounding(run, bits):
    """Norms, rotation and the gate, which add and round by vectors: nothing in the way of a test of each."""
    rows, H, K, D, hidden, mlp = 5, 4, 2, 32, 128, 192
    sizes = {"q": (H * D, hidden), "k": (K * D, hidden), "v": (K * D, hidden), "o": (hidden, H * D)}
    sizes |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
    linears = [nn.Linear(k, n, bias=False).requires_grad_(False) for n, k in sizes.values()]
    norms = [torch.rand(size) + 0.5 for size in (hidden, hidden, D, D)]
    x_MH, (cos_MD, sin_MD) = torch.randn(rows, hidden), torch.randn(2, rows, D)
    if bits == 32:
        matrices = [float_matrix(linear) for linear in linears]
        arrays = [linear.weight for linear in linears]
    else:
        pairs = [_weights(KINDS[bits](linear)) for linear in linears]
        matrices, arrays = [pair[1] for pair in pairs], [array for pair in pairs for array in pair[0]]
    answer = run((LAYER, (rows, H, K, D, hidden, mlp, bits), *arrays, *norms, x_MH, cos_MD, sin_MD))

    addresses = [norm.data_ptr() for norm in norms]
    layer = native.Layer(*matrices, *addresses, 1e-5, 1e-5, 1e-5, H, K, D)
    q_MHD, k_MKD, v_MKD = torch.empty(rows, H, D), torch.empty(rows, K, D), torch.empty(rows, K, D)
    out_MH = torch.empty(rows, hidden)
    targets = [tensor.data_ptr() for tensor in (cos_MD, sin_MD, q_MHD, k_MKD, v_MKD)]
    native.library().attention_inputs(layer, x_MH.data_ptr(), rows, *targets, 1)
    attention = native.attention(q_MHD[None], k_MKD.transpose(0, 1)[None], v_MKD.transpose(0, 1)[None], None, 0.125)
    native.library().attention_and_mlp(layer, attention, x_MH.data_ptr(), out_MH.data_ptr(), 1)
    difference = (_floats(answer, rows, hidden) - out_MH).norm() / out_MH.norm()
    assert difference < (1e-6 if bits == 32 else 5e-3)  # a rounding may tip an activation to the next step


def test_tokens_are_drawn_in_proportion(run):
    """The likeliest are in order; and, drawn, those at which the sums of probabilities pass the coins."""
    scores_V = torch.randn(5000) * 3
    coins = torch.rand(1, 3, dtype=torch.float64)
    likeliest, drawn = [run((TAKE, (5000, 3, is_drawn), scores_V, *[coins] * is_drawn)) for is_drawn in (0, 1)]
    numbers = torch.frombuffer(bytearray(likeliest[:24]), dtype=torch.int64)
    assert numbers.tolist() == scores_V.topk(3).indices.tolist()
    first = torch.frombuffer(bytearray(drawn[:8]), dtype=torch.int64).item()
    sums_V = scores_V.double().softmax(-1).cumsum(-1)
    assert sums_V[first] - scores_V.double().softmax(-1)[first] - 1e-5 < coins[0, 0] < sums_V[first] + 1e-5


@pytest.mark.parametrize(("processor", "name"), [("cortex-a57", "dotprod"), ("neoverse-n1", "i8mm")])
def test_a_processor_without_an_extension_is_not_given_it(driver, processor, name):
    run = [EMULATOR, "-cpu", processor, driver, name]
    assert subprocess.run(run, input=b"", capture_output=True).returncode == 2


# ---- without a cross compiler ----


def _words(*names):
    text = "".join((SOURCES / name).read_text() for name in names)
    without_comments = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return set(re.findall(r"\b[A-Za-z_]\w*", without_comments)), without_comments


def _defined(text):
    macros = re.findall(r"#\s*define\s+(\w+)", text)
    functions = re.findall(r"^INLINE [\w ]+?\*?(\w+)\(", text, flags=re.MULTILINE)
    return {*macros, *functions}


def test_the_vocabularies_have_the_same_words():
    """What the shared files say is defined for every processor."""
    shared, _ = _words("rows.h", "product.h", "gguf.h", "attention.h", "draws.h", "layer.h")
    optional = {"FEWEST_PAIRED_ROWS", "widen", "dot_pairs"}
    for other in ("simd_avx2.h", "simd_avx512.h"):
        wanted = shared & _defined(_words(other)[1]) - optional
        assert {"vf_fma", "transpose4", "dot_group", "dot_groups4", "VL", "REGISTERS"} <= wanted
        assert wanted <= _defined(_words("simd_neon.h")[1])


def test_shared_files_say_nothing_of_one_processor():
    words, _ = _words("rows.h", "gguf.h", "attention.h", "draws.h", "layer.h", "pool.c", "native.c", "layout.c")
    assert not {word for word in words if re.match(r"_mm\d*_|__m\d|v\w+q_|__builtin_ia32|_cvt", word)}
