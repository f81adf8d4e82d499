"""Attention by the flash-attn package (Dao 2023), where it is installed: on request, and beside ours in benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn import flash_attn_interface as library
from torch import Tensor


def supports(*args: Any) -> str | None:
    qkv, _, heads, _, _ = args[-5:]
    if qkv.device.type != "cuda":
        return f"expected CUDA tensors, got {qkv.device}"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16, got {qkv.dtype}"
    K = qkv.shape[-1] // (3 * heads)
    return f"expected heads of a multiple of 8 columns, at most 256, got {K}" if K % 8 or K > 256 else None


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each [T, H, K]: the dense sequences too, one behind the other."""
    q, k, v = qkv.reshape(-1, 3, heads, qkv.shape[-1] // (3 * heads)).unbind(1)
    return q, k, v


def _lengths(qkv: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[Tensor, int]:
    if cu_seqlens is not None:
        return cu_seqlens, max_length
    B, L = qkv.shape[:2]
    return torch.arange(B + 1, dtype=torch.int32, device=qkv.device) * L, L


def forward(qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int) -> tuple[Tensor, Tensor]:
    q, k, v = _split(qkv, heads)
    if len(q) == 0:
        return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)), qkv.new_empty((heads, 0), dtype=torch.float32)
    ends, longest = _lengths(qkv, cu_seqlens, max_length)
    out, lse, _, _ = library._flash_attn_varlen_forward(
        q, k, v, ends, ends, longest, longest, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal
    )
    return out.reshape(*qkv.shape[:-1], -1), lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int
) -> Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = _split(qkv, heads)
    if len(q) == 0:
        return dqkv
    dq, dk, dv = _split(dqkv, heads)
    ends, longest = _lengths(qkv, cu_seqlens, max_length)
    library._flash_attn_varlen_backward(
        dout.reshape(q.shape), q, k, v, out.reshape(q.shape), lse, dq, dk, dv, ends, ends, longest, longest, dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return dqkv
