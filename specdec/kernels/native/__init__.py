"""The C library, called on tensors' memory; build.py builds it.

Nothing here is needed for correctness: `library()` is None without a compiler, on another architecture or on an
x86 processor without AVX2, and torch then does the work. `describe()` says which it is and why.
"""

import ctypes
import functools
import itertools
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from specdec.kernels.native import build
from specdec.kernels.native.compiling import sources_digest
from specdec.kernels.native.structs import (
    Attention,
    Candidates,
    HeadForward,
    HeadLogits,
    Int,
    Layer,
    Matrix,
    PackedForward,
    Pointer,
    StackForward,
    Taken,
    Verification,
    Visibility,
)

MAX_ROWS = 64  # rows per forward for which the native layer is meant; more is prefill, torch's strength
BLOCK_ROWS = 512  # rows per call of an int8 layer, whose forwards may have any number: bounds the scratch memory

_ARM = ("aarch64", "arm64")
INSTRUCTION_SETS = ("neon", "dotprod", "i8mm") if platform.machine() in _ARM else ("avx2", "avxvnni", "avx512", "amx")
"""That a processor of this machine's kind may have; the later the better, and all have the same products."""

_log = logging.getLogger("specdec")
_OUT_OF_MEMORY = -2  # see common.h


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(Matrix, Layer, Attention, PackedForward, StackForward, HeadForward, HeadLogits),
    *(Candidates, Taken, Visibility, Verification),
)
PAGE_SLOTS = 16  # mirrors common.h


def _check_status(result: int | None, function: Any, _: tuple[object, ...]) -> int | None:
    """What ctypes asks of the result of each call that may need memory."""
    if result == _OUT_OF_MEMORY or result is None:
        raise MemoryError(f"no memory left for {function.__name__}: use shorter prompts or fewer rows at a time")
    return result


class _Function(NamedTuple):
    arguments: tuple[type, ...]
    result: type | None = None
    needs_memory: bool = False


_Threads = ctypes.c_int
_FUNCTIONS = {
    "select": _Function((ctypes.c_char_p,), ctypes.c_char_p),
    "layout": _Function((Int, Pointer), ctypes.c_char_p),
    "fail_allocation_after": _Function((Int,)),
    "use_all_threads": _Function((ctypes.c_int,)),
    "packed_bytes": _Function((Int, Int, Int), Int),
    "pack": _Function((Pointer, Int, Int, Int, Pointer, Pointer, _Threads), Int, True),
    "bits_of": _Function((Int,), Int),
    "repack": _Function((Pointer, Pointer, Pointer, Int, Int, Pointer, Pointer, _Threads), Int, True),
    "linear": _Function((ctypes.POINTER(Matrix), Pointer, Int, ctypes.c_int, Pointer, _Threads), Int, True),
    "attend": _Function((ctypes.POINTER(Attention), _Threads), Int, True),
    "attention_inputs": _Function((ctypes.POINTER(Layer), Pointer, Int, *(Pointer,) * 5, _Threads), Int, True),
    "attention_and_mlp": _Function(
        (ctypes.POINTER(Layer), ctypes.POINTER(Attention), Pointer, Pointer, _Threads), Int, True
    ),
    "packed_forward": _Function((ctypes.POINTER(PackedForward), _Threads), Int, True),
    "stack_forward": _Function((ctypes.POINTER(StackForward), _Threads), Int, True),
    "head_forward": _Function((ctypes.POINTER(HeadForward), _Threads), Int, True),
    "head_logits": _Function((ctypes.POINTER(HeadLogits), _Threads), Int, True),
    "take": _Function(
        (ctypes.POINTER(Candidates), Pointer, Int, ctypes.POINTER(Taken), Int, *(Pointer,) * 3), Int, True
    ),
    "verify": _Function((ctypes.POINTER(Verification), ctypes.c_int), Int, True),
    "write_mask": _Function((ctypes.POINTER(Visibility),)),
    "move": _Function((Pointer, Pointer, Int, Int, Pointer, Pointer, Int)),
    "move_in_pages": _Function((Pointer, Int, Int, Pointer, Pointer, Int)),
}
"""By name in C, without `specdec_`."""


def open_library(path: Path) -> ctypes.CDLL:
    """The file with its functions typed.

    Raises:
        OSError: it is no library, not ours, or lays structures out otherwise than this module.
    """
    dll = ctypes.CDLL(str(path))
    for name, (arguments, result, needs_memory) in _FUNCTIONS.items():
        try:
            function = getattr(dll, f"specdec_{name}")
        except AttributeError as error:
            raise OSError(f"{path} is not specdec's library: it has no specdec_{name}") from error
        function.argtypes, function.restype = arguments, result
        if needs_memory:
            function.errcheck = _check_status
    different = dict(_layout_in_python().items() ^ _layout_in_c(dll).items())
    if different:
        raise OSError(f"{path} and __init__.py disagree about the layout of {', '.join(sorted(different))}")
    return dll


def _layout_in_c(dll: ctypes.CDLL) -> dict[str, tuple[int, int]]:
    """Offset and size of every structure and field that both know."""
    layout: dict[str, tuple[int, int]] = {}
    numbers = (Int * 2)()
    for i in itertools.count():
        name = dll.specdec_layout(i, numbers)
        if name is None:
            break
        layout[name.decode()] = (numbers[0], numbers[1])
    return layout


def _layout_in_python() -> dict[str, tuple[int, int]]:
    layout = {"num_blocks": (0, num_blocks(1 << 20)), "page_slots": (0, PAGE_SLOTS)}
    for structure in STRUCTURES:
        layout[structure.__name__] = (0, ctypes.sizeof(structure))
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            layout[f"{structure.__name__}.{name}"] = (field.offset, field.size)
    return layout


class Library:
    """The native functions. Callers pass contiguous float32 CPU tensors unless said otherwise.

    Those that need memory raise MemoryError where there is none. The next call works.
    """

    attention_inputs: Callable[..., int]
    attention_and_mlp: Callable[..., int]
    packed_forward: Callable[..., int]
    stack_forward: Callable[..., int]
    head_forward: Callable[..., int]
    head_logits: Callable[..., int]
    take: Callable[..., int]
    verify: Callable[..., int]
    write_mask: Callable[..., None]
    move: Callable[..., None]
    packed_bytes: Callable[[int, int, int], int]
    move_in_pages: Callable[..., None]
    fail_allocation_after: Callable[[int], None]
    """For tests: that many requests for memory are granted, then one is refused. Negative: all are granted."""

    use_all_threads: Callable[[bool], None]
    """For tests: whether calls use all the threads they ask for, even where other programs want the cores."""

    def __init__(self, dll: ctypes.CDLL, instruction_set: str | None = None) -> None:
        """`instruction_set`: one of INSTRUCTION_SETS, or None for the best. The whole process gets it."""
        self._dll = dll
        for name in Library.__annotations__:
            setattr(self, name, getattr(dll, f"specdec_{name}"))
        self.instruction_set = ""
        self.select(instruction_set)

    def select(self, instruction_set: str | None) -> str:
        name = self._dll.specdec_select(instruction_set.encode() if instruction_set else None)
        if name is None:
            raise OSError(f"this processor has no {instruction_set or INSTRUCTION_SETS[0]}")
        self.instruction_set = name.decode()
        return self.instruction_set

    def pack(self, weight_NK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packed weights (opaque layout) of 8 bits, and the scale of each of the N outputs; or of 4, which hold
        theirs."""
        n, k = weight_NK.shape
        packed = torch.empty(self.packed_bytes(n, k, bits), dtype=torch.int8)
        scale_N = torch.empty(n) if bits == 8 else None
        addresses = packed.data_ptr(), address(scale_N)
        self._dll.specdec_pack(weight_NK.data_ptr(), n, k, bits, *addresses, torch.get_num_threads())
        return packed, scale_N

    def repack(
        self, block_type: int, blocks: npt.NDArray[np.uint8], rows_N: torch.Tensor | None, n: int, k: int
    ) -> tuple[torch.Tensor, int]:
        """Packed weights (opaque layout) of blocks as they lie in a GGUF file, and the bits that a matrix of these has.

        Args:
            block_type: by its number in GGUF files, one for which `bits_of` is not 0.
            blocks: bytes of all rows, one after the other, without gaps.
            rows_N: int64, the row of `blocks` that each output is; None: in their order.

        Raises:
            OverflowError: a scale is beyond float16, or no number.
        """
        bits = self.bits_of(block_type)
        packed, num_too_large = torch.empty(self._dll.specdec_packed_bytes(n, k, bits), dtype=torch.int8), Int(0)
        self._dll.specdec_repack(
            *(block_type, blocks.ctypes.data, address(rows_N), n, k, packed.data_ptr(), ctypes.byref(num_too_large)),
            torch.get_num_threads(),
        )
        if num_too_large.value:
            raise OverflowError(f"{num_too_large.value} of its scales are beyond float16")
        return packed, bits

    def bits_of(self, block_type: int) -> int:
        """How a matrix names its packed weights that were made of such blocks; 0 where the type is not known."""
        return int(self._dll.specdec_bits_of(block_type))

    def linear(self, matrix: Matrix, x_MK: torch.Tensor, *, weight_only: bool = False) -> torch.Tensor:
        """[M, N]. `weight_only`: of packed weights; the rows are not quantised."""
        out_MN = torch.empty(x_MK.shape[0], matrix.n)
        addresses = x_MK.data_ptr(), x_MK.shape[0], weight_only, out_MN.data_ptr()
        self._dll.specdec_linear(matrix, *addresses, torch.get_num_threads())
        return out_MN

    def attend(self, query_BTHD: torch.Tensor, attention: Attention) -> torch.Tensor:
        out_BTHD = torch.empty_like(query_BTHD)
        attention.out = out_BTHD.data_ptr()
        self._dll.specdec_attend(attention, torch.get_num_threads())
        return out_BTHD


def num_blocks(vocab_size: int) -> int:
    """How many blocks a row of scores has, padded; mirrors draws.h."""
    return -(-vocab_size // 4096) * 16


def matrix(
    weight: torch.Tensor, n: int, k: int, *, bits: int, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> Matrix:
    """`bits`: 32, 16 (bfloat16), or those that a packed weight has, see common.h. `scale`: of 8 bits."""
    m = Matrix(weight.data_ptr(), address(scale), address(bias), n, k, bits)
    m.alive = (weight, scale, bias)
    return m


def attention(
    query_BTHD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Attention:
    """The arguments of one attention; holds on to its tensors.

    Keys and values may have any strides but the last, which is made 1. `mask` broadcasts to [B, H, T, S] and is bool
    (True: visible) or float (added); None is causal, the last query being the last key.
    """
    B, T, H, D = query_BTHD.shape
    K, S = key_BKSD.shape[1], key_BKSD.shape[2]
    key, value = plain(key_BKSD), plain(value_BKSD)
    addresses = query_BTHD.data_ptr(), key.data_ptr(), value.data_ptr()
    visible = visibility(mask)
    a = Attention(B, T, S, H, K, D, *addresses, key.stride()[:3], value.stride()[:3], None, *visible.fields, scale)
    a.alive = (query_BTHD, key, value, visible.mask)
    return a


class MaskFields(NamedTuple):
    """A mask as attention takes it, and the fields `mask`, `mask_is_bool`, `mask_strides` of that."""

    mask: torch.Tensor | None
    fields: tuple[int | None, bool, tuple[int, ...]]


def visibility(mask: torch.Tensor | None) -> MaskFields:
    """Of a mask as `attention` has it."""
    if mask is None:
        return MaskFields(None, (None, False, (0, 0, 0)))
    mask = mask if mask.dtype is torch.bool else plain(mask)
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    strides = tuple([0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)])
    return MaskFields(mask, (mask.data_ptr(), mask.dtype is torch.bool, strides[:3]))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """float32 with a last stride of 1: the tensor itself in the usual case."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_loading = threading.Lock()


@functools.cache
def library() -> Library | None:
    """The library, built if need be; None where torch has to do, which is said once. Takes seconds once per machine,
    then milliseconds."""
    with _loading:
        return _announced()


def describe() -> str:
    """One line for people: which kernels are in use here, and why."""
    with _loading:
        loaded = _load()
    if isinstance(loaded, Library):
        return f"native kernels ({loaded.instruction_set})"
    return f"torch kernels, no native ones: {loaded}"


def identity() -> str:
    """Changes with the kernels in use: what is measured with others says nothing."""
    loaded = library()
    instruction_set = None if loaded is None else loaded.instruction_set
    return f"torch {torch.__version__} {instruction_set} {_sources_digest()}"


_sources_digest = functools.cache(sources_digest)


@functools.cache
def _announced() -> Library | None:
    loaded = _load()
    if isinstance(loaded, Library):
        return loaded
    _log.warning(
        "specdec works with torch's kernels here: rounds are slower, Auto drafts without an int8 copy of the model, "
        "and rows are not rounded alike in every batch. The native kernels are missing: %s",
        loaded,
    )
    return None


@functools.cache
def _load() -> Library | str:
    if platform.machine().lower() not in ("x86_64", "amd64", *_ARM) or os.name != "posix":
        here = f"{platform.machine()} on {platform.system()}"
        return f"they are for x86-64 and 64-bit ARM on Linux and macOS, this is {here}"
    try:
        return Library(build.load(open_library))
    except OSError as error:
        return str(error)
