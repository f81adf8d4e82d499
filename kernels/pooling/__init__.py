"""Attention of one query per sequence over its tokens, with keys and values never formed.

CLIP reads one vector out of each tower, so that the last block needs one query a sequence. Then for each head h

    q_h = (W_q query + b_q)_h / √K
    u_h = W_k,hᵀ q_h
    y_h = Σ_j p_j x_j,  p = softmax_j(x_j · u_h)
    out_h = W_v,h y_h + b_v,h

equals ordinary attention (b_k adds the same to every score of a head and cancels), for 4LCH FLOPs a sequence beside the
projections of its one query, where keys and values cost 4LC².
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.bmm import bmm
from clipfast.kernels.linear import linear
from clipfast.kernels.op import Op, transformable


@transformable
def pooling(
    x: Tensor,
    query: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    heads: int,
    *,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Multi-head attention of one query per sequence, before the output projection.

    Args:
        x: [B, L, C], the tokens of equally long sequences; with ``cu_seqlens`` [T, C], the sequences one after the other.
        query: [B, C], what asks (the class token, the end token, the mean token), layer-normed as ``x`` is.
        q_weight, k_weight, v_weight: [C, C]; q_bias, v_bias: [C]. Rows of a packed ``in_proj`` are fine.
        heads: H, a divisor of C.
        cu_seqlens: int32 [B + 1] on the device of ``x``: sequence b is x[cu_seqlens[b] : cu_seqlens[b + 1]].
        max_length: length of the longest packed sequence; None reads it from ``cu_seqlens``, which waits for the device.

    Returns:
        [B, C] in the dtype of the projections. A sequence without tokens gives ``v_bias``.

    Raises:
        ValueError: a shape, a dtype or a length does not fit.
    """
    C = x.shape[-1]
    _check(x, query, heads, cu_seqlens, q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, q_bias=q_bias, v_bias=v_bias)
    longest = x.shape[1] if cu_seqlens is None else _check_lengths(cu_seqlens, x.shape[0], max_length)
    K = C // heads
    q = linear(query, q_weight, q_bias) * K**-0.5
    # u leaves this product head by head, [H, B, C] in memory; the op reads it by its strides.
    u = bmm(q.unflatten(1, (heads, K)).transpose(0, 1), k_weight.unflatten(0, (heads, K))).transpose(0, 1)
    y, _ = OP(x, u.to(x.dtype), cu_seqlens, longest)
    values = v_weight.unflatten(0, (heads, K)).transpose(1, 2)
    out = bmm(y.transpose(0, 1), values).transpose(0, 1).flatten(1)
    return out + v_bias.to(out.dtype)


def _check(x: Tensor, query: Tensor, heads: int, cu_seqlens: Tensor | None, **parameters: Tensor) -> None:
    C, packed = x.shape[-1], cu_seqlens is not None
    if x.dim() != (2 if packed else 3):
        expected = "[T, C] with cu_seqlens" if packed else "[B, L, C] without cu_seqlens"
        raise ValueError(f"pooling: expected x of shape {expected}, got {tuple(x.shape)}")
    if heads < 1 or C % heads:
        raise ValueError(f"pooling: expected heads to divide the width {C}, got {heads}")
    if cu_seqlens is not None and (cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.device != x.device):
        raise ValueError(
            f"pooling: expected cu_seqlens int32 [B + 1] on {x.device}, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}"
        )
    B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if query.shape != (B, C):
        raise ValueError(f"pooling: expected a query of shape ({B}, {C}), one for each sequence, got {tuple(query.shape)}")
    for name, parameter in parameters.items():
        shape = (C,) if name.endswith("bias") else (C, C)
        if parameter.shape != shape:
            raise ValueError(f"pooling: expected {name} of shape {shape} for x {tuple(x.shape)}, got {tuple(parameter.shape)}")


def _check_lengths(cu_seqlens: Tensor, T: int, max_length: int | None) -> int:
    """``max_length``, read from ``cu_seqlens`` where it is None. Values are checked where that costs no wait: on the CPU."""
    if max_length is not None and (cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()):
        return max_length
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    longest = max(lengths, default=0)
    if ends[0] != 0 or ends[-1] != T or min(lengths, default=0) < 0:
        raise ValueError(f"pooling: expected cu_seqlens to rise from 0 to the {T} rows of x, got {ends[:8]} … {ends[-1]}")
    if max_length is not None and max_length < longest:
        raise ValueError(f"pooling: expected max_length of at least {longest}, the longest sequence, got {max_length}")
    return longest if max_length is None else max_length


def _supports_cpu(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor) and a.dtype != torch.int32]
    if any(t.device.type != "cpu" for t in tensors):
        return "expected CPU tensors"
    if any(t.dtype != torch.float32 for t in tensors):
        return f"expected float32, got {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    C = tensors[0].shape[-1]
    return None if C % 16 == 0 else f"expected a width that is a multiple of 16, got {C}"


def _fake(x, u, cu_seqlens, max_length):
    lse = u.new_empty(u.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(u, memory_format=torch.contiguous_format), lse


def _fake_backward(dy, x, u, y, lse, cu_seqlens, max_length):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, u))


def _setup(ctx, inputs, output):
    x, u, cu_seqlens, ctx.max_length = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, u, y, lse, cu_seqlens)


def _backward(ctx, dy, _):
    x, u, y, lse, cu_seqlens = ctx.saved_tensors
    return *OP.backward(dy, x, u, y, lse, cu_seqlens, ctx.max_length), None, None


OP = Op(
    __name__,
    forward=("(Tensor x, Tensor u, Tensor? cu_seqlens, SymInt max_length) -> (Tensor y, Tensor lse)", _fake),
    backward=(
        "(Tensor dy, Tensor x, Tensor u, Tensor y, Tensor lse, Tensor? cu_seqlens, SymInt max_length)"
        " -> (Tensor dx, Tensor du)",
        _fake_backward,
    ),
    compiled={"cpu": _supports_cpu},
    autograd=(_setup, _backward),
)
