"""Layer norm, with the residual addition before it in the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.op import Op, transformable

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@transformable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
    """Normalise the last dimension, after adding ``residual`` when there is one.

    Args:
        x: [..., C], any strides; computed in fp32 (fp64 for fp64) and returned in its own dtype.
        weight, bias: [C], of any floating dtype.
        residual: [..., C] like ``x``: what is added to it first.
        eps: added to the variance.

    Returns:
        y [..., C] = (s - mean) / sqrt(var + eps) * weight + bias with s = x; given a residual, (y, s) with s = x + residual.

    Raises:
        ValueError: a shape does not fit.
    """
    C = x.shape[-1]
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"layer_norm: expected weight and bias of shape ({C},) for x {tuple(x.shape)}, got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or not residual.is_floating_point()):
        raise ValueError(
            f"layer_norm: expected a floating residual of shape {tuple(x.shape)}, got {tuple(residual.shape)} {residual.dtype}"
        )
    if residual is not None:
        residual = residual.to(x.dtype)  # under autocast the stream is fp32 and what is added to it 16 bit
    elif x.device.type == "cpu" and x.dtype == weight.dtype == bias.dtype == torch.float32 and dispatch.forced() is None:
        # Torch's own is the same pass, and a call of ours costs 25 µs more forward and backward (measured).
        return F.layer_norm(x, (C,), weight, bias, eps)
    y, s, _, _ = OP(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)


def _supports_cpu(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return None
    return f"expected float32 on the CPU, got {', '.join(sorted({f'{t.dtype} on {t.device}' for t in tensors}))}"


def _supports_cuda(first: Tensor, *rest: object) -> str | None:
    if first.device.type != "cuda":
        return f"expected CUDA tensors, got {first.device}"
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16, got {first.dtype}"
    C = first.shape[-1]
    return None if C % 8 == 0 and C <= 4096 else f"expected a multiple of 8 channels, at most 4096, got {C}"


def _fake(x, residual, weight, bias, eps):
    rows = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, s, rows, torch.empty_like(rows)


def _fake_backward(dy, ds, s, weight, mean, rstd):
    return torch.empty_like(dy, memory_format=torch.contiguous_format), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, _ = inputs
    _, s, mean, rstd = output
    ctx.fused = residual is not None
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(s if ctx.fused else x, weight, mean, rstd)


def _backward(ctx, dy, ds, *_):
    s, weight, mean, rstd = ctx.saved_tensors
    if dy is None:  # only s is used
        return ds, ds, None, None, None
    dx, dweight, dbias = OP.backward(dy, ds if ctx.fused else None, s, weight, mean, rstd)
    return dx, dx if ctx.fused else None, dweight, dbias.to(ctx.bias_dtype), None


_COMPILED: dict[str, Callable[..., str | None]] = {"cpu": _supports_cpu, "cuda": _supports_cuda}
OP = Op(__name__, (_FORWARD, _fake), (_BACKWARD, _fake_backward), _COMPILED, autograd=(_setup, _backward))
