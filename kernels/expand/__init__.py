"""The first half of an MLP in one kernel: the product's epilogue makes the activation, which otherwise is a pass."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.op import OPS, Op, transformable

# Rows from which on a GPU's SMs have tiles enough; with fewer the vendor's smaller tiles are faster.
LEAST = 8192


@transformable
def expand(x: Tensor, weight: Tensor, bias: Tensor, quick_gelu: bool = True) -> Tensor:
    """act(x·weightᵀ + bias), the activation QuickGELU or the exact GELU.

    Args:
        x: [..., C]; weight: [F, C], of the dtype of ``x``; bias: [F] of any floating dtype.

    Returns:
        [..., F] in the dtype of ``x``. For backward h = x·weightᵀ is kept, rounded to it.
    """
    if bias.shape != weight.shape[:1] or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"expand: expected x [..., C], weight [F, C] and bias [F], got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    return OP(x, weight, bias, quick_gelu, keep)[0]


def one_kernel(x: Tensor, weight: Tensor, bias: Tensor, quick_gelu: bool) -> Tensor | None:
    """``expand`` where its kernel is the choice, under autocast in autocast's dtype; else None."""
    if not x.is_cuda or x.numel() < LEAST * x.shape[-1] or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x, weight = x.to(dtype), weight.to(dtype)
    try:
        chosen, _ = OP.choose(x, weight, bias, quick_gelu, True)
    except dispatch.NoBackend:
        return None
    return expand(x, weight, bias, quick_gelu) if chosen == "cuda" else None


def _supports_cuda(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"expected float16 or bfloat16 on CUDA, got {x.dtype} and {weight.dtype} on {x.device}"
    if (capability := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"expected Hopper, compute capability 9.0, got {capability[0]}.{capability[1]}"
    F, C = weight.shape
    return None if C % 8 == 0 and F % 256 == 0 else f"expected multiples of 8 and of 256 columns, got {C} and {F}"


def _fake(x, weight, bias, quick_gelu, keep):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.quick_gelu, _ = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, weight, bias, h)


def _backward(ctx, dy, _):
    x, weight, bias, h = ctx.saved_tensors
    # The pass of mlp's backward has no kernel in CUDA C++: where that is asked for, it is Triton's.
    with dispatch.use("triton") if dispatch.forced() == "cuda" else contextlib.nullcontext():
        dh, dbias = OPS["mlp"].backward(dy, h, bias, ctx.quick_gelu)
    dweight = dh.reshape(-1, dh.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return dh @ weight if ctx.needs_input_grad[0] else None, dweight, dbias, None, None


OP = Op(
    __name__,
    forward=("(Tensor x, Tensor weight, Tensor bias, bool quick_gelu, bool keep) -> (Tensor y, Tensor h)", _fake),
    compiled={"cuda": _supports_cuda},
    autograd=(_setup, _backward),
)
