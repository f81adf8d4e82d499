"""The MLP of a residual block: Linear, activation, Linear, with the activation in one pass with the first bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.forced import forced
from clipfast.kernels.fused_mlp import where_faster
from clipfast.kernels.linear import linear
from clipfast.kernels.op import Op, transformable


@transformable
def mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool = True
) -> Tensor:
    """Linear, QuickGELU (or exact GELU), Linear; only the pre-activation is kept for backward.

    Args:
        x: [..., C].
        fc_weight, fc_bias: [F, C], [F].
        proj_weight, proj_bias: [C, F], [C].
        quick_gelu: x·σ(1.702x), as OpenAI's weights need it; False: the exact GELU x·Φ(x).

    Returns:
        [..., C].
    """
    if not quick_gelu and x.is_cpu and forced() is None:
        # The bias rides with the product, and torch has the pass: 0.94 of the time of a B/16 tower, and 0.6 of the memory.
        h = linear(x, fc_weight, fc_bias)
        return linear(F.gelu(h) if h.requires_grad else torch.ops.aten.gelu_(h), proj_weight, proj_bias)
    if (fused := where_faster(x, fc_weight, fc_bias, proj_weight, proj_bias, quick_gelu)) is not None:
        return fused
    return linear(activation(linear(x, fc_weight), fc_bias, quick_gelu), proj_weight, proj_bias)


def activation(h: Tensor, bias: Tensor, quick_gelu: bool = True) -> Tensor:
    """QuickGELU (or exact GELU) of h + bias: h [..., F], bias [F] of any floating dtype -> [..., F] in the dtype of h."""
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"activation: expected a bias of shape {tuple(h.shape[-1:])}, got {tuple(bias.shape)}")
    return OP(h, bias, quick_gelu)


def _supports_cpu(*args: object) -> str | None:
    *_, h, bias, quick_gelu = args
    assert isinstance(h, Tensor) and isinstance(bias, Tensor)
    if h.device.type != "cpu":
        return f"expected CPU tensors, got {h.device}"
    if h.dtype != torch.float32 or bias.dtype != torch.float32:
        return f"expected float32, got {h.dtype} with a bias of {bias.dtype}"
    return None if quick_gelu else "exact GELU: torch's own pass is as fast"


def _fake(h, bias, quick_gelu):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _fake_backward(dy, h, bias, quick_gelu):
    return torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _setup(ctx, inputs, output):
    h, bias, ctx.quick_gelu = inputs
    ctx.save_for_backward(h, bias)


def _backward(ctx, dy):
    return (*OP.backward(dy, *ctx.saved_tensors, ctx.quick_gelu), None)


OP = Op(
    __name__,
    forward=("(Tensor h, Tensor bias, bool quick_gelu) -> Tensor", _fake),
    backward=("(Tensor dy, Tensor h, Tensor bias, bool quick_gelu) -> (Tensor dh, Tensor dbias)", _fake_backward),
    compiled={"cpu": _supports_cpu},
    autograd=(_setup, _backward),
)
