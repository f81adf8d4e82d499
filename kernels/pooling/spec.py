"""Attention of one query per sequence, keys and values never formed: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    **{f"L{L}": dict(lengths=[L] * B, C=64, heads=1) for L, B in ((1, 3), (3, 2), (17, 3), (50, 2), (77, 2), (197, 1))},
    **{f"L{L}": dict(lengths=[L], C=128, heads=2) for L in (257, 577)},
    **{f"C{C}": dict(lengths=[5, 5], C=C, heads=C // 64) for C in (320, 512, 768, 1024)},
    "heads of 32": dict(lengths=[17, 17], C=96, heads=3),
    "prime width": dict(lengths=[7, 7], C=37, heads=1),
    "transposed": dict(lengths=[17] * 3, C=192, heads=3, transposed=True),
    "no sequence": dict(lengths=[], C=64, heads=1, packed=True),
    "packed": dict(lengths=[3, 1, 0, 17, 40, 1, 9], C=128, heads=2, packed=True),
    "packed, all empty": dict(lengths=[0, 0], C=64, heads=1, packed=True),
    "packed, strided": dict(lengths=[12, 0, 30, 5], C=192, heads=3, packed=True, transposed=True),
    "large scores": dict(lengths=[50, 50], C=64, heads=1, spread=4.0),
}
BENCH: dict[str, dict[str, Any]] = {
    "small image": dict(lengths=[17] * 128, C=192, heads=3),
    "short names": dict(lengths=[4 + i % 7 for i in range(128)], C=128, heads=2, packed=True),
    "B/32 image": dict(lengths=[50] * 32, C=768, heads=12),
    "B/32 text": dict(lengths=[6 + i % 13 for i in range(32)], C=512, heads=8, packed=True),
}
BENCH_GPU: dict[str, dict[str, Any]] = {  # what fills a GPU
    "B/16 image x 256": dict(lengths=[197] * 256, C=768, heads=12),
    "L/14 image x 256": dict(lengths=[257] * 256, C=1024, heads=16),
    "text x 4096": dict(lengths=[6 + i % 13 for i in range(4096)], C=512, heads=8, packed=True),
}


def inputs(
    generator: torch.Generator, lengths: list[int], C: int, heads: int, packed=False, transposed=False, spread=1.0
) -> dict[str, Any]:
    """Arguments of ``pooling`` in fp64."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    B, T = len(lengths), sum(lengths)
    if packed:
        x = normal(T, 2 * C)[:, C:] if transposed else normal(T, C)
    else:
        x = normal(T // B, B, C).transpose(0, 1) if transposed else normal(B, T // B, C)
    ends = torch.tensor([0, *lengths], device=generator.device).cumsum(0, dtype=torch.int32)
    return dict(
        x=x,
        query=normal(B, C) * spread,
        **{name: normal(C, C) * C**-0.5 for name in ("q_weight", "k_weight", "v_weight")},
        **{name: 0.2 * normal(C) for name in ("q_bias", "v_bias")},
        heads=heads,
    ) | (dict(cu_seqlens=ends, max_length=max(lengths, default=0)) if packed else {})


def floors(itemsize: int, lengths: list[int], C: int, heads: int, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: x once each way and dx, beside the weights."""
    B, T = len(lengths), sum(lengths)
    gemms, tokens = 3 * 2 * B * C * C, 2 * T * C * heads
    return {
        "forward": (gemms + 2 * tokens, itemsize * (T * C + 3 * C * C + 2 * B * C)),
        "backward": (2 * gemms + 5 * tokens, itemsize * (2 * T * C + 6 * C * C + 3 * B * C)),
    }


def reference(
    x: Tensor,
    query: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    heads: int,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """What ``pooling`` means, with keys and values formed: differentiable, in the dtype of its input."""
    tokens, mask, _ = _tokens(x, cu_seqlens, max_length or 0)

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = split(F.linear(query, q_weight, q_bias)[:, None])
    k, v = split(F.linear(tokens, k_weight)), split(F.linear(tokens, v_weight))
    scores = (k @ q.transpose(2, 3)).squeeze(-1).transpose(1, 2) * (x.shape[-1] // heads) ** -0.5  # [B, L, H]
    p = _softmax(scores, mask).transpose(1, 2)[:, :, None]
    return (p @ v).flatten(1) + v_bias


def supports(*args: Any) -> None:
    return None


def _pad(cu_seqlens: Tensor, T: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each padded place [B, L] (T where there is none), whether there is one [B, L], padded place of each row [T]."""
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None]
    index = start + torch.arange(L, device=cu_seqlens.device)
    mask = index < end
    row = torch.arange(T, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens[1:], row.int(), right=True)
    return index.where(mask, T), mask, owner * L + row - start[:, 0][owner]


def forward(x: Tensor, u: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    """y [B, H, C] in the dtype of x; log-sum-exp of the scores [B, H], fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, mask, _ = _tokens(x.to(wide), cu_seqlens, max_length)
    scores = tokens @ u.to(wide).transpose(1, 2)  # [B, L, H]
    y = _softmax(scores, mask).transpose(1, 2) @ tokens
    return y.to(x.dtype), (scores if mask is None else scores.where(mask, -torch.inf)).logsumexp(1)


def backward(
    dy: Tensor, x: Tensor, u: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor | None, max_length: int
) -> tuple[Tensor, Tensor]:
    wide = lse.dtype
    tokens, mask, place = _tokens(x.to(wide), cu_seqlens, max_length)
    dy_wide, u_wide = dy.to(wide), u.to(wide)
    p = _softmax(tokens @ u_wide.transpose(1, 2), mask)
    dp = tokens @ dy_wide.transpose(1, 2)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    dx = p @ dy_wide + ds @ u_wide
    du = ds.transpose(1, 2) @ tokens
    return (dx if place is None else dx.flatten(0, 1)[place]).to(x.dtype), du.to(u.dtype)


def _tokens(x: Tensor, cu_seqlens: Tensor | None, L: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x padded to [B, L, C] with zeros, the mask of what is no padding [B, L, 1], the padded place of each row [T]."""
    if cu_seqlens is None:
        return x, None, None
    index, mask, place = _pad(cu_seqlens, x.shape[0], L)
    return F.pad(x, (0, 0, 0, 1))[index], mask[..., None], place


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over L; zero where there is no token, also in a sequence without any."""
    return scores.softmax(1) if mask is None else scores.where(mask, -torch.inf).softmax(1).where(mask, 0)
