"""Residual attention blocks, pre-norm, for inference: definition, cases, floors.

    s ← s + W_out · attention(W_qkv · ln_1(s))
    s ← s + W_proj · gelu(W_fc · ln_2(s))

Weights lie in strips of 32 output channels, in which a product of few rows reads them from the first byte to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.attention import spec as attention
from clipfast.kernels.int8_linear import spec as int8

STRIP = 32  # output channels that lie together
PARAMETERS = ("ln_1_weight", "ln_1_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias",
              "ln_2_weight", "ln_2_bias", "fc_weight", "fc_bias", "proj_weight", "proj_bias")  # fmt: skip
PRODUCTS = 4  # of a block, and as many scales of 8-bit weights
CASES: dict[str, dict[str, Any]] = {
    "texts": dict(lengths=(7, 0, 12, 1), C=64, heads=2, causal=True, packed=True, read="last"),
    "texts, all tokens": dict(lengths=(5, 13), C=64, causal=True, packed=True),
    "images": dict(lengths=(17, 17), C=32, heads=2, read="first", quick_gelu=False),
    "images, all tokens": dict(lengths=(9, 9, 9), C=48, quick_gelu=False),
    "C320": dict(lengths=(25,), C=320, heads=5, layers=1),
    "C512": dict(lengths=(12,), C=512, heads=8, layers=1, causal=True, packed=True, read="last"),
    "C768": dict(lengths=(50,), C=768, heads=12, layers=1, read="first"),
    "L1": dict(lengths=(1,), C=16),
    "blocks of rows": dict(lengths=(77,) * 3, C=32, layers=1),
    "three times as wide": dict(lengths=(11,), C=80, hidden=240),
    "narrower": dict(lengths=(3, 4), C=64, hidden=37, packed=True),
    "no blocks": dict(lengths=(3,), C=32, layers=0),
    "no sequences": dict(lengths=(), C=32, packed=True, read="last"),
    "transposed": dict(lengths=(6, 6), C=32, layout="transposed"),
}
BENCH: dict[str, dict[str, Any]] = {
    "text of 12": dict(lengths=(12,), C=512, heads=8, layers=12, causal=True, packed=True, read="last"),
    "B/32, one image": dict(lengths=(50,), C=768, heads=12, layers=12, read="first"),
}


def inputs(
    generator: torch.Generator, lengths: tuple[int, ...], C: int, heads: int = 1, layers: int = 2, hidden: int | None = None,
    causal: bool = False, packed: bool = False, read: str | None = None, quick_gelu: bool = True, layout: str = "plain",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``encoder`` in fp64; ``read``: of each sequence that has a token its first or last."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    def weights(out: int, of: int) -> Tensor:
        return torch.stack([strips(normal(out, of) * of**-0.5) for _ in range(layers)]) if layers else normal(0, 1, of, STRIP)

    ends = torch.tensor((0, *lengths), device=generator.device).cumsum(0, dtype=torch.int32)
    x, hidden = normal(int(ends[-1]), C), hidden or 4 * C
    x = x.T.contiguous().T if layout == "transposed" else x
    rows = {"first": ends[:-1], "last": ends[1:] - 1, None: None}[read]
    return dict(
        x=x if packed else x.unflatten(0, (len(lengths), -1)), heads=heads, causal=causal, quick_gelu=quick_gelu,
        ln_1_weight=normal(layers, C), ln_1_bias=normal(layers, C),
        qkv_weight=weights(3 * C, C), qkv_bias=normal(layers, 3 * C), out_weight=weights(C, C), out_bias=normal(layers, C),
        ln_2_weight=normal(layers, C), ln_2_bias=normal(layers, C),
        fc_weight=weights(hidden, C), fc_bias=normal(layers, hidden),
        proj_weight=weights(C, hidden), proj_bias=normal(layers, C),
        cu_seqlens=ends if packed else None, read=rows if rows is None else rows[ends.diff() > 0],
    )  # fmt: skip


def floors(
    itemsize: int, lengths: tuple[int, ...], C: int, heads: int = 1, layers: int = 2, hidden: int | None = None,
    causal: bool = False, **_: Any,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """(FLOPs, bytes) that it cannot do without: products of every row but the last block's, of which one in a sequence goes
    beyond the keys; every weight once, and the states as they come and go."""
    T, hidden = sum(lengths), hidden or 4 * C
    attended = attention.floors(itemsize, lengths, heads, C // heads, causal)["forward"][0]
    per_row = 2 * (4 * C * C + 2 * C * hidden)
    saved = (T - len(lengths)) * 2 * (2 * C * C + 2 * C * hidden)
    weights = layers * (4 * C * C + 2 * C * hidden)
    return {"forward": (layers * (T * per_row + attended) - saved, itemsize * (weights + 2 * T * C))}


def strips(weight: Tensor) -> Tensor:
    """weight [C_out, C_in] -> [C_out / 32, C_in, 32], rounded up with zeros."""
    return F.pad(weight, (0, 0, 0, -len(weight) % STRIP)).unflatten(0, (-1, STRIP)).transpose(1, 2).contiguous()


def rows_of(weight: Tensor, out: int) -> Tensor:
    """[C_out, C_in] of what ``strips`` gives."""
    return weight.transpose(1, 2).flatten(0, 1)[:out]


def reference(
    x: Tensor, heads: int, causal: bool, quick_gelu: bool, *parameters: Tensor, cu_seqlens: Tensor | None = None,
    read: Tensor | None = None, eps: float = 1e-5, **named: Tensor,
) -> Tensor:  # fmt: skip
    """What ``encoder`` means."""
    stacked = parameters or tuple(named[name] for name in PARAMETERS)
    flat = [p for block in zip(*stacked, strict=True) for p in block]
    return forward(x, flat, [], cu_seqlens, read, heads, causal, quick_gelu, eps)


def supports(*args: Any) -> None:
    return None


def forward(
    x: Tensor, parameters: Sequence[Tensor], scales: Sequence[Tensor], cu_seqlens: Tensor | None, read: Tensor | None,
    heads: int, causal: bool, quick_gelu: bool, eps: float,
) -> Tensor:  # fmt: skip
    s, C = x.contiguous(), x.shape[-1]
    count = len(parameters) // len(PARAMETERS)
    for i in range(count):
        own = parameters[len(PARAMETERS) * i : len(PARAMETERS) * (i + 1)]
        ln_1, ln_1_bias, qkv, qkv_bias, out, out_bias, ln_2, ln_2_bias, fc, fc_bias, proj, proj_bias = own
        by = scales[PRODUCTS * i : PRODUCTS * i + PRODUCTS] or (None,) * PRODUCTS
        joined = _linear(F.layer_norm(s, (C,), ln_1, ln_1_bias, eps), qkv, qkv_bias, by[0])
        y = attention.reference(joined, heads, causal, cu_seqlens)
        if read is not None and i == count - 1:
            s, y = s.flatten(0, -2)[read.long()], y.flatten(0, -2)[read.long()]
        s = s + _linear(y, out, out_bias, by[1])
        h = _linear(F.layer_norm(s, (C,), ln_2, ln_2_bias, eps), fc, fc_bias, by[2])
        s = s + _linear(h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h), proj, proj_bias, by[3])
    return s.flatten(0, -2)[read.long()] if read is not None and not count else s


def _linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return int8.reference(x, weight, scale, bias)
    return F.linear(x, rows_of(weight, len(bias)), bias)
