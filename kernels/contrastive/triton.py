"""Contrastive statistics and gradients in Triton: tiles of the similarity matrix live in registers only.

No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels import dispatch


@triton.jit
def _similarity(
    a, b, rows, columns, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale·⟨a_i, b_j⟩ [BLOCK_M, BLOCK_N] in fp32 for rows i of a [., D] and columns j of b [., D].

    Inside a tile 32 bits hold every offset: 64 would cost two registers for each of the addresses.
    """
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left, right = a + (rows[:, None] * D + d[None, :]), b + (columns[None, :] * D + d[:, None])
        if D % BLOCK_D == 0:
            s = tl.dot(tl.load(left), tl.load(right), s, input_precision=PRECISION)
        else:
            x, y = tl.load(left, mask=d[None, :] < D, other=0.0), tl.load(right, mask=d[:, None] < D, other=0.0)
            s = tl.dot(x, y, s, input_precision=PRECISION)
    return s * scale


@triton.jit
def _statistics(
    image, text, scale, row_max, row_sum, diagonal, part_max, part_sum, n, N, offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program p: rows of the blocks p, p + P, ..; their column statistics into part_max[p], part_sum[p] [N].

    The P programs walk the columns in step, so a tile of ``text`` comes from L2 for all but the first.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    factor = tl.load(scale).to(tl.float32)
    part_max += program.to(tl.int64) * N
    part_sum += program.to(tl.int64) * N
    left = image + program.to(tl.int64) * BLOCK_M * D
    for block in range(program, tl.cdiv(n, BLOCK_M), programs):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        own = tl.zeros((BLOCK_M,), tl.float32)
        i = tl.minimum(tl.arange(0, BLOCK_M), n - 1 - block * BLOCK_M)
        right = text
        for start in range(0, N, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            j = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - start)
            s = _similarity(left, right, i, j, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
            # NaN wins every sum below, whatever the maxima do with it.
            own += tl.sum(tl.where(row[:, None] + offset == column[None, :], s, 0.0), 1)
            s = tl.where((row < n)[:, None] & (column < N)[None, :], s, float("-inf"))
            top = tl.maximum(m, tl.max(s, 1))
            total = total * tl.exp(m - top) + tl.sum(tl.exp(s - top[:, None]), 1)
            m = top
            seen = tl.load(part_max + column, mask=column < N, other=0.0)
            seen_sum = tl.load(part_sum + column, mask=column < N, other=0.0)
            peak = tl.maximum(seen, tl.max(s, 0))
            seen_sum = seen_sum * tl.exp(seen - peak) + tl.sum(tl.exp(s - peak[None, :]), 0)
            tl.store(part_max + column, peak, mask=column < N)
            tl.store(part_sum + column, seen_sum, mask=column < N)
            right += BLOCK_N * D
        tl.store(row_max + row, m, mask=row < n)
        tl.store(row_sum + row, total, mask=row < n)
        tl.store(diagonal + row, own, mask=row < n)
        left += programs.to(tl.int64) * BLOCK_M * D
        tl.debug_barrier()  # the next block of rows reads the parts that other threads of this program have written


@triton.jit
def _merge(part_max, part_sum, col_max, col_sum, N, P, BLOCK: tl.constexpr):
    """(maximum, sum) of each column over the P parts, in their order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    place = column.to(tl.int64)
    for _ in range(P):
        other = tl.load(part_max + place, mask=inside, other=0.0)
        top = tl.maximum(m, other)
        total = total * tl.exp(m - top) + tl.load(part_sum + place, mask=inside, other=0.0) * tl.exp(other - top)
        m = top
        place += N
    tl.store(col_max + column, m, mask=inside)
    tl.store(col_sum + column, total, mask=inside)


@triton.jit
def _gradient(
    a, b, scale, a_lse, b_lse, a_grad, b_grad, own, out, rows, columns, offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j G_ij·b_j for one block of rows and one slice of D: with (a, b) = (image, text) dI, the other way round dT.

    G_ij = a_grad_i·exp(s_ij - a_lse_i) + b_grad_j·exp(s_ij - b_lse_j), and own_i where j = i + offset.
    """
    first = tl.program_id(1) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    factor = tl.load(scale).to(tl.float32)
    i = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - first)
    lse, grad, diagonal = tl.load(a_lse + first + i), tl.load(a_grad + first + i), tl.load(own + first + i)
    left, right = a + first.to(tl.int64) * D, b
    total = tl.zeros((BLOCK_M, SLICE), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < columns
        j = tl.minimum(tl.arange(0, BLOCK_N), columns - 1 - start)
        s = _similarity(left, right, i, j, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        g = grad[:, None] * tl.exp(s - lse[:, None])
        g += tl.load(b_grad + start + j)[None, :] * tl.exp(s - tl.load(b_lse + start + j)[None, :])
        g = tl.where(row[:, None] + offset == column[None, :], diagonal[:, None], g)
        g = tl.where(inside[None, :], g, 0.0)
        place = right + (j[:, None] * D + d[None, :])
        y = tl.load(place) if D % SLICE == 0 else tl.load(place, mask=d[None, :] < D, other=0.0)
        total = tl.dot(g.to(y.dtype), y, total, input_precision=PRECISION)
        right += BLOCK_N * D
    place = out + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total, mask=(row < rows)[:, None] & (d < D)[None, :])


def _tiles(dtype: torch.dtype, D: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and launch options of ``_statistics`` and of ``_gradient``.

    16 bit, 256 threads: a 64 × 256 tile of s takes 64 registers a thread in fp32 and three stages of its operands 120 KB
    (128 × 128 spills on sm_100). The gradient holds 64 × 512 in 128 registers, and recomputes s once for every further 512
    of D; two stages, as 512 columns of ``y`` take 64 KB beside them.
    Fp32 multiplies outside the tensor cores, from registers: smaller tiles throughout.
    """
    narrow = dtype != torch.float32
    chunk = min(64 if narrow else 32, max(16, triton.next_power_of_2(D)))
    width = min(512 if narrow else 128, max(16, triton.next_power_of_2(D)))
    if narrow:
        options = dict(BLOCK_M=64, BLOCK_D=chunk, PRECISION="ieee", num_warps=8)
        return dict(BLOCK_N=256, num_stages=3, **options), dict(BLOCK_N=64, SLICE=width, num_stages=2, **options)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    options = dict(BLOCK_D=chunk, PRECISION=precision, num_warps=4, num_stages=2)
    return dict(BLOCK_M=64, BLOCK_N=64, **options), dict(BLOCK_M=32, BLOCK_N=32, SLICE=width, **options)


def compiled() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds."""
    variants = []
    for dtype, D in ((torch.bfloat16, 512), (torch.bfloat16, 768), (torch.float32, 512)):
        feature = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        for kernel, tiles in zip((_statistics, _gradient), _tiles(dtype, D), strict=True):
            constants: dict[str, Any] = dict(tiles, D=D)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("image", "text", "a", "b"), feature)
            types |= dict.fromkeys(("n", "N", "rows", "columns", "offset"), "i32") | dict.fromkeys(constants, "constexpr")
            signature = {name: types[name] for name in kernel.arg_names}
            variants.append((f"{kernel.__name__} {feature[1:]} D{D}", kernel, signature, constants, warps, stages))
    merge = dict(part_max="*fp32", part_sum="*fp32", col_max="*fp32", col_sum="*fp32", N="i32", P="i32", BLOCK="constexpr")
    return [*variants, ("_merge", _merge, merge, dict(BLOCK=128), 4, 1)]


def supports(image: Tensor, text: Tensor, *rest: Any) -> str | None:
    if reason := dispatch.triton_lacks(image, products=True):
        return reason
    return None if image.numel() and text.numel() else "expected at least one row and one column"


def forward(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    image, text = image.contiguous(), text.contiguous()
    (n, D), N = image.shape, len(text)
    row_max, row_sum, diagonal = (image.new_empty(n, dtype=torch.float32) for _ in range(3))
    col_max, col_sum = (image.new_empty(N, dtype=torch.float32) for _ in range(2))
    tiles, _ = _tiles(image.dtype, D)
    # The parts of the columns take 8·N bytes a program: O(N) for a fixed number of programs, two to an SM.
    sms = torch.cuda.get_device_properties(image.device).multi_processor_count if image.is_cuda else 1
    programs = min(triton.cdiv(n, tiles["BLOCK_M"]), 2 * sms)
    part_max = image.new_full((programs, N), -torch.inf, dtype=torch.float32)
    part_sum = torch.zeros_like(part_max)
    _statistics[(programs,)](
        image, text, scale, row_max, row_sum, diagonal, part_max, part_sum, n, N, offset, D=D, **tiles
    )  # fmt: skip
    _merge[(triton.cdiv(N, 128),)](part_max, part_sum, col_max, col_sum, N, programs, BLOCK=128)
    return row_max, row_sum, col_max, col_sum, diagonal


def backward(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, row_lse: Tensor, col_lse: Tensor, row_nll: Tensor, col_nll: Tensor,
    row_grad: Tensor, col_grad: Tensor, want_image: bool, want_text: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    image, text = image.contiguous(), text.contiguous()
    (n, D), N = image.shape, len(text)
    # In fp16 a mean's gradients, 1/N and less, would be subnormal: let the largest be 4,096 inside the kernels.
    unit = torch.ones_like(row_lse[:1])
    if image.dtype == torch.float16:
        unit = torch.maximum(row_grad.abs().amax(), col_grad.abs().amax()).clamp_min(1e-30) / 4096
    row_grad, col_grad = (row_grad / unit).contiguous(), (col_grad / unit).contiguous()
    own = slice(offset, offset + n)
    diagonal = row_grad * torch.expm1(-row_nll) + col_grad[own] * torch.expm1(-col_nll[own])  # p - 1 would cancel near 1
    col_diagonal = torch.zeros_like(col_grad)
    col_diagonal[own] = diagonal
    _, tiles = _tiles(image.dtype, D)
    slices = triton.cdiv(D, tiles["SLICE"])
    image_grad = image.new_empty(n if want_image else 0, D, dtype=torch.float32)
    text_grad = image.new_empty(N if want_text else 0, D, dtype=torch.float32)
    if want_image:
        _gradient[(slices, triton.cdiv(n, tiles["BLOCK_M"]))](
            image, text, scale, row_lse, col_lse, row_grad, col_grad, diagonal, image_grad, n, N, offset, D=D, **tiles
        )  # fmt: skip
        image_grad *= unit
    if want_text:
        _gradient[(slices, triton.cdiv(N, tiles["BLOCK_M"]))](
            text, image, scale, col_lse, row_lse, col_grad, row_grad, col_diagonal, text_grad, N, n, -offset, D=D, **tiles
        )  # fmt: skip
        text_grad *= unit
    return image_grad, text_grad
