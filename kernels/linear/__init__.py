"""A Linear whose three products take the faster of the machine's two libraries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import dispatch, processor
from clipfast.kernels.linear import onednn, spec
from clipfast.kernels.op import Op, transformable

_BACKWARD = "(Tensor dy, Tensor? x, Tensor? weight, bool bias) -> (Tensor dx, Tensor dweight, Tensor dbias)"


@transformable
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b.

    ``F.linear``, the vendor's product, unless oneDNN is faster: fp32 on a CPU where MKL does not use AVX-512. Autocast holds.
    A bf16 weight beside fp32 on a CPU asks for products of bf16: operands and result are rounded to bf16, sums are in fp32.

    Args:
        x: [..., C_in], any strides.
        weight: [C_out, C_in], any strides; bias: [C_out] or None.

    Returns:
        [..., C_out] in the dtype of ``x``.
    """
    if mixed(x, weight):
        return _in_bf16(x, weight, bias)
    if weight.is_mkldnn:  # onednn.packed's, which no other backend reads
        return OP(x.to(weight.dtype), weight, bias)
    return F.linear(x, weight, bias) if _vendors(x, weight) else OP(x, weight, bias)


def mixed(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of fp32 are asked for in bf16."""
    return (
        weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _in_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not processor.BF16:  # torch multiplies bf16 there one number at a time: fp32 gives the same but for rounding at the end
        return spec.reference(x, weight, bias)
    low = weight.dtype
    return OP(x.to(low), weight, None if bias is None else bias.to(low)).to(x.dtype)


def _vendors(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear itself is the choice."""
    if (vendors := dispatch.settled(x, "onednn")) is not None:
        return vendors
    return not slow(x, weight) or math.prod(x.shape[:-1]) * weight.numel() < onednn.LEAST


def slow(*operands: Tensor) -> bool:
    """Whether the vendor's product of these is MKL's without AVX-512."""
    return onednn.LACKS is None and all(t.dtype == torch.float32 and t.is_cpu for t in operands)


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(dy, x, weight, bias):
    return (
        dy.new_empty(0) if weight is None else dy.new_empty((*dy.shape[:-1], weight.shape[1])),
        dy.new_empty(0) if x is None else dy.new_empty((dy.shape[-1], x.shape[-1])),
        dy.new_empty(dy.shape[-1] if bias else 0),
    )


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(x if need[1] else None, weight if need[0] else None)


def _backward(ctx, dy):
    need = ctx.needs_input_grad
    grads = OP.backward(dy, *ctx.saved_tensors, need[2])
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


OP = Op(
    __name__,
    forward=("(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake),
    backward=(_BACKWARD, _fake_backward),
    autograd=(_setup, _backward),
)
