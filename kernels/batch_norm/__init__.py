"""Batch norm of a training step, with the residual addition and the ReLU that follow it in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.op import Op, transformable

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor rstd)"
)
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor mean, Tensor rstd, float eps, bool residual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


@transformable
def batch_norm(
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
    """Normalise every channel by the statistics of this batch, then add, then rectify.

    Args:
        x: [B, C, h, w] with at least one place, of any strides; channels-last is the fast one.
        weight, bias: [C], of any floating dtype.
        residual: [B, C, h, w] in the dtype of ``x``: added after the normalisation.
        relu: whether negative results become 0.
        eps: added to the variance.
        running_mean, running_var: [C], moved in place by ``momentum`` towards this batch's mean and unbiased variance.

    Returns:
        [B, C, h, w] in the dtype of ``x``.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"batch_norm: expected x [B, C, h, w] that is not empty, got {tuple(x.shape)}")
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"batch_norm: expected weight and bias of shape ({x.shape[1]},) for x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise ValueError(f"batch_norm: expected a residual like x, {tuple(x.shape)} {x.dtype}, got {got}")
    y, mean, rstd = OP(x, residual, weight, bias, eps, relu)
    if running_mean is not None and running_var is not None:
        n = x.numel() // x.shape[1]
        unbiased = (rstd**-2 - eps).clamp_(min=0) * (n / max(n - 1, 1))
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def _supports_cpu(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(not t.is_cpu or t.dtype != torch.float32 for t in tensors):
        return "expected float32 tensors on the CPU"
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4):
        return "expected channels-last tensors"
    return None


def _fake(x, residual, weight, bias, eps, relu):
    mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_backward(dy, x, y, weight, mean, rstd, eps, residual):
    dx = torch.empty_like(x)
    return dx, torch.empty_like(dx) if residual else x.new_empty(0), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, relu = inputs
    y, mean, rstd = output
    ctx.residual, ctx.bias_dtype = residual is not None, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, y if relu else None, weight, mean, rstd)


def _backward(ctx, dy, *_):
    x, y, weight, mean, rstd = ctx.saved_tensors
    if x.is_contiguous(memory_format=torch.channels_last):
        dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dresidual, dweight, dbias = OP.backward(dy, x, y, weight, mean, rstd, ctx.eps, ctx.residual)
    return dx, dresidual if ctx.residual else None, dweight, dbias.to(ctx.bias_dtype), None, None


OP = Op(__name__, (_FORWARD, _fake), (_BACKWARD, _fake_backward), compiled={"cpu": _supports_cpu}, autograd=(_setup, _backward))
