"""A convolution without bias, 3 × 3 with padding 1 or 1 × 1, of few channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import dispatch, processor
from clipfast.kernels.convolution.spec import layout
from clipfast.kernels.op import Op, transformable

_BACKWARD = "(Tensor dy, Tensor x, Tensor weight, int stride, bool need_x, bool need_weight) -> (Tensor dx, Tensor dweight)"
# Numbers in a weight up to which it stays in L2 beside the images: 32 to 64 channels with 3 × 3, 128 to 256 with 1 × 1.
# Measured on an EPYC of Zen 5 against oneDNN, at the sizes of the demo and of RN50, forward and backward: 1.0 to 1.8 x as fast
# up to here, 0.3 to 1.1 x beyond (bench/test_kernels.py, "convolution").
MOST = 1 << 15
# With AVX2 only from here on (of RN50 the last of the stem and the first stage), where forward and backward are 1.3 to 1.4 x as
# fast as oneDNN's; at the demo's sizes 0.9 to 1.0 x (a Zen 5 held to AVX2).
LEAST_AVX2 = 1 << 12


@transformable
def convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The convolutions of a ResNet.

    ``F.conv2d``, the vendor's, but for fp32 of few channels on a CPU. Autocast holds.

    Args:
        x: [B, I, H, W], of any strides; channels-last is the fast one.
        weight: [O, I, 3, 3] or [O, I, 1, 1], of any strides.
        stride: from one place to the next, along both axes.

    Returns:
        [B, O, h, w] in the dtype of ``x``, h = ceil(H / stride).

    Raises:
        ValueError: a shape does not fit, or the stride is below 1.
    """
    if x.ndim != 4 or tuple(weight.shape[1:]) not in {(x.shape[1], n, n) for n in (1, 3)}:
        raise ValueError(
            f"convolution: expected x [B, I, H, W] and weight [O, I, 3, 3] or [O, I, 1, 1], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if stride < 1:
        raise ValueError(f"convolution: expected a stride of at least 1, got {stride}")
    if _vendors(x, weight, stride):
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    return OP(x, weight.contiguous(memory_format=torch.channels_last), stride)


def _vendors(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether F.conv2d itself is the choice."""
    if (vendors := dispatch.settled(x, "cpu")) is not None:
        return vendors
    return weight.numel() > MOST or _supports_cpu(x, weight, stride) is not None


def _supports_cpu(*args: object) -> str | None:
    *images, weight = [a for a in args if isinstance(a, Tensor)]
    stride = next(a for a in args if isinstance(a, int))
    if any(not t.is_cpu or t.dtype != torch.float32 for t in (*images, weight)):
        return "expected float32 tensors on the CPU"
    if processor.NAME != "avx512" and weight.numel() < LEAST_AVX2 and not dispatch.forced():
        return f"oneDNN is as fast for less than {LEAST_AVX2:,} weights without AVX-512, got {weight.numel():,}"
    O, I, size, _ = weight.shape
    if size == 1 and (O % 16 or I % 16 or stride > 1):
        return f"expected multiples of 16 channels for 1 × 1, got a weight {tuple(weight.shape)} and stride {stride}"
    if not weight.numel() or any(not t.numel() or not t.is_contiguous(memory_format=torch.channels_last) for t in images):
        return "expected channels-last images that are not empty"
    return None


def _fake(x, weight, stride):
    (B, _, H, W), up = x.shape, stride - 1
    y = x.new_empty((B, len(weight), (H + up) // stride, (W + up) // stride))
    return y.contiguous(memory_format=layout(x))


def _fake_backward(dy, x, weight, stride, need_x, need_weight):
    none = dy.new_empty(0)
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x else none
    return dx, torch.empty_like(weight, memory_format=torch.channels_last) if need_weight else none


def _setup(ctx, inputs, output):
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dy = dy.contiguous(memory_format=layout(x))
    need = ctx.needs_input_grad
    dx, dweight = OP.backward(dy, x, weight, ctx.stride, need[0], need[1])
    return dx if need[0] else None, dweight if need[1] else None, None


OP = Op(
    __name__,
    forward=("(Tensor x, Tensor weight, int stride) -> Tensor", _fake),
    backward=(_BACKWARD, _fake_backward),
    compiled={"cpu": _supports_cpu},
    autograd=(_setup, _backward),
)
