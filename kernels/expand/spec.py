"""The first half of an MLP, act(x·Wᵀ + b): definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "exact": dict(rows=3, C=64, quick_gelu=False),
    "quick": dict(rows=3, C=64),
    "one row": dict(rows=1, C=72),
    "prime": dict(rows=131, C=37),
    "transposed": dict(rows=10, C=64, transposed=True),
    "no rows": dict(rows=0, C=64),
    "large values": dict(rows=5, C=64, spread=40.0),
}
BENCH: dict[str, dict[str, Any]] = {}  # a CPU has no kernel for it
BENCH_GPU: dict[str, dict[str, Any]] = {
    "B/16 block x 256": dict(rows=256 * 197, C=768),
    "L/14 block x 64": dict(rows=64 * 257, C=1024),
}


def inputs(generator: torch.Generator, rows: int, C: int, quick_gelu=True, transposed=False, spread=1.0) -> dict[str, Any]:
    """Arguments of ``expand`` in fp64, with F = 4C."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    x = (normal(C, rows).T if transposed else normal(rows, C)) * spread
    return dict(x=x, weight=normal(4 * C, C) * C**-0.5, bias=0.5 * normal(4 * C), quick_gelu=quick_gelu)


def floors(itemsize: int, rows: int, C: int, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: one GEMM, and two; what backward needs is written."""
    gemm, weights, wide, narrow = 2 * rows * C * 4 * C, 4 * C * C, rows * 4 * C, rows * C
    return {
        "forward": (gemm, itemsize * (weights + narrow + 2 * wide)),
        "backward": (2 * gemm, itemsize * (2 * weights + 2 * narrow + 2 * wide)),
    }


def reference(x: Tensor, weight: Tensor, bias: Tensor, quick_gelu: bool = True) -> Tensor:
    """What ``expand`` means: differentiable, in the dtype of its input."""
    h = F.linear(x, weight, bias)
    return h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h)


def supports(*args: Any) -> None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, quick_gelu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    h = F.linear(x, weight)
    wide = h + bias
    return wide * torch.sigmoid(1.702 * wide) if quick_gelu else F.gelu(wide), h if keep else h.new_empty(0)
