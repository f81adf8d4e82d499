"""Attention in Triton: a program takes one block of tokens of one head of one sequence, forward and backward.

Backward is one kernel without atomics: program j owns key block j (dk, dv) and query block j (dq), and computes its scores
anew for both, 7 GEMMs instead of 5, or 5 where one block holds the sequence. No two programs add to one sum, so equal inputs
give equal bits.

No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.available import triton_lacks

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(pid, cu_seqlens, L, heads, blocks):
    """(block, head, sequence, its first token, its length); a head's blocks are neighbours and share K and V in L2."""
    block, head, b = pid % blocks, pid // blocks % heads, pid // blocks // heads
    if cu_seqlens is None:
        return block, head, b, b.to(tl.int64) * L, L
    else:
        start = tl.load(cu_seqlens + b)
        return block, head, b, start.to(tl.int64), tl.load(cu_seqlens + b + 1) - start


@triton.jit
def _sequence(p, cu_seqlens, b, start, stride_b, stride_t):
    """Where the sequence begins in a dense or a packed tensor."""
    if cu_seqlens is None:
        return p + b.to(tl.int64) * stride_b
    else:
        return p + start * stride_t


@triton.jit
def _addresses(p, stride, first, length, K: tl.constexpr, ROWS: tl.constexpr):
    """Pointers and mask of rows ``first`` to ``first + ROWS`` of a matrix [length, K]; the columns up to a power of two."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(K))
    inside = (row < length)[:, None]
    if triton.next_power_of_2(K) != K:
        inside = inside & (column < K)[None, :]
    return p + (row.to(tl.int64)[:, None] * stride + column[None, :]), inside


@triton.jit
def _rows(p, stride, first, length, K: tl.constexpr, ROWS: tl.constexpr):
    place, inside = _addresses(p, stride, first, length, K, ROWS)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _write(p, stride, first, length, x, K: tl.constexpr, ROWS: tl.constexpr):
    place, inside = _addresses(p, stride, first, length, K, ROWS)
    tl.store(place, x.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _visible(i, j, length, CAUSAL: tl.constexpr):
    """[BLOCK, BLOCK]: whether query first i sees key j."""
    seen = (j < length)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return seen


@triton.jit
def _forward(
    qkv, cu_seqlens, out, lse, stride_b, stride_t, L, T, heads, blocks,
    K: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, b, start, length = _place(tl.program_id(0), cu_seqlens, L, heads, blocks)
    first = block * BLOCK
    if first >= length:
        return
    C = heads * K
    q = _sequence(qkv, cu_seqlens, b, start, stride_b, stride_t) + head * K
    queries = _rows(q, stride_t, first, length, K, BLOCK)
    i = first + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, triton.next_power_of_2(K)), tl.float32)
    end = tl.minimum(length, first + BLOCK) if CAUSAL else length
    for n in range(0, end, BLOCK):
        keys = _rows(q + C, stride_t, n, length, K, BLOCK)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (K**-0.5 * _LOG2E)
        s = tl.where(_visible(i, n + tl.arange(0, BLOCK), length, CAUSAL), s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - peak[:, None])
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(p, 1)
        values = _rows(q + 2 * C, stride_t, n, length, K, BLOCK)
        y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
        top = peak
    _write(out + start * C + head * K, C, first, length, y / total[:, None], K, BLOCK)
    tl.store(lse + head.to(tl.int64) * T + start + i, (top + tl.log2(total)) / _LOG2E, mask=i < length)


@triton.jit
def _query_side(q, stride_t, dout, stride_do, out, C, lse, n, length, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of the queries n to n + BLOCK: q, dout, log2 of the softmax's denominator (∞ beyond the end: p = 0), ⟨out, dout⟩."""
    queries, upstream = _rows(q, stride_t, n, length, K, BLOCK), _rows(dout, stride_do, n, length, K, BLOCK)
    delta = tl.sum(_rows(out, C, n, length, K, BLOCK).to(tl.float32) * upstream.to(tl.float32), 1)
    i = n + tl.arange(0, BLOCK)
    return queries, upstream, tl.load(lse + i, mask=i < length, other=float("inf")) * _LOG2E, delta


@triton.jit
def _softmax_gradient(
    queries, upstream, denominator, delta, keys, values, i, j, length,
    K: tl.constexpr, CAUSAL: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of a block of queries i by a block of keys j; dS still lacks the factor 1/√K."""
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (K**-0.5 * _LOG2E)
    p = tl.where(_visible(i, j, length, CAUSAL), tl.exp2(s - denominator[:, None]), 0.0)
    dp = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
    if ONE:  # the block has every key: of the same roundings as dp, so that a sole key's gradient is zero, and out is not read
        delta = tl.sum(p * dp, 1)
    return p, p * (dp - delta[:, None])


@triton.jit
def _backward(
    dout, out, lse, qkv, cu_seqlens, dqkv, stride_do_b, stride_do, stride_b, stride_t, L, T, heads, blocks,
    K: tl.constexpr, CAUSAL: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, b, start, length = _place(tl.program_id(0), cu_seqlens, L, heads, blocks)
    first = block * BLOCK
    if first >= length:
        return
    C = heads * K
    q = _sequence(qkv, cu_seqlens, b, start, stride_b, stride_t) + head * K
    dout = _sequence(dout, cu_seqlens, b, start, stride_do_b, stride_do) + head * K
    out += start * C + head * K
    lse += head.to(tl.int64) * T + start
    dqkv += start * 3 * C + head * K
    j = first + tl.arange(0, BLOCK)
    keys, values = _rows(q + C, stride_t, first, length, K, BLOCK), _rows(q + 2 * C, stride_t, first, length, K, BLOCK)
    dk = tl.zeros((BLOCK, triton.next_power_of_2(K)), tl.float32)
    dv = tl.zeros_like(dk)
    dq = tl.zeros_like(dk)
    for n in range(first if CAUSAL else 0, length, BLOCK):
        queries, upstream, denominator, delta = _query_side(q, stride_t, dout, stride_do, out, C, lse, n, length, K, BLOCK)
        i = n + tl.arange(0, BLOCK)
        p, ds = _softmax_gradient(
            queries, upstream, denominator, delta, keys, values, i, j, length, K, CAUSAL, ONE, PRECISION
        )  # fmt: skip
        dv = tl.dot(tl.trans(p).to(upstream.dtype), upstream, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds).to(queries.dtype), queries, dk, input_precision=PRECISION)
        if ONE:
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    _write(dqkv + C, 3 * C, first, length, dk * K**-0.5, K, BLOCK)
    _write(dqkv + 2 * C, 3 * C, first, length, dv, K, BLOCK)
    if not ONE:
        queries, upstream, denominator, delta = _query_side(q, stride_t, dout, stride_do, out, C, lse, first, length, K, BLOCK)
        for n in range(0, tl.minimum(length, first + BLOCK) if CAUSAL else length, BLOCK):
            keys, values = _rows(q + C, stride_t, n, length, K, BLOCK), _rows(q + 2 * C, stride_t, n, length, K, BLOCK)
            _, ds = _softmax_gradient(
                queries, upstream, denominator, delta, keys, values, j, n + tl.arange(0, BLOCK), length, K, CAUSAL, ONE,
                PRECISION,
            )  # fmt: skip
            dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    _write(dqkv, 3 * C, first, length, dq * K**-0.5, K, BLOCK)


def _tiles(dtype: torch.dtype, K: int, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of ``_forward`` and of ``_backward``.

    The block is the smallest that holds the sequence, up to 64: 50 tokens fill 78 % of one, 77 take two, 257 five (80 %; blocks
    of 128 would waste a third). 16 bit, 64 × 64, 128 threads: scores and sums take 32 registers a thread each at K = 64, and
    backward holds two of scores and two (three in one block) of sums: 253 registers, two programs to an SM, no spill on sm_90
    and sm_100 (136 bytes on sm_80). Wider heads have wider sums: backward then takes blocks of 32 and 256 threads, else it
    spills 1.5 KB. Fp32 multiplies outside the tensor cores, from registers: blocks of at most 32, backward of wide
    heads 16.
    """
    narrow, wide = dtype != torch.float32, K > 64
    most = 64 if narrow else 32
    fits = max(16, triton.next_power_of_2(length))
    block, back = min(most, fits), min(most // 2 if wide else most, fits)
    precision = "tf32" if not narrow and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    warps = (8 if wide or not narrow else 4) if back > 16 else 4 if wide else 2
    options: dict[str, Any] = dict(PRECISION=precision, num_stages=2)
    return (
        dict(BLOCK=block, num_warps=4 if block > 16 else 2, **options),
        dict(BLOCK=back, ONE=length <= back, num_warps=warps, **options),
    )


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds."""
    variants = []
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, K, length, packed in (
        (bf16, 64, 257, False), (bf16, 64, 50, False), (bf16, 64, 77, True), (bf16, 80, 257, False), (bf16, 128, 257, False),
        (bf16, 64, 12, True), (fp32, 64, 257, False), (fp32, 64, 77, True), (fp32, 64, 12, True),
    ):  # fmt: skip
        pointer = {bf16: "*bf16", fp32: "*fp32"}[dtype]
        for kernel, tiles in zip((_forward, _backward), _tiles(dtype, K, length), strict=True):
            constants = dict(tiles, K=K, CAUSAL=packed)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("qkv", "out", "dout", "dqkv"), pointer)
            types |= dict(lse="*fp32", cu_seqlens="*i32")
            if not packed:
                constants["cu_seqlens"] = None
            types |= dict.fromkeys(constants, "constexpr")
            name = f"{kernel.__name__} {pointer[1:]} K{K} L{length}{' packed, causal' if packed else ''}"
            variants.append((name, kernel, {a: types[a] for a in kernel.arg_names}, constants, warps, stages))
    return variants


def supports(*args: Any) -> str | None:
    qkv, _, heads, _, _ = args[-5:]
    if reason := triton_lacks(qkv, products=True):
        return reason
    K = qkv.shape[-1] // (3 * heads)
    return f"expected heads of 16 to 128 columns, got {K}" if not 16 <= K <= 128 else None


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """x with contiguous rows, and its strides from sequence to sequence (0: packed) and from token to token."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0) if x.dim() == 3 else 0, x.stride(-2)


def forward(qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int) -> tuple[Tensor, Tensor]:
    qkv, stride_b, stride_t = _strides(qkv)
    C, T = qkv.shape[-1] // 3, qkv.shape[:-1].numel()
    out, lse = qkv.new_empty((*qkv.shape[:-1], C)), qkv.new_empty((heads, T), dtype=torch.float32)
    B, length = (len(qkv), qkv.shape[1]) if cu_seqlens is None else (len(cu_seqlens) - 1, max_length)
    tiles, _ = _tiles(qkv.dtype, C // heads, length)
    blocks = triton.cdiv(length, tiles["BLOCK"])
    if T:
        with torch.cuda.device_of(qkv):
            _forward[(blocks * heads * B,)](
                qkv, cu_seqlens, out, lse, stride_b, stride_t, length, T, heads, blocks, K=C // heads, CAUSAL=causal, **tiles
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int
) -> Tensor:
    (qkv, stride_b, stride_t), (dout, stride_do_b, stride_do) = _strides(qkv), _strides(dout)
    C, T = qkv.shape[-1] // 3, qkv.shape[:-1].numel()
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    B, length = (len(qkv), qkv.shape[1]) if cu_seqlens is None else (len(cu_seqlens) - 1, max_length)
    _, tiles = _tiles(qkv.dtype, C // heads, length)
    blocks = triton.cdiv(length, tiles["BLOCK"])
    if T:
        with torch.cuda.device_of(qkv):
            _backward[(blocks * heads * B,)](
                dout, out.contiguous(), lse.contiguous(), qkv, cu_seqlens, dqkv, stride_do_b, stride_do, stride_b, stride_t,
                length, T, heads, blocks, K=C // heads, CAUSAL=causal, **tiles,
            )  # fmt: skip
    return dqkv
