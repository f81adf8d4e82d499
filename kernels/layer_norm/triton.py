"""Layer norm in Triton: forward takes rows by the block, backward a fixed share of the rows by each program.

Bandwidth-bound both ways, about 8 FLOPs an element: every operand is read once, in registers from load to store. The gradients
of gain and bias are summed within a program, then over programs in order: no atomics, equal inputs give equal bits.

No GPU has run these yet; tile sizes follow from the arithmetic beside them and from ptxas (bench/compiled.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.available import triton_lacks


@triton.jit
def _forward(
    x, residual, weight, bias, y, s, mean, rstd, rows, eps, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    t = tl.load(x + place, mask=inside, other=0.0)
    if residual is not None:
        # Rounded to the stream's dtype first, so that what is normalised is what is returned.
        t = (t.to(tl.float32) + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + place, t, mask=inside)
    t = t.to(tl.float32)
    centre = tl.sum(t, 1) / C
    deviation = tl.where(inside, t - centre[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(deviation * deviation, 1) / C + eps)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    out = deviation * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _backward(
    dy, ds, s, weight, mean, rstd, dx, dweights, dbiases, rows,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        place = row.to(tl.int64)[:, None] * C + column[None, :]
        g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = (tl.load(s + place, mask=inside, other=0.0).to(tl.float32) - centre[:, None]) * scale[:, None]
        normal = tl.where(inside, normal, 0.0)
        dweight += g * normal
        dbias += g
        g = g * gain[None, :]
        along = tl.sum(g * normal, 1) / C
        out = (g - tl.sum(g, 1)[:, None] / C - normal * along[:, None]) * scale[:, None]
        if ds is not None:
            out += tl.load(ds + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * C + column
    tl.store(dweights + part, tl.sum(dweight, 0), mask=column < C)
    tl.store(dbiases + part, tl.sum(dbias, 0), mask=column < C)


def _tiles(C: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and launch options of forward and backward.

    Forward: 4,096 elements a program of 128 threads, 32 of each operand a thread, four 16-byte loads in 16 bit. Backward holds
    two sums beside three operands: 2,048 elements, so that a thread keeps 16 of each; one row where it is wider.
    """
    columns = triton.next_power_of_2(C)
    warps = 4 if columns <= 4096 else 8
    forward = dict(ROWS=max(1, 4096 // columns), COLUMNS=columns, num_warps=warps)
    return forward, dict(ROWS=max(1, 2048 // columns), COLUMNS=columns, num_warps=warps)


def compiled(capability: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constants, num_warps, num_stages) of the variants that bench/compiled.py builds."""
    variants = []
    for pointer, C, fused in (("*bf16", 512, True), ("*bf16", 768, False), ("*bf16", 1024, True), ("*fp32", 1024, True)):
        for kernel, tiles in zip((_forward, _backward), _tiles(C), strict=True):
            constants: dict[str, Any] = dict(tiles, C=C) | ({} if fused else dict(residual=None, s=None, ds=None))
            if kernel is _backward:
                constants.pop("s", None)
            constants = {name: value for name, value in constants.items() if name in (*kernel.arg_names, "num_warps")}
            warps = constants.pop("num_warps")
            types = dict.fromkeys(kernel.arg_names, "*fp32") | dict(rows="i32", eps="fp32")
            types |= dict.fromkeys(("x", "residual", "y", "s", "dy", "ds", "dx"), pointer) | dict.fromkeys(
                constants, "constexpr"
            )
            name = f"{kernel.__name__} {pointer[1:]} C{C}{' residual' if fused else ''}"
            variants.append((name, kernel, {a: types[a] for a in kernel.arg_names}, constants, warps, 2))
    return variants


def supports(x: Tensor, *rest: Any) -> str | None:
    if x.shape[-1] > 8192:
        return f"expected at most 8192 channels, a row in one program, got {x.shape[-1]}"
    return triton_lacks(x)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float):
    x, C = x.contiguous(), x.shape[-1]
    rows = x.numel() // C
    y, mean = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    s, rstd = x.new_empty(0) if residual is None else torch.empty_like(x), torch.empty_like(mean)
    tiles, _ = _tiles(C)
    if rows:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, tiles["ROWS"]),)](
                x, None if residual is None else residual.contiguous(), weight.contiguous(), bias.contiguous(), y,
                None if residual is None else s, mean, rstd, rows, eps, C=C, **tiles,
            )  # fmt: skip
    return y, s, mean, rstd


def backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    dy, C = dy.contiguous(), s.shape[-1]
    rows, dx = s.numel() // C, torch.empty_like(dy)
    _, tiles = _tiles(C)
    sms = torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, tiles["ROWS"]), 4 * sms))
    dweights, dbiases = (dy.new_zeros((programs, C), dtype=torch.float32) for _ in range(2))
    if rows:
        with torch.cuda.device_of(dy):
            _backward[(programs,)](
                dy, None if ds is None else ds.contiguous(), s.contiguous(), weight.contiguous(), mean.contiguous(),
                rstd.contiguous(), dx, dweights, dbiases, rows, C=C, **tiles,
            )  # fmt: skip
    return dx, dweights.sum(0).to(weight.dtype), dbiases.sum(0).to(weight.dtype)
