"""Multi-head self-attention from one packed projection: dense or packed sequences, causal or not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipfast.kernels.op import Op, transformable

_FORWARD = "(Tensor qkv, Tensor? cu_seqlens, int heads, bool causal, SymInt max_length) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    "(Tensor dout, Tensor out, Tensor lse, Tensor qkv, Tensor? cu_seqlens, int heads, bool causal, SymInt max_length)"
    " -> Tensor dqkv"
)


@transformable
def attention(
    qkv: Tensor, heads: int, *, causal: bool = False, cu_seqlens: Tensor | None = None, max_length: int | None = None
) -> Tensor:
    """softmax(q·kᵀ/√K)·v of every head of every sequence; softmax and sums in fp32 (fp64 for fp64).

    Args:
        qkv: [B, L, 3C], or [T, 3C] packed: the columns of q, of k, of v, each heads × K wide, as one Linear leaves them.
            Any strides; no copy is made as long as the last dimension is contiguous.
        heads: H; K = C / H.
        causal: a token attends to itself and to those before it only.
        cu_seqlens: [B + 1] int32 on the device of ``qkv``, for a packed ``qkv``: sequence b is the rows cu_seqlens[b] to
            cu_seqlens[b + 1], starting at 0 and ending at T; a length may be 0. None: a packed ``qkv`` is one sequence.
            Its values are checked where the host has them, on the CPU; on a GPU they are trusted.
        max_length: the longest length in ``cu_seqlens``, or more. None: computed, which on a GPU waits for the device;
            T under torch.compile, which cannot wait.

    Returns:
        [B, L, C] or [T, C], the heads side by side, in the dtype of ``qkv``.

    Raises:
        ValueError, TypeError: a shape, a dtype, a length does not fit.
    """
    if qkv.dim() not in (2, 3):
        raise ValueError(f"attention: expected qkv of shape [B, L, 3C] or [T, 3C], got {tuple(qkv.shape)}")
    if not qkv.is_floating_point():
        raise TypeError(f"attention: expected qkv of a floating dtype, got {qkv.dtype}")
    if heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * heads):
        raise ValueError(f"attention: expected qkv to have a multiple of 3 × {heads} heads columns, got {tuple(qkv.shape)}")
    if cu_seqlens is not None:
        max_length = _checked_length(qkv, cu_seqlens, max_length)
        return OP(qkv, cu_seqlens, heads, causal, max_length)[0]
    if max_length is not None and max_length < qkv.shape[-2]:
        raise ValueError(f"attention: expected a max_length of at least the {qkv.shape[-2]} tokens, got {max_length}")
    if qkv.dim() == 2:
        return OP(qkv[None], None, heads, causal, 0)[0][0]
    return OP(qkv, None, heads, causal, 0)[0]


def _checked_length(qkv: Tensor, cu_seqlens: Tensor, max_length: int | None) -> int:
    """The bound on the lengths, once ``cu_seqlens`` has been found to fit ``qkv``."""
    if qkv.dim() != 2:
        raise ValueError(
            f"attention: expected a packed qkv [T, 3C] with cu_seqlens, got {tuple(qkv.shape)}; pass qkv.flatten(0, 1)"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"attention: expected cu_seqlens of dtype torch.int32, got {cu_seqlens.dtype}; pass cu_seqlens.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"attention: expected cu_seqlens of shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention: expected cu_seqlens on {qkv.device} like qkv, got {cu_seqlens.device}")
    if max_length is not None and max_length < 0:
        raise ValueError(f"attention: expected a max_length of at least 0, got {max_length}")
    if torch.compiler.is_compiling():
        return qkv.shape[0] if max_length is None else max_length
    if cu_seqlens.device.type != "cpu":
        return (int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0) if max_length is None else max_length
    ends = cu_seqlens.numpy()  # numpy: 3 µs for what takes torch 15
    lengths = ends[1:] - ends[:-1]
    if ends[0] != 0 or ends[-1] != qkv.shape[0] or (lengths < 0).any():
        raise ValueError(
            f"attention: expected cu_seqlens to rise from 0 to the {qkv.shape[0]} rows of qkv, got {cu_seqlens.tolist()[:9]} … "
            f"{int(ends[-1])}"
        )
    longest = int(lengths.max()) if lengths.size else 0
    if max_length is not None and max_length < longest:
        raise ValueError(f"attention: expected a max_length of at least the longest length, {longest}, got {max_length}")
    return longest


def _supports_cpu(*args: object) -> str | None:
    qkv, _, heads, _, _ = args[-5:]
    assert isinstance(qkv, Tensor) and isinstance(heads, int)
    if qkv.device.type != "cpu":
        return f"expected CPU tensors, got {qkv.device}"
    if qkv.dtype != torch.float32:
        return f"expected float32, got {qkv.dtype}"
    K = qkv.shape[-1] // (3 * heads)
    return f"expected heads of a multiple of 16 columns, got {K}" if K % 16 else None


def _supports_cuda(*args: object) -> str | None:
    qkv, cu_seqlens, heads, causal, max_length = args[-5:]
    assert isinstance(qkv, Tensor) and isinstance(heads, int) and isinstance(max_length, int)
    if qkv.device.type != "cuda":
        return f"expected CUDA tensors, got {qkv.device}"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16, got {qkv.dtype}"
    if (capability := torch.cuda.get_device_capability(qkv.device)) < (8, 0):
        return "expected compute capability 8.0 or later"
    if (K := qkv.shape[-1] // (3 * heads)) != 64:
        return f"expected heads of 64 columns, got {K}"
    longest = qkv.shape[-2] if cu_seqlens is None else max_length
    most = 128
    if not causal and capability[0] in (9, 10):  # which have 227 KB of shared memory, and 9 wgmma
        most = 640 if capability[0] == 9 and cu_seqlens is None else 432
    return None if longest <= most else f"expected sequences of at most {most} tokens, got {longest}"


def _fake(qkv, cu_seqlens, heads, causal, max_length):
    C = qkv.shape[-1] // 3
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((*qkv.shape[:-1], C)), qkv.new_empty((heads, math.prod(qkv.shape[:-1])), dtype=lse_dtype)


def _fake_backward(dout, out, lse, qkv, cu_seqlens, heads, causal, max_length):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.heads, ctx.causal, ctx.max_length = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, qkv, cu_seqlens)


def _backward(ctx, dout, _):
    dqkv = OP.backward(dout, *ctx.saved_tensors, ctx.heads, ctx.causal, ctx.max_length)
    return dqkv, None, None, None, None


_COMPILED = {"cpu": _supports_cpu, "cuda": _supports_cuda}
OP = Op(__name__, (_FORWARD, _fake), (_BACKWARD, _fake_backward), _COMPILED, autograd=(_setup, _backward))
