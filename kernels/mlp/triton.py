"""Bias + QuickGELU or exact GELU in Triton: one pass forward, one backward with the bias gradient summed on the way.

Bandwidth-bound: two passes over [rows, F] forward, three backward. Each program of backward owns a block of columns and a fixed
share of the rows; its sums are added in order, without atomics.

No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.available import triton_lacks

BLOCK = 1024  # elements of a pass: 8 a thread of 128, one 16-byte load in 16 bit
COLUMNS = 128
ROWS = 8


@triton.jit
def _gate(x, QUICK: tl.constexpr):
    """What x is multiplied by: σ(1.702x) or Φ(x)."""
    if QUICK:
        return tl.sigmoid(1.702 * x)
    else:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _forward(h, bias, y, size, F: tl.constexpr, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(h + i, mask=i < size, other=0.0).to(tl.float32) + tl.load(bias + i % F).to(tl.float32)
    tl.store(y + i, (x * _gate(x, QUICK)).to(y.dtype.element_ty), mask=i < size)


@triton.jit
def _backward(
    dy, h, bias, dh, dbiases, rows, F: tl.constexpr, QUICK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < F)[None, :]
        place = row.to(tl.int64)[:, None] * F + column[None, :]
        x = tl.load(h + place, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        gate = _gate(x, QUICK)
        if QUICK:  # noqa: SIM108 - each branch is compiled alone
            slope = gate * (1 + 1.702 * x * (1 - gate))
        else:
            slope = gate + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        d = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(dh + place, d.to(dh.dtype.element_ty), mask=inside)
        total += d
    tl.store(dbiases + tl.program_id(1).to(tl.int64) * F + column, tl.sum(total, 0), mask=column < F)


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds."""
    variants = []
    for pointer, quick in (("*bf16", True), ("*bf16", False), ("*fp32", True)):
        for kernel, constants in ((_forward, dict(BLOCK=BLOCK)), (_backward, dict(ROWS=ROWS, COLUMNS=COLUMNS))):
            constants = constants | dict(F=3072, QUICK=quick)
            types = dict.fromkeys(kernel.arg_names, pointer) | dict(bias="*fp32", dbiases="*fp32", size="i64", rows="i32")
            types |= dict.fromkeys(constants, "constexpr")
            name = f"{kernel.__name__} {pointer[1:]} {'quick' if quick else 'exact'}"
            variants.append((name, kernel, {a: types[a] for a in kernel.arg_names}, constants, 4, 2))
    return variants


def supports(*args: Any) -> str | None:
    return triton_lacks(args[-3])


def forward(h: Tensor, bias: Tensor, quick_gelu: bool) -> Tensor:
    h, y = h.contiguous(), torch.empty_like(h, memory_format=torch.contiguous_format)
    if h.numel():
        with torch.cuda.device_of(h):
            _forward[(triton.cdiv(h.numel(), BLOCK),)](
                h, bias.contiguous(), y, h.numel(), F=len(bias), QUICK=quick_gelu, BLOCK=BLOCK
            )  # fmt: skip
    return y


def backward(dy: Tensor, h: Tensor, bias: Tensor, quick_gelu: bool) -> tuple[Tensor, Tensor]:
    dy, h, F = dy.contiguous(), h.contiguous(), len(bias)
    rows, dh = h.numel() // F, torch.empty_like(h)
    # Enough programs to fill a GPU of 132 SMs a few times over at 3,072 columns: 24 blocks of columns by 32 shares of the rows.
    shares = max(1, min(triton.cdiv(rows, ROWS), 32))
    dbiases = h.new_zeros((shares, F), dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(h):
            _backward[(triton.cdiv(F, COLUMNS), shares)](
                dy, h, bias.contiguous(), dh, dbiases, rows, F=F, QUICK=quick_gelu, ROWS=ROWS, COLUMNS=COLUMNS
            )  # fmt: skip
    return dh, dbiases.sum(0).to(bias.dtype)
