"""A convolution, 3 × 3 with padding 1 or 1 × 1: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "3 to 8, stride 2": dict(shape=(2, 3, 14, 12), out=8, stride=2),
    "3 to 8, stride 2, odd": dict(shape=(3, 3, 9, 7), out=8, stride=2),
    **{f"{I} to {O}": dict(shape=(2, I, 6, 24), out=O) for I, O in ((8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (3, 5))},
    "odd rows": dict(shape=(3, 8, 5, 13), out=8),
    "prime": dict(shape=(3, 7, 11, 13), out=29),
    "one place": dict(shape=(4, 8, 1, 1), out=16),
    "two columns": dict(shape=(2, 16, 9, 2), out=8, stride=2),
    "bands of rows": dict(shape=(2, 16, 40, 37), out=16),
    "more tasks than images": dict(shape=(40, 8, 4, 4), out=8),
    "channels first": dict(shape=(2, 8, 6, 5), out=8, channels_last=False),
    **{f"1 × 1, {I} to {O}": dict(shape=(2, I, 7, 11), out=O, size=1) for I, O in ((16, 64), (64, 48), (128, 32), (16, 16))},
    "1 × 1, one place": dict(shape=(5, 32, 1, 1), out=16, size=1),
    "no images": dict(shape=(0, 8, 6, 5), out=8),
}
BENCH: dict[str, dict[str, Any]] = {
    "demo stem 1": dict(shape=(128, 3, 48, 48), out=8, stride=2),
    "demo stem 3": dict(shape=(128, 8, 24, 24), out=16),
    "demo stage 2": dict(shape=(128, 64, 12, 12), out=32, size=1),
    "RN50 stem 3, 8 images": dict(shape=(8, 32, 112, 112), out=64),
    "RN50 stage 1, 8 images": dict(shape=(8, 64, 56, 56), out=256, size=1),
}
UNORDERED = ("cuda",)  # cuDNN may sum a weight's gradient by atomics: equal calls then differ in their last bits


def inputs(
    generator: torch.Generator, shape: tuple[int, ...], out: int, size=3, stride=1, channels_last=True
) -> dict[str, Any]:
    """Arguments of ``convolution`` in fp64."""

    def normal(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)
        return drawn.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    return dict(x=normal(*shape), weight=normal(out, shape[1], size, size) * (size**2 * shape[1]) ** -0.5, stride=stride)


def floors(itemsize: int, shape: tuple[int, ...], out: int, size=3, stride=1, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: one GEMM and two, every operand once."""
    B, I, H, W = shape
    places = B * -(-H // stride) * -(-W // stride)
    x, y, weight = torch.Size(shape).numel(), places * out, size**2 * I * out
    gemm = 2 * places * weight
    return {"forward": (gemm, itemsize * (x + y + weight)), "backward": (2 * gemm, itemsize * (2 * x + y + 2 * weight))}


def reference(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """What ``convolution`` means: differentiable, in the dtype of its input."""
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)


def supports(*args: Any) -> None:
    return None


def layout(x: Tensor) -> torch.memory_format:
    """That of the images, which the result and the gradient have too."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2).contiguous(memory_format=layout(x))


def backward(dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where not asked for."""
    pad, wanted = [weight.shape[-1] // 2] * 2, [need_x, need_weight, False]
    grads = torch.ops.aten.convolution_backward(dy, x, weight, None, [stride] * 2, pad, [1, 1], False, [0, 0], 1, wanted)
    none = dy.new_empty(0)
    dx = grads[0].contiguous(memory_format=layout(x)) if need_x else none
    return dx, grads[1].contiguous(memory_format=torch.channels_last) if need_weight else none
