"""SigLIP's loss and its gradients in Triton: logits live in registers, their derivative G in 16-bit blocks.

One sweep, 6N²D: ``_sweep`` makes the losses of a tile, their slopes' sums and, where a gradient is wanted, the tile of G; the
vendor's GEMM multiplies each block of G by the texts and, transposed, by the images.

Estimates in ms for an H200 in bf16 at (N = 4,096, D = 768), (65,536, 768) and (1,048,576, 512), as in contrastive/triton.py:

    loss alone                                           0.06     13   2,200   at 520 TFLOP/s
    with gradients                                       0.17     32   5,500

A tile of 256 × 128 takes 12 · 1,024 clocks of MMA at D = 768 and then about 4,200 for two exponential-like instructions an
element, at 16 a clock; the logarithms of 64 columns are one (``_one_by_one``).
No GPU has run this yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

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


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _one_by_one(x, y):
    """(1 + x)(1 + y) - 1 with the digits of small x and y, which 1 + x would lose."""
    return x + y + x * y


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0: 2·artanh(x / (2 + x)), to fp32 by six terms up to x = 1."""
    r = x / (2 + x)
    q = r * r
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
    return tl.where(x < 1, 2 * r * series, tl.log(1 + x))


@triton.jit
def _losses(l, row, column, G, r, c, offset, paired, UNIT: tl.constexpr, WRITE: tl.constexpr, NARROW: tl.constexpr):
    """Row sums of log(1 + exp(l)) and of its slopes, for l / log 2 of at most 64 columns; the slopes go to G, if at all.

    log(1 + exp(l)) = max(l, 0) + log(1 + e) with e = exp(-|l|), and Π(1 + e) ≤ 2⁶⁴.
    """
    e = tl.exp2(-tl.abs(l))
    if NARROW:  # 1 / (1 + e) by one instruction and a product, to 2.5e-7: a division takes six
        root = tl.rsqrt(1 + e)
        g = tl.where(l < 0, e, 1.0) * (root * root)
    else:
        g = tl.where(l < 0, e, 1.0) / (1 + e)
    for _ in tl.static_range(3):  # as deep as wgmma's layout keeps both halves in a thread
        left, right = _halves(e)
        e = _one_by_one(left, right)
    loss = tl.sum(tl.maximum(l, 0.0), 1) / _LOG2E + _log1p(tl.reduce(e, 1, _one_by_one))
    if paired:
        g = tl.where(row[:, None] + offset == column[None, :], -g, g)
    if WRITE:
        G.store([r, c], (g * UNIT).to(G.dtype))
    return loss, tl.sum(g, 1)


@triton.jit(do_not_specialize=SIZES)
def _sweep(
    image, text, G, scale, bias, parts, n, N, first, start, rows, columns, width, offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    HOST: tl.constexpr, BAND: tl.constexpr, UNIT: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """The rows from ``first`` and the columns from ``start`` on, as many as ``rows`` and ``columns``.

    parts [2, columns of tiles, rows]: losses and slopes of each row over a tile's columns. G = UNIT times the slopes.
    """
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    if not HOST:
        image = tl.make_tensor_descriptor(image, [n, D], [D, 1], [BLOCK_M, BLOCK_D])
        text = tl.make_tensor_descriptor(text, [N, D], [D, 1], [BLOCK_N, BLOCK_D])
        if WRITE:
            G = tl.make_tensor_descriptor(G, [down * BLOCK_M, width], [width, 1], [BLOCK_M, 64])
    NARROW: tl.constexpr = text.dtype != tl.float32
    factor, shift = tl.load(scale).to(tl.float32) * _LOG2E, tl.load(bias).to(tl.float32) * _LOG2E
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        r, c = place(tile, down, across, BAND)
        s = similarity(
            image, text, first + r * BLOCK_M, start + c * BLOCK_N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )  # fmt: skip
        l = tl.fma(s, factor, shift)
        out = parts + c.to(tl.int64) * rows
        r *= BLOCK_M
        c *= BLOCK_N
        row, column = first + r + tl.arange(0, BLOCK_M), start + c + tl.arange(0, BLOCK_N)
        ahead = first + r + offset - start - c
        paired = (ahead < BLOCK_N) & (ahead + BLOCK_M > 0)
        if paired | (start + c + BLOCK_N > N):
            l = tl.where(row[:, None] + offset == column[None, :], -l, l)
            l = tl.where((column < N)[None, :], l, float("-inf"))
        if BLOCK_N == 64:
            loss, slope = _losses(l, row, column, G, r, c, offset, paired, UNIT, WRITE, NARROW)
        else:
            left, right = _halves(l)
            column = start + c + tl.arange(0, 64)
            loss, slope = _losses(left, row, column, G, r, c, offset, paired, UNIT, WRITE, NARROW)
            loss_2, slope_2 = _losses(right, row, column + 64, G, r, c + 64, offset, paired, UNIT, WRITE, NARROW)
            loss += loss_2
            slope += slope_2
        here = r + tl.arange(0, BLOCK_M)
        tl.store(out + here, loss, mask=here < rows)
        tl.store(out + across.to(tl.int64) * rows + here, slope, mask=here < rows)


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds.

    Those that GPUs of this compute capability run; what 8.0 runs compiles for all.
    """
    variants = []
    for dtype, D, many, write in (
        (torch.bfloat16, 512, True, True), (torch.bfloat16, 768, True, True), (torch.bfloat16, 768, True, False),
        (torch.bfloat16, 512, False, True), (torch.float32, 512, True, True),
    ):  # fmt: skip
        feature = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        shape = tiles("sigmoid", dtype, D, capability, many)
        values, warps, stages = constants(shape)
        values |= dict(BAND=BAND, UNIT=1.0, WRITE=write)
        types = signature(_sweep, feature, shape, G_columns=64) | dict.fromkeys(values, "constexpr")
        name = f"_sweep {feature} D{D}{'' if many else ' few'}{'' if write else ' loss'}"
        if not write:
            values["G"], types["G"] = None, "constexpr"
        variants.append((name, _sweep, types, values, warps, stages))
    return variants


def supports(image: Tensor, text: Tensor, *rest: Any) -> str | None:
    if reason := triton_lacks(image, products=True):
        return reason
    return None if image.numel() and text.numel() else "expected at least one row and one column"


def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, want_image: bool, want_text: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, D), N = image.shape, len(text)
    offset = max(-n, min(offset, N))  # beyond these no row has its pair, and more would not fit 32 bits
    image_grad = image.new_empty(n if want_image else 0, D, dtype=torch.float32)
    text_grad = image.new_empty(N if want_text else 0, D, dtype=torch.float32)
    sums = image.new_zeros(2, n, dtype=torch.float32)
    write = want_image or want_text
    unit = 32768.0 if image.dtype == torch.float16 else 1.0  # slopes far below 1 would be subnormal
    shape = fitting("sigmoid", image, text)
    image, text = operand(image, shape), operand(text, shape)
    M, width, K = shape["BLOCK_M"], shape["BLOCK_N"], shape["BLOCK_D"]
    a, b = described(image, M, K, shape), described(text, width, K, shape)
    rows, columns = next(blocks(n, N, image.itemsize))
    out = G = None
    if write:
        G = image.new_empty(triton.cdiv(rows.stop, M) * M, triton.cdiv(columns.stop, width) * width)
        out = described(G, M, 64, shape)
    with torch.cuda.device_of(image):
        for rows, columns in blocks(n, N, image.itemsize):
            down, across = rows.stop - rows.start, columns.stop - columns.start
            parts = image.new_empty(2, triton.cdiv(across, width), down, dtype=torch.float32)
            programs = min(triton.cdiv(down, M) * parts.shape[1], chip(image.device)[0])
            _sweep[(programs,)](
                a, b, out, scale, bias, parts, n, N, rows.start, columns.start, down, across, 0 if G is None else G.shape[1],
                offset, BAND=BAND, UNIT=unit, WRITE=write, **shape,
            )  # fmt: skip
            sums[:, rows] += parts.sum(1)
            if G is None:
                continue
            g = G[:down, :across]
            if want_image:
                add_product(image_grad[rows], g, text[columns, :D], first=columns.start == 0, alpha=1 / unit)
            if want_text:
                add_product(text_grad[columns], g.T, image[rows, :D], first=rows.start == 0, alpha=1 / unit)
    return sums[0], sums[1].clone(), image_grad, text_grad  # outputs of an op share no memory
