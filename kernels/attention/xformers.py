"""Attention by the xformers package, where it is installed: on request, and beside ours in benchmarks.

Packed lengths are read on the host, since its masks want them there. Its backward adds into dq in no fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha

UNORDERED = ("cuda",)  # the order of its sums backward differs from call to call


def supports(*args: Any) -> str | None:
    qkv, _, heads, _, _ = args[-5:]
    if qkv.device.type != "cuda":
        return f"expected CUDA tensors, got {qkv.device}"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16, got {qkv.dtype}"
    K = qkv.shape[-1] // (3 * heads)
    return f"expected heads of a multiple of 8 columns, at most 256, got {K}" if K % 8 or K > 256 else None


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each [1, T, H, K]."""
    q, k, v = qkv.reshape(1, -1, 3, heads, qkv.shape[-1] // (3 * heads)).unbind(2)
    return q, k, v


def _mask(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool) -> Any:
    lengths = [qkv.shape[1]] * len(qkv) if cu_seqlens is None else cu_seqlens.diff().tolist()
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    return mask.make_causal() if causal else mask


def forward(qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int) -> tuple[Tensor, Tensor]:
    q, k, v = _split(qkv, heads)
    if q.shape[1] == 0:
        return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)), qkv.new_empty((heads, 0), dtype=torch.float32)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, _mask(qkv, cu_seqlens, causal), op=fmha.flash.FwOp
    )
    return out.reshape(*qkv.shape[:-1], -1), lse[0]


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int
) -> Tensor:
    q, k, v = _split(qkv, heads)
    if q.shape[1] == 0:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grads = fmha.memory_efficient_attention_backward(
        dout.reshape(q.shape), out.reshape(q.shape), lse[None], q, k, v, _mask(qkv, cu_seqlens, causal), op=fmha.flash.BwOp
    )
    return torch.stack(grads, dim=2).reshape(qkv.shape)
