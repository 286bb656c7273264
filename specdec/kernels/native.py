"""The C library in native/: built once per machine with the system's compiler, called on tensors' memory.

Nothing here is needed for correctness: `library()` is None without a compiler, on another architecture or on a
processor without AVX2, and torch then does the work. `describe()` says which it is and why.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a sum is rounded the same way wherever it is inlined
)
MAX_ROWS = 64  # rows per forward for which the native layer is meant; more is prefill, torch's strength
BLOCK_ROWS = 512  # rows per call of an int8 layer, whose forwards may have any number: bounds the scratch memory

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """float32 weights [n, k] (scale is None) or packed int8 ones; mirrors common.h, as do the two below."""

    alive: tuple[torch.Tensor | None, ...]  # the tensors that the pointers point into

    _fields_ = (("data", _Pointer), ("scale", _Pointer), ("bias", _Pointer), ("n", _Int), ("k", _Int))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "head_eps")),
        *((name, _Int) for name in ("num_heads", "num_kv_heads", "head_dim")),
    )


class Attention(ctypes.Structure):
    alive: tuple[torch.Tensor | None, ...]
    _fields_ = (
        *((name, _Int) for name in "BTSHKD"),
        *((name, _Pointer) for name in "qkv"),
        ("k_strides", _Int * 3),
        ("v_strides", _Int * 3),
        ("mask", _Pointer),
        ("mask_is_bool", _Int),
        ("mask_strides", _Int * 3),
        ("scale", ctypes.c_float),
        ("out", _Pointer),
        ("scores", _Pointer),
        ("padded_keys", _Int),
    )


class Urn(ctypes.Structure):
    """Rows of scores whose tokens are taken out, and what was found of them; mirrors common.h, as does the next."""

    _fields_ = (("x", _Pointer), ("vocab", _Int), ("peaks", _Pointer), ("shares", _Pointer), ("norms", _Pointer))


class Taken(ctypes.Structure):
    alive: tuple[object, ...]
    _fields_ = (("tokens", _Pointer), ("counts", _Pointer), ("room", _Int))


class TreeSettings(ctypes.Structure):
    """What a growing tree is told; mirrors common.h, as do the two below."""

    alive: tuple[object, ...]
    _fields_ = (
        *((name, _Int) for name in ("vocab", "limit", "max_depth", "sample")),
        *((name, ctypes.c_double) for name in ("threshold", "guess")),
        *((name, _Pointer) for name in ("starts", "spots")),
    )


class NextLayer(ctypes.Structure):
    _fields_ = (("num_rows", _Int), ("row", _Int), ("numbers", _Pointer), ("seen", _Pointer))


class FinishedTree(ctypes.Structure):
    _fields_ = tuple(
        (name, _Pointer) for name in ("tokens", "parents", "places", "layers", "columns", "probs", "values", "norms")
    )


class Visibility(ctypes.Structure):
    """What the new tokens of a forward see; mirrors common.h."""

    _fields_ = (
        *((name, _Int) for name in ("num_rows", "num_new", "num_tail", "num_slots", "prompt_size")),
        ("seen", _Pointer),
        ("seen_strides", _Int * 2),
        *((name, _Pointer) for name in ("lengths", "prompt", "out")),
    )


class Verification(ctypes.Structure):
    """A drafted tree and the target's scores; mirrors common.h."""

    alive: tuple[object, ...]
    _fields_ = (
        *((name, _Int) for name in ("num_slots", "size", "depth", "vocab")),
        *((name, _Pointer) for name in ("p", "q", "q_norms", "tokens", "parents", "coins", "path")),
        *((name, _Int) for name in ("count", "next")),
        *((name, _Pointer) for name in ("first_child", "next_sibling", "scratch", "rows")),
    )


class Library:
    """The native functions, typed. Callers pass contiguous float32 CPU tensors unless said otherwise."""

    def __init__(self, path: Path, instruction_set: str | None = None) -> None:
        """`instruction_set`: "avx2", "avx512", "amx", or None for the best. The whole process gets it."""
        self._dll = ctypes.CDLL(str(path))
        self._dll.specdec_select.restype = ctypes.c_char_p
        self._dll.specdec_packed_bytes.restype = _Int
        self._dll.specdec_new_tree.restype = _Pointer
        self._dll.specdec_grow_tree.restype = self._dll.specdec_finish_tree.restype = _Int
        layer, attention, num_threads = ctypes.POINTER(Layer), ctypes.POINTER(Attention), ctypes.c_int
        signatures: dict[str, Sequence[type]] = {
            "select": (ctypes.c_char_p,),
            "packed_bytes": (_Int, _Int),
            "pack": (_Pointer, _Int, _Int, _Pointer, _Pointer, num_threads),
            "linear": (ctypes.POINTER(Matrix), _Pointer, _Int, _Pointer, num_threads),
            "attend": (attention, num_threads),
            "attention_inputs": (layer, _Pointer, _Int, *(_Pointer,) * 5, num_threads),
            "attention_and_mlp": (layer, attention, _Int, _Pointer, _Pointer, num_threads),
            "take": (ctypes.POINTER(Urn), _Pointer, _Int, ctypes.POINTER(Taken), _Int, *(_Pointer,) * 3),
            "new_tree": (ctypes.POINTER(TreeSettings),),
            "free_tree": (_Pointer,),
            "grow_tree": (_Pointer, _Pointer, _Pointer, _Int),
            "write_layer": (_Pointer, _Int, _Int, ctypes.POINTER(NextLayer)),
            "finish_tree": (_Pointer, ctypes.POINTER(FinishedTree)),
            "verify": (ctypes.POINTER(Verification), ctypes.c_int),
            "write_mask": (ctypes.POINTER(Visibility),),
            "move": (_Pointer, _Pointer, _Int, _Int, _Pointer, _Pointer, _Int),
        }
        for name, arguments in signatures.items():
            getattr(self._dll, f"specdec_{name}").argtypes = arguments
        self.attention_inputs = self._dll.specdec_attention_inputs
        self.attention_and_mlp = self._dll.specdec_attention_and_mlp
        self.take, self.verify = self._dll.specdec_take, self._dll.specdec_verify
        self.new_tree, self.free_tree = self._dll.specdec_new_tree, self._dll.specdec_free_tree
        self.grow_tree, self.write_layer = self._dll.specdec_grow_tree, self._dll.specdec_write_layer
        self.finish_tree, self.move = self._dll.specdec_finish_tree, self._dll.specdec_move
        self.write_mask = self._dll.specdec_write_mask
        self.instruction_set = self.select(instruction_set)

    def select(self, instruction_set: str | None) -> str:
        name = self._dll.specdec_select(instruction_set.encode() if instruction_set else None)
        if name is None:
            raise OSError(f"this processor has no {instruction_set or 'AVX2'}")
        return name.decode()

    def pack(self, weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed int8 weights (opaque layout) and the scale of each of the N outputs."""
        n, k = weight_NK.shape
        packed = torch.empty(self._dll.specdec_packed_bytes(n, k), dtype=torch.int8)
        scale_N = torch.empty(n)
        addresses = packed.data_ptr(), scale_N.data_ptr()
        self._dll.specdec_pack(weight_NK.data_ptr(), n, k, *addresses, torch.get_num_threads())
        return packed, scale_N

    def linear(self, matrix: Matrix, x_MK: torch.Tensor) -> torch.Tensor:
        out_MN = torch.empty(x_MK.shape[0], matrix.n)
        self._dll.specdec_linear(matrix, x_MK.data_ptr(), x_MK.shape[0], out_MN.data_ptr(), torch.get_num_threads())
        return out_MN

    def attend(self, query_BTHD: torch.Tensor, attention: Attention) -> torch.Tensor:
        out_BTHD = torch.empty_like(query_BTHD)
        attention.out = out_BTHD.data_ptr()
        self._dll.specdec_attend(attention, torch.get_num_threads())
        return out_BTHD


def num_blocks(vocab_size: int) -> int:
    """How many blocks a row of scores has, padded; mirrors draws.h."""
    return -(-vocab_size // 4096) * 16


def matrix(weight: torch.Tensor, n: int, k: int, scale: torch.Tensor | None, bias: torch.Tensor | None) -> Matrix:
    m = Matrix(weight.data_ptr(), address(scale), address(bias), n, k)
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
    visibility: tuple[int | None, bool, tuple[int, ...]] = (None, False, (0, 0, 0))
    if mask is not None:
        mask = mask if mask.dtype is torch.bool else plain(mask)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = tuple([0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)])
        visibility = (mask.data_ptr(), mask.dtype is torch.bool, strides[:3])
    a = Attention(B, T, S, H, K, D, *addresses, key.stride()[:3], value.stride()[:3], *visibility, scale)
    a.alive = (query_BTHD, key, value, mask)
    return a


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """float32 with a last stride of 1: the tensor itself in the usual case."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> Library | None:
    """The library, built if need be; None where torch has to do. Takes seconds once per machine, then milliseconds."""
    loaded = _load()
    return loaded if isinstance(loaded, Library) else None


def describe() -> str:
    """One line for people: which kernels are in use here, and why."""
    loaded = _load()
    if isinstance(loaded, Library):
        return f"native kernels ({loaded.instruction_set})"
    return f"torch kernels, no native ones: {loaded}"


@functools.cache
def _load() -> Library | str:
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        return f"they are for x86-64 on Linux and macOS, this is {platform.machine()} on {platform.system()}"
    try:
        return Library(_build())
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def _build() -> Path:
    """The path of the built library; the file's name changes with sources, flags and compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("no C compiler found (cc, gcc or clang); install one and the kernels will be built")
    files = sorted(SOURCES.glob("*.[ch]"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    digest = hashlib.sha256(b"\0".join([version, " ".join(FLAGS).encode(), *(f.read_bytes() for f in files)]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"
    target = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "kernels.so"
            units = [str(f) for f in files if f.suffix == ".c"]
            command = [compiler, *FLAGS, "-o", str(built), *units, "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode:
                raise OSError(f"{compiler} failed: {run.stderr.strip()[-500:]}")
            built.replace(target)  # atomic: another process sees no file or a whole one
    return target
