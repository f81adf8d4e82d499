"""Attention of one query per sequence in Triton: scores of all heads at once, then the weighted sums, x read twice each way.

The heads of a sequence stand together as one dimension of the matrix products (padded to 16), so that x is read for all of them
at once. Scores wait in a buffer [T, H] in fp32, 3 % of the size of x at 64 channels a head in 16 bit. Without atomics.

No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.available import triton_lacks

CHUNK = 64  # columns of x at a time


@triton.jit
def _span(cu_seqlens, b, L):
    """First row and length of sequence b."""
    if cu_seqlens is None:
        return b.to(tl.int64) * L, L
    else:
        start = tl.load(cu_seqlens + b)
        return start.to(tl.int64), tl.load(cu_seqlens + b + 1) - start


@triton.jit
def _tile(p, first, count, C, c, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows ``first`` to ``first + ROWS`` of a matrix [count, C], columns ``c`` to ``c + CHUNK``; zero beyond its edges."""
    row, column = first + tl.arange(0, ROWS), c + tl.arange(0, CHUNK)
    inside = (row < count)[:, None] & (column < C)[None, :]
    return tl.load(p + row.to(tl.int64)[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def _write(p, first, count, C, c, x, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    row, column = first + tl.arange(0, ROWS), c + tl.arange(0, CHUNK)
    inside = (row < count)[:, None] & (column < C)[None, :]
    tl.store(p + row.to(tl.int64)[:, None] * C + column[None, :], x.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _products(x, u, start, length, b, first, C, H, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """[ROWS, HEADS]: ⟨x_j, u_h⟩ of a block of the sequence's tokens with its H vectors u."""
    total = tl.zeros((ROWS, HEADS), tl.float32)
    for c in range(0, C, CHUNK):
        tokens = _tile(x + start * C, first, length, C, c, ROWS, CHUNK)
        vectors = _tile(u + b.to(tl.int64) * H * C, 0, H, C, c, HEADS, CHUNK)
        total = tl.dot(tokens, tl.trans(vectors), total, input_precision=PRECISION)
    return total


@triton.jit
def _scores(x, u, cu_seqlens, scores, L, C, H, blocks, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    start, length = _span(cu_seqlens, b, L)
    if first < length:
        s = _products(x, u, start, length, b, first, C, H, HEADS, ROWS, CHUNK, PRECISION)
        _write(scores + start * H, first, length, H, 0, s, ROWS, HEADS)


@triton.jit
def _sums(x, scores, cu_seqlens, y, lse, L, C, H, chunks, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """y of one sequence for a chunk of columns: the softmax is taken online, over blocks of tokens."""
    b, c = tl.program_id(0) // chunks, tl.program_id(0) % chunks * CHUNK
    start, length = _span(cu_seqlens, b, L)
    h = tl.arange(0, HEADS)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, CHUNK), tl.float32)
    for first in range(0, length, ROWS):
        s = _tile(scores + start * H, first, length, H, 0, ROWS, HEADS)
        s = tl.where((first + tl.arange(0, ROWS) < length)[:, None], s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 0))
        p, shrink = tl.exp(s - peak[None, :]), tl.exp(top - peak)
        tokens = _tile(x + start * C, first, length, C, c, ROWS, CHUNK)
        out = tl.dot(tl.trans(p).to(tokens.dtype), tokens, out * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 0)
        top = peak
    out = out / tl.where(total == 0, 1.0, total)[:, None]  # a sequence without tokens: zero
    _write(y + b.to(tl.int64) * H * C, 0, H, C, c, out, HEADS, CHUNK)
    if c == 0:
        tl.store(lse + b.to(tl.int64) * H + h, top + tl.log(total), mask=h < H)


@triton.jit
def _token_gradient(x, u, dy, lse, delta, cu_seqlens, dx, slopes, L, C, H, blocks, HEADS: tl.constexpr, ROWS: tl.constexpr,
                    CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dx of a block of tokens, Σ_h p_jh·dy_h + ds_jh·u_h, and ds = p·(⟨x, dy⟩ - delta) for ``_query_gradient``."""
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    start, length = _span(cu_seqlens, b, L)
    if first >= length:
        return
    s = _products(x, u, start, length, b, first, C, H, HEADS, ROWS, CHUNK, PRECISION)
    dp = _products(x, dy, start, length, b, first, C, H, HEADS, ROWS, CHUNK, PRECISION)
    h, place = tl.arange(0, HEADS), b.to(tl.int64) * H + tl.arange(0, HEADS)
    p = tl.exp(s - tl.load(lse + place, mask=h < H, other=float("inf"))[None, :])
    ds = p * (dp - tl.load(delta + place, mask=h < H, other=0.0)[None, :])
    ds = tl.where(length > 1, ds, 0.0)  # a lone token has all the weight whatever its score: exactly no slope
    _write(slopes + start * H, first, length, H, 0, ds, ROWS, HEADS)
    for c in range(0, C, CHUNK):
        upstream = _tile(dy + b.to(tl.int64) * H * C, 0, H, C, c, HEADS, CHUNK)
        vectors = _tile(u + b.to(tl.int64) * H * C, 0, H, C, c, HEADS, CHUNK)
        d = tl.dot(p.to(upstream.dtype), upstream, input_precision=PRECISION)
        d = tl.dot(ds.to(vectors.dtype), vectors, d, input_precision=PRECISION)
        _write(dx + start * C, first, length, C, c, d, ROWS, CHUNK)


@triton.jit
def _query_gradient(x, slopes, cu_seqlens, du, L, C, H, chunks, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """du of one sequence for a chunk of columns: Σ_j ds_jh·x_j."""
    b, c = tl.program_id(0) // chunks, tl.program_id(0) % chunks * CHUNK
    start, length = _span(cu_seqlens, b, L)
    out = tl.zeros((HEADS, CHUNK), tl.float32)
    for first in range(0, length, ROWS):
        ds = _tile(slopes + start * H, first, length, H, 0, ROWS, HEADS)
        tokens = _tile(x + start * C, first, length, C, c, ROWS, CHUNK)
        out = tl.dot(tl.trans(ds).to(tokens.dtype), tokens, out, input_precision=PRECISION)
    _write(du + b.to(tl.int64) * H * C, 0, H, C, c, out, HEADS, CHUNK)


def _tiles(dtype: torch.dtype, H: int, length: int) -> dict[str, Any]:
    """Constants and launch options of all four kernels.

    Blocks of up to 64 tokens by 64 columns, 8 KB in 16 bit: a thread of 128 holds 32 of a product at 64 rows and at most 8 of
    scores for 16 heads, which leaves room for several programs on an SM, and it is their number that hides the loads. Fp32
    multiplies outside the tensor cores, from registers: 64 rows spill 1.6 KB there, 16 do not.
    """
    heads = max(16, triton.next_power_of_2(H))
    most = 16 if dtype == torch.float32 or heads > 32 else 64
    rows = min(most, max(16, triton.next_power_of_2(length)))
    precision = "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return dict(HEADS=heads, ROWS=rows, CHUNK=CHUNK, PRECISION=precision, num_warps=4, num_stages=2)


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds."""
    variants = []
    for dtype, H, length, packed in (
        (torch.bfloat16, 12, 50, False),
        (torch.bfloat16, 8, 77, True),
        (torch.float32, 16, 257, False),
    ):
        pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        for kernel in (_scores, _sums, _token_gradient, _query_gradient):
            constants = _tiles(dtype, H, length) | ({} if packed else dict(cu_seqlens=None))
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("x", "u", "y", "dy", "dx", "du"), pointer)
            types |= dict.fromkeys(("scores", "slopes", "lse", "delta"), "*fp32") | dict(cu_seqlens="*i32")
            types |= dict.fromkeys(constants, "constexpr")
            name = f"{kernel.__name__} {pointer[1:]} H{H} L{length}{' packed' if packed else ''}"
            variants.append((name, kernel, {a: types[a] for a in kernel.arg_names}, constants, warps, stages))
    return variants


def supports(*args: Any) -> str | None:
    return triton_lacks(args[0], products=True)


def _launch(x: Tensor, u: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[int, int, int, dict[str, Any]]:
    """Programs by blocks of tokens and by chunks of columns, blocks or chunks of one sequence, and the tiles."""
    tiles = _tiles(x.dtype, u.shape[1], max_length)
    return len(u), triton.cdiv(max_length, tiles["ROWS"]), triton.cdiv(x.shape[-1], CHUNK), tiles


def forward(x: Tensor, u: Tensor, cu_seqlens: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    x, u = x.contiguous(), u.contiguous()
    H, C = u.shape[1:]
    y, lse = torch.empty_like(u), u.new_empty(u.shape[:2], dtype=torch.float32)
    scores = x.new_empty((*x.shape[:-1], H), dtype=torch.float32)
    B, blocks, chunks, tiles = _launch(x, u, cu_seqlens, max_length)
    with torch.cuda.device_of(x):
        if B * blocks:
            _scores[(B * blocks,)](x, u, cu_seqlens, scores, max_length, C, H, blocks, **tiles)
        if B:
            _sums[(B * chunks,)](x, scores, cu_seqlens, y, lse, max_length, C, H, chunks, **tiles)
    return y, lse


def backward(
    dy: Tensor, x: Tensor, u: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor | None, max_length: int
) -> tuple[Tensor, Tensor]:
    dy, x, u = dy.contiguous(), x.contiguous(), u.contiguous()
    H, C = u.shape[1:]
    dx, du, slopes = torch.empty_like(x), torch.empty_like(u), x.new_empty((*x.shape[:-1], H), dtype=torch.float32)
    delta = (dy.float() * y.float()).sum(-1)
    B, blocks, chunks, tiles = _launch(x, u, cu_seqlens, max_length)
    with torch.cuda.device_of(x):
        if B * blocks:
            _token_gradient[(B * blocks,)](
                x, u, dy, lse.contiguous(), delta, cu_seqlens, dx, slopes, max_length, C, H, blocks, **tiles
            )  # fmt: skip
        if B:
            _query_gradient[(B * chunks,)](x, slopes, cu_seqlens, du, max_length, C, H, chunks, **tiles)
    return dx, du
