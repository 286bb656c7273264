"""The structures of common.h, field by field."""

import ctypes

import torch

Pointer, Int = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """float32 weights [n, k] (32 bits), bfloat16 ones (16) or packed ones; mirrors common.h, as do the two below."""

    alive: tuple[torch.Tensor | None, ...]  # the tensors that the pointers point into

    _fields_ = (("data", Pointer), ("scale", Pointer), ("bias", Pointer), ("n", Int), ("k", Int), ("bits", Int))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "head_eps")),
        *((name, Int) for name in ("num_heads", "num_kv_heads", "head_dim")),
    )


class Attention(ctypes.Structure):
    alive: tuple[torch.Tensor | None, ...]
    _fields_ = (
        *((name, Int) for name in "BTSHKD"),
        *((name, Pointer) for name in "qkv"),
        ("k_strides", Int * 3),
        ("v_strides", Int * 3),
        ("pages", Pointer),
        ("mask", Pointer),
        ("mask_is_bool", Int),
        ("mask_strides", Int * 3),
        ("scale", ctypes.c_float),
        ("out", Pointer),
        ("scores", Pointer),
        ("padded_keys", Int),
    )


class PackedForward(ctypes.Structure):
    """Tokens of several texts in a forward of all layers; mirrors common.h."""

    alive: tuple[object, ...]
    _fields_ = (
        ("layers", Pointer),
        *((name, Int) for name in ("num_layers", "rows")),
        *((name, Pointer) for name in ("x", "cos", "sin", "attentions")),
        ("count", Int),
        *((name, Pointer) for name in ("places", "q", "k", "v", "hidden", "out", "kept")),
    )


class StackForward(ctypes.Structure):
    """Tokens of a cache's rows in a forward of several layers; mirrors common.h."""

    alive: tuple[object, ...]
    _fields_ = (
        ("layers", Pointer),
        *((name, Int) for name in ("num_layers", "q_apart")),
        *((name, Pointer) for name in ("x", "cos", "sin", "attention", "keys", "values", "firsts")),
        *((name, Pointer) for name in ("q", "k", "v", "hidden", "out")),
    )


class HeadForward(ctypes.Structure):
    """The layers of a draft head, and what is before them; mirrors common.h, as does the next."""

    alive: tuple[object, ...]
    _fields_ = (
        ("layers", StackForward),
        ("first", Matrix),
        ("embeddings", Pointer),
        ("num_embeddings", Int),
        *((name, Pointer) for name in ("tokens", "positions", "states", "cos", "sin")),
    )


class HeadLogits(ctypes.Structure):
    alive: tuple[object, ...]
    _fields_ = (
        *((name, Matrix) for name in ("last", "lm_head")),
        ("norm", Pointer),
        ("eps", ctypes.c_float),
        ("x", Pointer),
        ("rows", Int),
        ("logits", Pointer),
    )


class Candidates(ctypes.Structure):
    """Rows of scores whose tokens are taken out, and what was found of them; mirrors common.h, as does the next."""

    _fields_ = (("x", Pointer), ("vocab", Int), ("peaks", Pointer), ("shares", Pointer), ("norms", Pointer))


class Taken(ctypes.Structure):
    alive: tuple[object, ...]
    _fields_ = (("tokens", Pointer), ("counts", Pointer), ("room", Int))


class Visibility(ctypes.Structure):
    """What the new tokens of a forward see; mirrors common.h."""

    _fields_ = (
        *((name, Int) for name in ("num_rows", "num_new", "num_tail", "num_slots", "prompt_size")),
        ("seen", Pointer),
        ("seen_strides", Int * 2),
        *((name, Pointer) for name in ("lengths", "prompt", "out")),
    )


class Verification(ctypes.Structure):
    """A drafted tree and the target's scores; mirrors common.h."""

    alive: tuple[object, ...]
    _fields_ = (
        *((name, Int) for name in ("num_slots", "size", "depth", "vocab")),
        *((name, Pointer) for name in ("p", "q", "tokens", "parents", "coins", "path")),
        *((name, Int) for name in ("count", "next")),
        *((name, Pointer) for name in ("first_child", "next_sibling", "scratch", "rows")),
    )
