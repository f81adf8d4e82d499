"""Contrastive statistics and gradients in Triton: the similarity matrix lives in registers, its derivative G in 16-bit blocks.

Forward, 2N²D: ``_scan`` finds a common reference t for exp(s - t), ``_sums`` adds one exponential an element into its row and
its column, ``_finish`` adds the pair and repairs what t did not suit. Backward, 6N²D: ``_gradient`` writes a block of G, the
vendor's GEMM multiplies it by the texts and, transposed, by the images.

Estimates in ms for an H200 in bf16 at (N = 4,096, D = 768), (65,536, 768) and (1,048,576, 512), with 790 TFLOP/s of MMA,
16 exponentials a clock and SM, 550 TFLOP/s for our sweeps and 700 for GEMMs with large blocks, 500 with one of 4,096²:

    forward                                              0.06     12   2,100
    backward  two sweeps, s made in each, 8N²D           0.23     60  10,200   at 440: their second product starves on L2
              one sweep, 6N²D                            sums over rows need atomics, or D·4 bytes a row and program
              blocks of G and the vendor's GEMM, 6N²D    0.16     31   5,300   chosen: its 4N²D run at the vendor's speed

A tile of 256 × 128 takes 12 · 1,024 clocks of MMA at D = 768 and then 2,400 of epilogue, nearly all for 32,768 exponentials,
under which only loads go on: 84 % of 790 at best, and 600 from L2 (``tiles``).
No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.available import triton_lacks
from clipfast.kernels.tiles import (
    BAND,
    SIZES,
    add_product,
    blocks,
    chip,
    constants,
    described,
    fitting,
    operand,
    place,
    signature,
    similarity,
    tiles,
)

_LOG2E = tl.constexpr(1.4426950408889634)
SCANS = 512  # programs of ``_scan`` at most; every other program takes the largest of what they leave, 6 KB


@triton.jit(do_not_specialize=SIZES)
def _scan(image, text, scale, marks, n, N, offset, D: tl.constexpr, SCANS: tl.constexpr, ROWS: tl.constexpr):
    """marks [3, SCANS]: the largest ‖image_i‖², ‖text_j‖² and sample of s among the rows of each program.

    The sample is s at the pairs, at row i and column i where there are none. NaN is left out: it comes back in the sums.
    """
    factor = tl.load(scale).to(tl.float32)
    a_most = tl.zeros((ROWS,), tl.float32)
    b_most = tl.zeros((ROWS,), tl.float32)
    s_most = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(tl.program_id(0) * ROWS, tl.maximum(n, N), tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        pair = row + offset
        pair = tl.where((pair >= 0) & (pair < N), pair, row)
        aa, bb, ab = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, 128):
            d = start + tl.arange(0, 128)
            inside = (d < D)[None, :]
            a = tl.load(image + (row.to(tl.int64)[:, None] * D + d[None, :]), mask=(row < n)[:, None] & inside, other=0.0)
            b = tl.load(text + (row.to(tl.int64)[:, None] * D + d[None, :]), mask=(row < N)[:, None] & inside, other=0.0)
            c = tl.load(text + (pair.to(tl.int64)[:, None] * D + d[None, :]), mask=(pair < N)[:, None] & inside, other=0.0)
            a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
            aa, bb, ab = aa + tl.sum(a * a, 1), bb + tl.sum(b * b, 1), ab + tl.sum(a * c, 1)
        s = ab * factor
        a_most = tl.maximum(a_most, tl.where(aa == aa, aa, 0.0))
        b_most = tl.maximum(b_most, tl.where(bb == bb, bb, 0.0))
        s_most = tl.maximum(s_most, tl.where((s == s) & (row < n) & (pair < N), s, float("-inf")))
    marks += tl.program_id(0)
    tl.store(marks, tl.max(a_most, 0))
    tl.store(marks + SCANS, tl.max(b_most, 0))
    tl.store(marks + 2 * SCANS, tl.max(s_most, 0))


@triton.jit
def _reference(scale, marks, scans, SCANS: tl.constexpr):
    """The t of exp(s - t): the largest sample, near which exponents keep their digits, or 60 below the bound of all s.

    So no sum of exponentials overflows, and one of k terms is exact whose largest s exceeds t - 70 + log k.
    """
    k = tl.arange(0, SCANS)
    a = tl.max(tl.load(marks + k, mask=k < scans, other=0.0), 0)
    b = tl.max(tl.load(marks + SCANS + k, mask=k < scans, other=0.0), 0)
    bound = tl.abs(tl.load(scale).to(tl.float32)) * tl.sqrt(a) * tl.sqrt(b)
    return tl.maximum(tl.max(tl.load(marks + 2 * SCANS + k, mask=k < scans, other=float("-inf")), 0), bound - 60)


@triton.jit(do_not_specialize=SIZES)
def _sums(
    image, text, scale, marks, scans, row_parts, col_parts, diagonal, level, n, N, start, height, width, offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    HOST: tl.constexpr, SCANS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Σ exp(s - t) without the pairs for the columns of block p from ``start`` on and ``height`` blocks of rows, part q of all.

    row_parts[p] [n] over these columns, col_parts[q] [width] over these rows; for rows whose pair is here s into diagonal [n]
    and log2(exp(s - t)) into level [n].
    """
    if not HOST:
        image = tl.make_tensor_descriptor(image, [n, D], [D, 1], [BLOCK_M, BLOCK_D])
        text = tl.make_tensor_descriptor(text, [N, D], [D, 1], [BLOCK_N, BLOCK_D])
    factor = tl.load(scale).to(tl.float32)
    t = _reference(scale, marks, scans, SCANS) * _LOG2E
    first = start + tl.program_id(0) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    row_parts += tl.program_id(0).to(tl.int64) * n
    top = tl.program_id(1) * height * BLOCK_M
    # Apart stay the rows that lie in other threads: WARPS of 16, of which a thread holds one in eight.
    total = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
    for r in tl.range(top, tl.minimum(top + height * BLOCK_M, n), BLOCK_M, flatten=True):
        s = similarity(image, text, r, first, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        row = r + tl.arange(0, BLOCK_M)
        ahead = r + offset - first
        paired = (ahead < BLOCK_N) & (ahead + BLOCK_M > 0)
        if paired:
            own = tl.sum(tl.where(row[:, None] + offset == column[None, :], s, 0.0), 1)
            here = (row < n) & (row + offset >= first) & (row + offset < tl.minimum(first + BLOCK_N, N))
            tl.store(diagonal + row, own * factor, mask=here)
            tl.store(level + row, tl.fma(own, factor * _LOG2E, -t), mask=here)
        e = tl.exp2(tl.fma(s, factor * _LOG2E, -t))
        if paired | (r + BLOCK_M > n) | (first + BLOCK_N > N):
            counts = (row < n)[:, None] & (column < N)[None, :] & (row[:, None] + offset != column[None, :])
            e = tl.where(counts, e, 0.0)
        tl.store(row_parts + row, tl.sum(e, 1), mask=row < n)
        total += tl.sum(tl.sum(tl.reshape(e, (BLOCK_M // (16 * WARPS), WARPS, 2, 8, BLOCK_N)), 2), 0)
    col_parts += tl.program_id(1).to(tl.int64) * width + (column - start)
    # One sum over both axes: Triton 3.8 fails on two for sm_100.
    tl.store(col_parts, tl.sum(tl.reshape(total, (WARPS * 8, BLOCK_N)), 0), mask=column < N)


@triton.jit(do_not_specialize=SIZES)
def _finish(
    a, b, scale, marks, scans, sums, diagonal, level, out_max, out_sum, rows, columns, offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    HOST: tl.constexpr, SCANS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(reference, sum of exponentials) of each row of a, or with COLUMNS of what was the column, from its sum without the pair.

    The reference is the pair's own s, so that a small loss keeps its digits, but where the rest exceeds it by e⁶⁰. Blocks with
    a sum so small, pair and all, that t may have cost it terms are summed again by each row's own maximum.
    """
    if not HOST:
        a = tl.make_tensor_descriptor(a, [rows, D], [D, 1], [BLOCK_M, BLOCK_D])
        b = tl.make_tensor_descriptor(b, [columns, D], [D, 1], [BLOCK_N, BLOCK_D])
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    pair = row + offset
    paired = (row < rows) & (pair >= 0) & (pair < columns)
    image_row = pair if COLUMNS else row
    own = tl.load(diagonal + image_row, mask=paired, other=0.0)
    above = tl.load(level + image_row, mask=paired, other=0.0)
    total = tl.load(sums + row, mask=row < rows, other=1e30)
    t = tl.full((BLOCK_M,), 0.0, tl.float32) + _reference(scale, marks, scans, SCANS)
    whole = total + tl.where(paired, tl.exp2(above), 0.0)
    if tl.max((whole < columns * 2.0**-102).to(tl.int32), 0) > 0:  # exp(s - t) < 2⁻¹²⁶ is lost: else less than 2⁻²⁴ of it
        factor = tl.load(scale).to(tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for start in range(0, columns, BLOCK_N):
            s = similarity(a, b, first, start, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION) * factor
            column = start + tl.arange(0, BLOCK_N)
            s = tl.where((column < columns)[None, :] & (column[None, :] != pair[:, None]), s, float("-inf"))
            peak = tl.maximum(t, tl.max(s, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp2((t - base) * _LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * _LOG2E), 1)
            t = peak
        t = tl.where(t == float("-inf"), 0.0, t)
        above = (own - t) * _LOG2E
    rest = tl.where(total == 0, 0.0, total * tl.exp2(-above))
    near = paired & ~(rest > 2.0**86)
    tl.store(out_max + row, tl.where(near, own, t), mask=row < rows)
    tl.store(out_sum + row, tl.where(near, 1 + rest, tl.where(paired, total + tl.exp2(above), total)), mask=row < rows)


@triton.jit(do_not_specialize=SIZES)
def _weights(
    row_low, row_high, col_low, row_lse, col_lse, row_grad, col_grad, alpha, beta, shift, n, N, BLOCK: tl.constexpr
):  # fmt: skip
    """alpha_i = row_grad_i·exp(t - row_lse_i) and beta_j likewise, 0 beyond their ends; shift = t.

    G_ij = exp(s_ij - t)·(alpha_i + beta_j): one exponential serves both softmaxes while no s, which is at most its row's lse,
    exceeds t by more than 80 and t no lse by more than 70. Where the lse spread further, shift is NaN.
    """
    high, low = tl.load(row_high), tl.minimum(tl.load(row_low), tl.load(col_low))
    t = tl.maximum(high - 80, tl.minimum(high, low + 70))
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lse, grad = tl.load(row_lse + k, mask=k < n, other=0.0), tl.load(row_grad + k, mask=k < n, other=0.0)
    tl.store(alpha + k, tl.where(k < n, grad * tl.exp2((t - lse) * _LOG2E), 0.0))
    lse, grad = tl.load(col_lse + k, mask=k < N, other=0.0), tl.load(col_grad + k, mask=k < N, other=0.0)
    tl.store(beta + k, tl.where(k < N, grad * tl.exp2((t - lse) * _LOG2E), 0.0))
    tl.store(shift, tl.where(high - low <= 150, t, float("nan")))


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    image, text, G, scale, shift, row_lse, col_lse, row_weight, col_weight, own, n, N, first, start, rows, columns, width,
    offset, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    HOST: tl.constexpr, BAND: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """G of the rows from ``first`` and the columns from ``start`` on, as many as ``rows`` and ``columns``, and own_i at pairs.

    The weights are alpha and beta of ``_weights``; EXACT, they are the upstream gradients, with an exponential for each
    softmax. Both kernels are launched, as only the GPU knows ``shift``; one of them returns at once.
    """
    t = tl.load(shift)
    if (t == t) == EXACT:
        return
    if not HOST:
        image = tl.make_tensor_descriptor(image, [n, D], [D, 1], [BLOCK_M, BLOCK_D])
        text = tl.make_tensor_descriptor(text, [N, D], [D, 1], [BLOCK_N, BLOCK_D])
        down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
        G = tl.make_tensor_descriptor(G, [down * BLOCK_M, width], [width, 1], [BLOCK_M, BLOCK_N])
    t *= _LOG2E
    factor = tl.load(scale).to(tl.float32) * _LOG2E
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        r, c = place(tile, down, across, BAND)
        r *= BLOCK_M
        c *= BLOCK_N
        s = similarity(image, text, first + r, start + c, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        row = first + r + tl.arange(0, BLOCK_M)
        column = start + c + tl.arange(0, BLOCK_N)
        if EXACT:
            a, b = tl.load(row_weight + row, mask=row < n, other=0.0), tl.load(col_weight + column, mask=column < N, other=0.0)
            u = tl.load(row_lse + row, mask=row < n, other=0.0) * _LOG2E
            v = tl.load(col_lse + column, mask=column < N, other=0.0) * _LOG2E
            s *= factor
            g = a[:, None] * tl.exp2(s - u[:, None]) + b[None, :] * tl.exp2(s - v[None, :])
        else:
            a, b = tl.load(row_weight + row), tl.load(col_weight + column)
            g = tl.exp2(tl.fma(s, factor, -t)) * (a[:, None] + b[None, :])
        ahead = first + r + offset - start - c
        if (ahead < BLOCK_N) & (ahead + BLOCK_M > 0):
            here = row[:, None] + offset == column[None, :]
            g = tl.where(here, tl.load(own + row, mask=row < n, other=0.0)[:, None], g)
        G.store([r, c], g.to(G.dtype))


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds.

    Those that GPUs of this compute capability run; what 8.0 runs compiles for all.
    """
    variants = []
    for dtype, D, many in (
        (torch.bfloat16, 512, True), (torch.bfloat16, 768, True), (torch.bfloat16, 512, False), (torch.float32, 512, True),
    ):  # fmt: skip
        feature = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        for kernel, extra in (
            (_sums, dict(SCANS=SCANS)), (_finish, dict(SCANS=SCANS, COLUMNS=True)), (_gradient, dict(BAND=BAND, EXACT=False)),
            (_gradient, dict(BAND=BAND, EXACT=True)),
        ):  # fmt: skip
            shape = tiles(kernel.__name__[1:], dtype, D, capability, many)
            values, warps, stages = constants(shape)
            values |= extra | (dict(WARPS=_warps(shape)) if kernel is _sums else {})
            types = signature(kernel, feature, shape) | dict.fromkeys(values, "constexpr")
            name = f"{kernel.__name__}{' exact' if extra.get('EXACT') else ''} {feature} D{D}{'' if many else ' few'}"
            variants.append((name, kernel, types, values, warps, stages))
    for kernel, values in ((_scan, dict(D=768, SCANS=SCANS, ROWS=16)), (_weights, dict(BLOCK=1024))):
        types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("n", "N", "offset"), "i32")
        types |= dict.fromkeys(("image", "text"), "*bf16") if kernel is _scan else {}
        types = {name: types[name] for name in kernel.arg_names} | dict.fromkeys(values, "constexpr")
        variants.append((kernel.__name__, kernel, types, values, 4, 1))
    return variants


def supports(image: Tensor, text: Tensor, *rest: Any) -> str | None:
    if reason := triton_lacks(image, products=True):
        return reason
    return None if image.numel() and text.numel() else "expected at least one row and one column"


def _warps(shape: dict[str, Any]) -> int:
    return min(shape["num_warps"], shape["BLOCK_M"] // 16)


@functools.cache
def _shares(down: int, across: int, processors: int) -> tuple[int, int]:
    """(columns of blocks a launch, parts of their rows): every program has one column and a part of the rows.

    A launch takes at most one column a processor, as each leaves its sums for all rows: 4·132 bytes a row, less than its
    features. With fewer columns the rows are parted for the shortest time, in tiles, and a tenth for each start.
    """
    across = triton.cdiv(across, triton.cdiv(across, processors))

    def time(parts: int) -> float:
        return triton.cdiv(across * parts, processors) * (triton.cdiv(down, parts) + 0.1)

    return across, min(range(1, min(down, processors) + 1), key=time)


def forward(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n, _), N = image.shape, len(text)
    offset = max(-n, min(offset, N))  # beyond these no row has its pair, and more would not fit 32 bits
    shape, small = fitting("sums", image, text), fitting("finish", image, text)
    image, text = operand(image, shape), operand(text, shape)
    M, width, K = shape["BLOCK_M"], shape["BLOCK_N"], shape["BLOCK_D"]
    down = triton.cdiv(n, M)
    across, parts = _shares(down, triton.cdiv(N, width), chip(image.device)[0])
    row_max, row_sum, level = (image.new_empty(n, dtype=torch.float32) for _ in range(3))
    row_total, diagonal = (image.new_zeros(n, dtype=torch.float32) for _ in range(2))
    col_max, col_sum, col_total = (image.new_empty(N, dtype=torch.float32) for _ in range(3))
    marks, scans = image.new_empty(3, SCANS, dtype=torch.float32), min(SCANS, triton.cdiv(max(n, N), 16))
    a, b = described(image, M, K, shape), described(text, width, K, shape)
    with torch.cuda.device_of(image):
        _scan[(scans,)](image, text, scale, marks, n, N, offset, D=shape["D"], SCANS=SCANS, ROWS=16)
        for start in range(0, N, across * width):
            columns = min(across * width, N - start)
            row_parts = image.new_empty(triton.cdiv(columns, width), n, dtype=torch.float32)
            col_parts = image.new_empty(parts, columns, dtype=torch.float32)
            _sums[(len(row_parts), parts)](
                a, b, scale, marks, scans, row_parts, col_parts, diagonal, level, n, N, start, triton.cdiv(down, parts),
                columns, offset, SCANS=SCANS, WARPS=_warps(shape), **shape,
            )  # fmt: skip
            row_total += row_parts.sum(0)
            torch.sum(col_parts, 0, out=col_total[start : start + columns])
        M, width = small["BLOCK_M"], small["BLOCK_N"]
        for of_columns, x, y, out, shift in (
            (False, image, text, (row_total, diagonal, level, row_max, row_sum), offset),
            (True, text, image, (col_total, diagonal, level, col_max, col_sum), -offset),
        ):
            _finish[(triton.cdiv(len(x), M),)](
                described(x, M, K, small), described(y, width, K, small), scale, marks, scans, *out, len(x), len(y), shift,
                SCANS=SCANS, COLUMNS=of_columns, **small,
            )  # fmt: skip
    return row_max, row_sum, col_max, col_sum, diagonal


def backward(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, row_lse: Tensor, col_lse: Tensor, row_grad: Tensor,
    col_grad: Tensor, diagonal_grad: Tensor, want_image: bool, want_text: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (n, D), N = image.shape, len(text)
    offset = max(-n, min(offset, N))
    image_grad = image.new_empty(n if want_image else 0, D, dtype=torch.float32)
    text_grad = image.new_empty(N if want_text else 0, D, dtype=torch.float32)
    shape = fitting("gradient", image, text)
    image, text = operand(image, shape), operand(text, shape)
    vectors = [row_lse, col_lse, row_grad, col_grad, diagonal_grad]
    unit = None
    if image.dtype == torch.float16:  # a mean's gradients, 1/N and less, would be subnormal: let the largest be 4,096
        unit = torch.maximum(row_grad.abs().amax(), col_grad.abs().amax()).clamp_min(1e-30) / 4096
        vectors[2:] = [x / unit for x in vectors[2:]]
    row_lse, col_lse, row_grad, col_grad, diagonal_grad = (x.contiguous() for x in vectors)
    alpha, beta = image.new_empty(2, triton.cdiv(max(n, N), 1024) * 1024, dtype=torch.float32)
    shift = torch.empty_like(row_lse[:1])
    M, width, K = shape["BLOCK_M"], shape["BLOCK_N"], shape["BLOCK_D"]
    a, b = described(image, M, K, shape), described(text, width, K, shape)
    rows, columns = next(blocks(n, N, image.itemsize))
    G = image.new_empty(triton.cdiv(rows.stop, M) * M, triton.cdiv(columns.stop, width) * width)
    out = described(G, M, width, shape)
    with torch.cuda.device_of(image):
        (row_low, row_high), col_low = torch.aminmax(row_lse), col_lse.amin()
        _weights[(len(alpha) // 1024,)](
            row_low, row_high, col_low, row_lse, col_lse, row_grad, col_grad, alpha, beta, shift, n, N, BLOCK=1024
        )  # fmt: skip
        for rows, columns in blocks(n, N, image.itemsize):
            down, across = rows.stop - rows.start, columns.stop - columns.start
            programs = min(triton.cdiv(down, M) * triton.cdiv(across, width), chip(image.device)[0])
            for exact, weights in ((False, (alpha, beta)), (True, (row_grad, col_grad))):
                _gradient[(programs,)](
                    a, b, out, scale, shift, row_lse, col_lse, *weights, diagonal_grad, n, N, rows.start, columns.start, down,
                    across, G.shape[1], offset, BAND=BAND, EXACT=exact, **shape,
                )  # fmt: skip
            g = G[:down, :across]
            if want_image:
                add_product(image_grad[rows], g, text[columns, :D], first=columns.start == 0)
            if want_text:
                add_product(text_grad[columns], g.T, image[rows, :D], first=rows.start == 0)
    if unit is not None:
        image_grad *= unit
        text_grad *= unit
    return image_grad, text_grad
