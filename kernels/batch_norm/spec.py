"""Batch norm in training (Ioffe & Szegedy 2015), residual addition, ReLU: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    **{f"C{C}": dict(shape=(3, C, 4, 5)) for C in (8, 16, 24, 64, 320)},
    **{f"C{C}, relu": dict(shape=(3, C, 4, 5), relu=True) for C in (8, 16, 37, 64)},
    **{f"C{C}, residual": dict(shape=(2, C, 3, 7), relu=True, residual=True) for C in (8, 64, 101)},
    "residual alone": dict(shape=(2, 16, 3, 3), residual=True),
    "two values": dict(shape=(2, 8, 1, 1)),
    "many rows": dict(shape=(5, 8, 31, 37), relu=True),
    "channels first": dict(shape=(3, 16, 4, 5), relu=True, residual=True, channels_last=False),
    "far from zero": dict(shape=(4, 16, 6, 6), offset=100.0),
}
BENCH: dict[str, dict[str, Any]] = {
    "RN50 stem": dict(shape=(8, 32, 112, 112), relu=True),
    "RN50 stage 3": dict(shape=(8, 1024, 14, 14), relu=True, residual=True),
    "demo stem": dict(shape=(128, 8, 32, 32), relu=True),
    "demo stage 1": dict(shape=(128, 64, 16, 16), relu=True, residual=True),
}


def inputs(
    generator: torch.Generator, shape: tuple[int, ...], relu=False, residual=False, channels_last=True, offset=0.0
) -> dict[str, Any]:
    """Arguments of ``batch_norm`` in fp64."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = dict(x=(normal(*shape) + offset).contiguous(memory_format=layout))
    made |= dict(weight=1 + 0.2 * normal(shape[1]), bias=0.2 * normal(shape[1]))
    return made | (dict(residual=normal(*shape).contiguous(memory_format=layout)) if residual else {}) | dict(relu=relu)


def floors(itemsize: int, shape: tuple[int, ...], relu=False, residual=False, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: statistics first, so every input is read twice."""
    elements = torch.Size(shape).numel()
    back = 5 + 2 * relu + residual  # x, dy (and y) in twice, dx (and dresidual) out
    return {
        "forward": (7 * elements, (3 + residual) * elements * itemsize),
        "backward": (11 * elements, back * elements * itemsize),
    }


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
) -> Tensor:
    """What ``batch_norm`` means: differentiable, in the dtype of its input."""
    y = F.batch_norm(x, running_mean, running_var, weight.to(x.dtype), bias.to(x.dtype), True, momentum, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def supports(*args: Any) -> None:
    return None


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, relu: bool):
    wide = torch.promote_types(x.dtype, torch.float32)  # wide gains make torch keep the statistics wide too
    weight, bias = weight.to(wide).contiguous(), bias.to(wide).contiguous()  # torch's kernels take any stride for 1
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    y = y if residual is None else y.add_(residual)
    return torch.empty_like(x).copy_(y.relu_() if relu else y), mean, rstd


def backward(dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float, residual: bool):
    dy = dy if y is None else torch.where(y > 0, dy, 0)
    wide = weight.to(mean.dtype).contiguous()
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, wide, None, None, mean, rstd, True, eps, [True, True, True]
    )
    dresidual = torch.empty_like(x).copy_(dy) if residual else x.new_empty(0)
    return torch.empty_like(x).copy_(dx), dresidual, dweight.to(weight.dtype), dbias.to(weight.dtype)
