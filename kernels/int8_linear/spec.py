"""A Linear whose weights are 8-bit integers: definition, cases, floors.

Weights are symmetric, with a scale for each output channel; activations become symmetric 8-bit integers as they come, with a
scale for each row. So a row's result depends on nothing but that row.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32, 4  # output channels and input channels that lie together
MOST = 127  # the greatest integer of either operand
LEAST = 1e-36  # a row of smaller numbers counts as zero: 127 over them is no fp32 number
CASES: dict[str, dict[str, Any]] = {
    **{f"C{C}": dict(rows=(3, 5), C=C, out=C) for C in (64, 320, 512, 768, 1152)},
    "wider": dict(rows=(77,), C=64, out=256, quick_gelu=True),
    "wider, exact": dict(rows=(50,), C=64, out=256, quick_gelu=False),
    "narrower": dict(rows=(25,), C=256, out=64),
    "one row": dict(rows=(1,), C=64, out=64),
    "prime": dict(rows=(7, 13), C=37, out=101, quick_gelu=True),
    "no bias": dict(rows=(17,), C=64, out=128, bias=False),
    "one column": dict(rows=(9,), C=5, out=1),
    "no rows": dict(rows=(0,), C=64, out=32),
    "rows apart": dict(rows=(6, 17), C=64, out=64, layout="rows apart"),
    "transposed": dict(rows=(31,), C=64, out=48, layout="transposed"),
    "zero rows": dict(rows=(9,), C=64, out=48, layout="zero rows"),
    "outliers": dict(rows=(9,), C=64, out=48, layout="outliers", quick_gelu=False),
    "blocks of rows": dict(rows=(301,), C=1030, out=70),
}
BENCH: dict[str, dict[str, Any]] = {
    "text of 12 fc": dict(rows=(12,), C=512, out=2048, quick_gelu=True),
    "B/32 QKV, one image": dict(rows=(50,), C=768, out=2304),
    "B/32 fc, 8 images": dict(rows=(8, 50), C=768, out=3072, quick_gelu=True),
    "B/32 proj, 32 images": dict(rows=(32, 50), C=3072, out=768),
}


def inputs(
    generator: torch.Generator, rows: tuple[int, ...], C: int, out: int, bias: bool = True, quick_gelu: bool | None = None,
    layout: str = "plain",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``int8_linear`` in fp64; ``rows``: the leading dimensions of x."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    x = normal(*rows, C)
    if layout == "rows apart":
        x = normal(*rows[:-1], 2 * rows[-1], C)[..., ::2, :]
    elif layout == "transposed":
        x = normal(C, *rows).movedim(0, -1)
    elif layout == "zero rows":
        x[::2] = 0
    elif layout == "outliers":
        x[::3, 7] *= 1e4
    weight, scale = quantised(normal(out, C) * C**-0.5)
    given = dict(x=x, weight=weight, scale=scale) | (dict(bias=normal(out)) if bias else {})
    return given | (dict(quick_gelu=quick_gelu) if quick_gelu is not None else {})


def floors(itemsize: int, rows: tuple[int, ...], C: int, out: int, **_: Any) -> dict[str, tuple[int, int]]:
    """(operations, bytes) that it cannot do without: one product, every operand once, of which the weight has 8 bits."""
    M = math.prod(rows)
    return {"forward": (2 * M * C * out, itemsize * (M * C + M * out) + C * out)}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [C_out, C_in] of numbers -> int8 [C_out / 32, C_in / 4, 32, 4], rounded up with zeros, and the scales [C_out].

    In that order the processor's product of four times four 8-bit numbers reads a matrix from its first byte to its last.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"quantised: expected a floating weight [C_out, C_in], got {weight.dtype} {tuple(weight.shape)}")
    out, C = weight.shape
    if C > 1 << 16:
        raise ValueError(f"quantised: expected at most 65,536 input channels, whose sum 32 bits hold, got {C}")
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / MOST if C else wide.new_zeros(out)
    rows = (wide / scale.clamp(min=LEAST)[:, None]).round().clamp(-MOST, MOST).to(torch.int8)
    n, k = PANEL
    rows = F.pad(rows, (0, -C % k, 0, -out % n))
    return rows.unflatten(0, (-1, n)).unflatten(2, (-1, k)).transpose(1, 2).contiguous(), scale


def integers(weight: Tensor, out: int, C: int) -> Tensor:
    """int8 [C_out, C_in] of what ``quantised`` gives."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:out, :C]


def rows_in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] -> integers [..., C] in fp32 and their scale [..., 1]: fp32 arithmetic whatever the dtype of x. A row with
    NaN or infinity has the scale NaN."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    finite = most < torch.inf
    factor = torch.where(finite & (most >= LEAST), MOST / most, 0)
    return torch.where(finite, x * factor, 0).round(), torch.where(finite, most / MOST, torch.nan)


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, quick_gelu: bool | None = None) -> Tensor:
    """What ``int8_linear`` means; the sums of integers are exact."""
    q, scale_of_row = rows_in_int8(x)
    sums = F.linear(q.double(), integers(weight, len(scale), x.shape[-1]).double())
    kind = torch.promote_types(x.dtype, torch.float32)
    y = sums.to(kind) * (scale_of_row.to(kind) * scale.to(kind))
    y = y if bias is None else y + bias.to(kind)
    if quick_gelu is not None:
        y = y * torch.sigmoid(1.702 * y) if quick_gelu else F.gelu(y)
    return y.to(x.dtype)


def eager(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, quick_gelu: bool | None = None) -> Tensor:
    """The same by torch's own product of 8-bit integers."""
    q, scale_of_row = rows_in_int8(x)
    columns = _columns(weight, len(scale), x.shape[-1])
    sums = torch._int_mm(q.to(torch.int8).flatten(0, -2), columns).unflatten(0, x.shape[:-1])
    y = sums * (scale_of_row * scale)
    y = y if bias is None else y + bias
    if quick_gelu is not None:
        y = y * torch.sigmoid(1.702 * y) if quick_gelu else F.gelu(y)
    return y.to(x.dtype)


@functools.lru_cache(maxsize=1)
def _columns(weight: Tensor, out: int, C: int) -> Tensor:
    """[C_in, C_out] as ``eager`` reads it, kept from call to call as a model would keep it."""
    return integers(weight, out, C).contiguous().T


def supports(*args: Any) -> None:
    return None


def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, quick_gelu: bool | None) -> Tensor:
    return reference(x, weight, scale, bias, quick_gelu).contiguous()
