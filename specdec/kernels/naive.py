"""What the kernels compute, in plain torch and without care for speed: the oracles of the tests.

Shape letters: M rows, N outputs, K inputs, G groups of 64 inputs; B batch, T query tokens, S keys, H heads, D head_dim.
"""

import torch

GROUP = 64


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights in -127..127 and one scale per output: weight ~ q * scale."""
    largest_N = weight_NK.abs().amax(dim=1)
    return (weight_NK * _steps_per_unit(largest_N)[:, None]).round().to(torch.int8), largest_N / 127


def quantize_rows(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows [M, G, 64] in -127..127 and one scale per row and group [M, G]; K is padded with zeros."""
    groups_MGK = torch.nn.functional.pad(x_MK, (0, -x_MK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest_MG = groups_MGK.abs().amax(dim=2)
    return (groups_MGK * _steps_per_unit(largest_MG)[..., None]).round().to(torch.int8), largest_MG / 127


def _steps_per_unit(largest: torch.Tensor) -> torch.Tensor:
    """127 / largest, rounded once (127 / tensor would multiply by a rounded reciprocal); 0 for 0."""
    return torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)


def int8_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """Both sides quantised, integer sums within a group, groups added in float32 in order."""
    q_NK, scale_N = quantize_weight(weight_NK)
    q_MGK, scale_MG = quantize_rows(x_MK)
    q_NGK = torch.nn.functional.pad(q_NK, (0, -q_NK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    out_MN = torch.zeros(x_MK.shape[0], q_NK.shape[0])
    for g in range(q_MGK.shape[1]):
        sums_MN = q_MGK[:, g].long() @ q_NGK[:, g].long().T
        out_MN = out_MN + sums_MN.float() * scale_MG[:, g, None]
    out_MN = out_MN * scale_N
    return out_MN if bias_N is None else out_MN + bias_N


def attention(
    query_BTHD: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Softmax attention with grouped heads; None is causal, the last query being the last key. A query that sees
    nothing gets zeros."""
    T, H, S = query_BTHD.shape[1], query_BTHD.shape[2], key_BKSD.shape[2]
    group = H // key_BKSD.shape[1]
    scores_BHTS = query_BTHD.transpose(1, 2) @ key_BKSD.repeat_interleave(group, 1).transpose(2, 3) * scale
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype is torch.bool else mask
    scores_BHTS = scores_BHTS + bias
    weights_BHTS = scores_BHTS.softmax(-1).nan_to_num(0)
    return (weights_BHTS @ value_BKSD.repeat_interleave(group, 1)).transpose(1, 2)
