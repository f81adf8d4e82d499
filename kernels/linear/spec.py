"""A Linear, x·Wᵀ + b: definition, cases, floors. Every product of the towers with a weight is one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "C64": dict(rows=(50,), C=64, out=192),
    **{f"C{C}": dict(rows=(3, 5), C=C, out=C) for C in (320, 512, 640, 768, 1024, 1152)},
    "wider": dict(rows=(77,), C=64, out=256),
    "narrower": dict(rows=(77,), C=256, out=64),
    "one row": dict(rows=(1,), C=64, out=64),
    "prime": dict(rows=(7, 13), C=37, out=101),
    "packed tokens": dict(rows=(301,), C=64, out=128),
    "no bias": dict(rows=(17,), C=64, out=128, bias=False),
    "one column": dict(rows=(9,), C=5, out=1),
    "no rows": dict(rows=(0,), C=64, out=32),
    "rows apart": dict(rows=(6, 17), C=64, out=64, layout="rows apart"),
    "transposed": dict(rows=(31,), C=64, out=48, layout="transposed"),
    "transposed weight": dict(rows=(31,), C=64, out=48, layout="transposed weight"),
}
BENCH: dict[str, dict[str, Any]] = {
    "demo text QKV": dict(rows=(900,), C=128, out=384),
    "demo image fc": dict(rows=(2176,), C=192, out=768),
    "text of 12 fc": dict(rows=(384,), C=512, out=2048),
    "B/32 QKV, 8 images": dict(rows=(8, 50), C=768, out=2304),
    "B/32 fc, 8 images": dict(rows=(8, 50), C=768, out=3072),
    "B/32 proj, 64 images": dict(rows=(64, 50), C=3072, out=768),
}


def inputs(generator: torch.Generator, rows: tuple[int, ...], C: int, out: int, bias=True, layout="plain") -> dict[str, Any]:
    """Arguments of ``linear`` in fp64; ``rows``: the leading dimensions of x."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    x, weight = normal(*rows, C), normal(out, C) * C**-0.5
    if layout == "rows apart":
        x = normal(*rows[:-1], 2 * rows[-1], C)[..., ::2, :]
    elif layout == "transposed":
        x = normal(C, *rows).movedim(0, -1)
    elif layout == "transposed weight":
        weight = (normal(C, out) * C**-0.5).T
    return dict(x=x, weight=weight) | (dict(bias=normal(out)) if bias else {})


def floors(itemsize: int, rows: tuple[int, ...], C: int, out: int, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: one GEMM and two, every operand once."""
    M = torch.Size(rows).numel()
    gemm = 2 * M * C * out
    return {
        "forward": (gemm, itemsize * (M * C + C * out + M * out)),
        "backward": (2 * gemm, itemsize * (2 * M * C + 2 * C * out + M * out)),
    }


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``linear`` means: differentiable, in the dtype of its input."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype).to(x.dtype), weight.to(x.dtype), bias)  # operands are rounded, the sum is not


def supports(*args: Any) -> None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


def backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (given the weight), of the weight (given x) and of the bias; empty where not asked for."""
    rows = dy.flatten(0, -2)
    dx = dy.new_empty(0) if weight is None else (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
    dweight = dy.new_empty(0) if x is None else rows.T @ x.flatten(0, -2)
    return dx, dweight, rows.sum(0) if bias else dy.new_empty(0)
