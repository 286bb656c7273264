"""What the kernels compute, in plain torch and without care for speed: the oracles of the tests.

Shape letters: M rows, N outputs, K inputs, G groups of inputs; B batch, T query tokens, S keys, H heads, D head_dim.
"""

from collections.abc import Iterator

import torch

GROUP, GROUP4 = 64, 32
"""Inputs that share a scale within a row, by weights of 8 bits with a scale per output, and by all others."""


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weights in -127..127 and one scale per output: weight ~ q * scale."""
    largest_N = weight_NK.abs().amax(dim=1)
    return (weight_NK * _steps_per_unit(largest_N)[:, None]).round().to(torch.int8), largest_N / 127


def quantize_rows(x_MK: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows [M, G, group] in -127..127 and one scale per row and group [M, G]; K is padded with zeros."""
    groups_MGK = torch.nn.functional.pad(x_MK, (0, -x_MK.shape[1] % group)).unflatten(1, (-1, group))
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


# ---- 4 bits ----

_PARTS = ((1, 1), (0.9, 1), (1, 0.9), (0.87, 0.87))
"""Of the lowest and the highest weight of a group: where searches begin."""

Group4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes of 0..15 [N, G, 32], a scale and an offset [N, G, 1]: weight ~ codes * scale + offset."""


def quantize_weight4(weight_NK: torch.Tensor) -> Group4:
    """Codes as uint8, scales and offsets as float16. The last weight of an output is repeated to fill its last group.

    From each start the nearest codes are taken, then twice what least squares say for the codes; the smallest error
    wins.
    """
    padding = -weight_NK.shape[1] % GROUP4
    filled_NK = torch.cat([weight_NK, weight_NK[:, -1:].expand(-1, padding)], 1)
    group_NGK = filled_NK.unflatten(1, (-1, GROUP4))
    best = None
    for found in _searches(group_NGK):
        best = found if best is None else _better(group_NGK, best, found)
    assert best is not None
    codes_NGK, scale_NG1, offset_NG1 = best
    return codes_NGK.to(torch.uint8), scale_NG1, offset_NG1


def _searches(group_NGK: torch.Tensor) -> Iterator[Group4]:
    low_NG1, high_NG1 = group_NGK.amin(2, keepdim=True), group_NGK.amax(2, keepdim=True)
    for low, high in _PARTS:
        found = _nearest(group_NGK, (high_NG1 * high - low_NG1 * low) / 15, low_NG1 * low)
        yield found
        for _ in range(2):
            found = _fitted(group_NGK, low_NG1, found)
            yield found


def _nearest(group_NGK: torch.Tensor, scale_NG1: torch.Tensor, offset_NG1: torch.Tensor) -> Group4:
    limit = torch.finfo(torch.float16).max
    scale_NG1, offset_NG1 = (part.clamp(-limit, limit).half() for part in (scale_NG1, offset_NG1))
    inverse_NG1 = torch.where(scale_NG1 > 0, 1 / scale_NG1.float(), 0)
    return ((group_NGK - offset_NG1) * inverse_NG1).round().clamp(0, 15), scale_NG1, offset_NG1


def _fitted(group_NGK: torch.Tensor, low_NG1: torch.Tensor, found: Group4) -> Group4:
    height_NGK = group_NGK - low_NG1
    code_NG1, height_NG1 = found[0].mean(2, keepdim=True), height_NGK.mean(2, keepdim=True)
    variance_NG1 = found[0].var(2, correction=0, keepdim=True)
    covariance_NG1 = (found[0] * height_NGK).mean(2, keepdim=True) - code_NG1 * height_NG1
    scale_NG1 = covariance_NG1 / variance_NG1
    fitted = _nearest(group_NGK, scale_NG1, low_NG1 + height_NG1 - scale_NG1 * code_NG1)
    return _where(variance_NG1 > 0, fitted, found)


def _better(group_NGK: torch.Tensor, one: Group4, other: Group4) -> Group4:
    error_NG1, other_NG1 = ((dequantize4(found) - group_NGK).square().sum(2, keepdim=True) for found in (one, other))
    return _where(other_NG1 < error_NG1, other, one)


def _where(chosen_NG1: torch.Tensor, one: Group4, other: Group4) -> Group4:
    codes, scale, offset = (torch.where(chosen_NG1, *pair) for pair in zip(one, other, strict=True))
    return codes, scale, offset


def dequantize4(group: Group4) -> torch.Tensor:
    codes_NGK, scale_NG1, offset_NG1 = group
    """[N, G, 32]."""
    return codes_NGK * scale_NG1.float() + offset_NG1.float()


def int4_linear(x_MK: torch.Tensor, group: Group4, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """Both sides quantised, integer sums within 32 inputs, which are added in float32 in order."""
    codes_NGK, scale_NG1, offset_NG1 = group[0].long(), group[1].float(), group[2].float()
    q_MGK, scale_MG = quantize_rows(x_MK, GROUP4)
    q_MGK = q_MGK.long()
    out_MN = torch.zeros(x_MK.shape[0], codes_NGK.shape[0])
    for g in range(codes_NGK.shape[1]):
        sums_MN, totals_M1 = (q_MGK[:, g] @ codes_NGK[:, g].T).float(), q_MGK[:, g].sum(1, keepdim=True).float()
        scale_M1 = scale_MG[:, g, None]
        out_MN = out_MN + totals_M1 * scale_M1 * offset_NG1[:, g, 0]
        out_MN = out_MN + sums_MN * scale_NG1[:, g, 0] * scale_M1
    return out_MN if bias_N is None else out_MN + bias_N


# ---- attention ----


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
