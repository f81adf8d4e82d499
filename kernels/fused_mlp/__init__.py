"""An MLP of which the activation, and backward its derivative, is part of a product and no pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.op import Op, transformable

# Rows from which on a GPU's SMs have tiles enough; with fewer the vendor's smaller tiles are faster.
LEAST = 8192


@transformable
def fused_mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool = True
) -> Tensor:
    """Linear, QuickGELU (or exact GELU), Linear, as ``mlp``, which takes it where its kernels are the faster.

    Args:
        x: [..., C]; fc_weight: [F, C], proj_weight: [C, F], proj_bias: [C], of the dtype of ``x``; fc_bias: [F] of any floating
            dtype.

    Returns:
        [..., C] in the dtype of ``x``. For backward the activation and h = x·fc_weightᵀ are kept, rounded to it.
    """
    F, C = fc_weight.shape
    if x.shape[-1:] != (C,) or fc_bias.shape != (F,) or proj_weight.shape != (C, F) or proj_bias.shape != (C,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, fc_weight, fc_bias, proj_weight, proj_bias))
        raise ValueError(f"fused_mlp: expected x [..., C], weights [F, C] and [C, F], biases [F] and [C], got {shapes}")
    given = (x, fc_weight, fc_bias, proj_weight, proj_bias)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return OP(*given, quick_gelu, keep)[0]


def where_faster(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool
) -> Tensor | None:
    """``fused_mlp`` where its kernels in CUDA C++ are the choice, under autocast in autocast's dtype; else None."""
    if not x.is_cuda or x.numel() < LEAST * x.shape[-1] or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x, fc_weight, proj_weight, proj_bias = (t.to(dtype) for t in (x, fc_weight, proj_weight, proj_bias))
    given = (x, fc_weight, fc_bias, proj_weight, proj_bias, quick_gelu)
    try:
        chosen, _ = OP.choose(*given, True)
    except dispatch.NoBackend:
        return None
    return fused_mlp(*given) if chosen == "cuda" else None


def _supports_cuda(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    """Of forward and of backward: x or its gradient, and the weight that it is multiplied by, [F, C] or [C, F]."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"expected float16 or bfloat16 on CUDA, got {x.dtype} and {weight.dtype} on {x.device}"
    if (capability := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"expected Hopper, compute capability 9.0, got {capability[0]}.{capability[1]}"
    C = x.shape[-1]
    F = weight.numel() // C
    return None if C % 8 == 0 and F % 256 == 0 else f"expected multiples of 8 and of 256 columns, got {C} and {F}"


def _fake(x, fc_weight, fc_bias, proj_weight, proj_bias, quick_gelu, keep):
    z = x.new_empty((*x.shape[:-1], proj_weight.shape[0]))
    return z, *(x.new_empty((*x.shape[:-1], fc_weight.shape[0]) if keep else 0) for _ in range(2))


def _fake_backward(dz, proj_weight, h, fc_bias, quick_gelu):
    return torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(fc_bias)


def _setup(ctx, inputs, output):
    x, fc_weight, fc_bias, proj_weight, _, ctx.quick_gelu, _ = inputs
    _, y, h = output
    ctx.mark_non_differentiable(y, h)
    ctx.save_for_backward(x, fc_weight, fc_bias, proj_weight, y, h)


def _backward(ctx, dz, *_):
    x, fc_weight, fc_bias, proj_weight, y, h = ctx.saved_tensors
    need, dx, dfc_weight, dfc_bias = ctx.needs_input_grad, None, None, None
    if any(need[:3]):
        dh, dfc_bias = OP.backward(dz, proj_weight, h, fc_bias, ctx.quick_gelu)
        dx = dh @ fc_weight if need[0] else None
        dfc_weight = _rows(dh).T @ _rows(x) if need[1] else None
    dproj_weight = _rows(dz).T @ _rows(y) if need[3] else None
    return dx, dfc_weight, dfc_bias, dproj_weight, _rows(dz).sum(0) if need[4] else None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


OP = Op(
    __name__,
    forward=(
        "(Tensor x, Tensor fc_weight, Tensor fc_bias, Tensor proj_weight, Tensor proj_bias, bool quick_gelu, bool keep)"
        " -> (Tensor z, Tensor y, Tensor h)",
        _fake,
    ),
    backward=(
        "(Tensor dz, Tensor proj_weight, Tensor h, Tensor fc_bias, bool quick_gelu) -> (Tensor dh, Tensor dbias)",
        _fake_backward,
    ),
    compiled={"cuda": _supports_cuda},
    autograd=(_setup, _backward),
)
