"""Bias and activation between the two Linears of a block's MLP: definition, cases, floors.

QuickGELU x·σ(1.702x) is what OpenAI's weights were trained with; GELU x·Φ(x) is Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    **{f"quick C{C}": dict(rows=3, C=C) for C in (64, 320, 512)},
    **{f"exact C{C}": dict(rows=3, C=C, quick_gelu=False) for C in (64, 320)},
    "one row": dict(rows=1, C=64),
    "prime": dict(rows=131, C=37),
    "transposed": dict(rows=10, C=64, transposed=True),
    "no rows": dict(rows=0, C=64),
    "large values": dict(rows=5, C=64, spread=40.0),
}
BENCH: dict[str, dict[str, Any]] = {
    "text block": dict(rows=1024, C=512),
    "B/32 block": dict(rows=32 * 50, C=768),
    "B/32 block, exact": dict(rows=32 * 50, C=768, quick_gelu=False),
}
BENCH_GPU: dict[str, dict[str, Any]] = {  # what fills a GPU
    "B/16 block x 256": dict(rows=256 * 197, C=768),
    "L/14 block x 64": dict(rows=64 * 257, C=1024),
}


def inputs(generator: torch.Generator, rows: int, C: int, quick_gelu=True, transposed=False, spread=1.0) -> dict[str, Any]:
    """Arguments of ``mlp`` in fp64, with F = 4C."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    return dict(
        x=(normal(C, rows).T if transposed else normal(rows, C)) * spread,
        fc_weight=normal(4 * C, C) * C**-0.5,
        fc_bias=0.5 * normal(4 * C),
        proj_weight=normal(C, 4 * C) * (4 * C) ** -0.5,
        proj_bias=0.5 * normal(C),
        quick_gelu=quick_gelu,
    )


def floors(itemsize: int, rows: int, C: int, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: two GEMMs each way twice, every operand once."""
    gemm, weights, wide, narrow = 2 * rows * C * 4 * C, 8 * C * C, rows * 4 * C, rows * C
    return {
        "forward": (2 * gemm, itemsize * (weights + 2 * narrow + wide)),
        "backward": (4 * gemm, itemsize * (2 * weights + 3 * narrow + wide)),
    }


def reference(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool = True
) -> Tensor:
    """What ``mlp`` means: differentiable, in the dtype of its input."""
    h = F.linear(x, fc_weight, fc_bias)
    return F.linear(h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h), proj_weight, proj_bias)


def supports(*args: Any) -> None:
    return None


def forward(h: Tensor, bias: Tensor, quick_gelu: bool) -> Tensor:
    x = (h + bias).to(h.dtype).contiguous()
    return x * torch.sigmoid(1.702 * x) if quick_gelu else F.gelu(x)


def backward(dy: Tensor, h: Tensor, bias: Tensor, quick_gelu: bool) -> tuple[Tensor, Tensor]:
    x = (h + bias).to(h.dtype).contiguous()
    if quick_gelu:
        gate = torch.sigmoid(1.702 * x)
        dh = dy * gate * (1 + 1.702 * x * (1 - gate))
    else:
        dh = torch.ops.aten.gelu_backward(dy.contiguous(), x)
    return dh, dh.flatten(0, -2).sum(0, dtype=bias.dtype)
