"""Layer norm (Ba et al. 2016) of x or of x + residual: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    **{f"C{C}": dict(shape=(5, C)) for C in (64, 320, 512, 640, 768, 1024, 1152)},
    "one row": dict(shape=(1, 192)),
    "two channels": dict(shape=(3, 2)),
    "prime": dict(shape=(7, 13, 101)),
    "no rows": dict(shape=(0, 64)),
    "residual": dict(shape=(3, 17, 768), residual=True),
    "residual, prime": dict(shape=(31, 101), residual=True),
    "transposed": dict(shape=(6, 50, 64), transposed=True),
    "residual, transposed": dict(shape=(6, 50, 64), residual=True, transposed=True),
    "far from zero": dict(shape=(9, 512), offset=100.0),
}
BENCH: dict[str, dict[str, Any]] = {
    "text block": dict(shape=(1024, 512), residual=True),
    "B/32 block": dict(shape=(32, 50, 768), residual=True),
    "B/32 plain": dict(shape=(32, 50, 768)),
    "L/14 block": dict(shape=(8, 257, 1024), residual=True),
}
BENCH_GPU: dict[str, dict[str, Any]] = {  # what fills a GPU
    "B/16 block x 256": dict(shape=(256, 197, 768), residual=True),
    "L/14 block x 256": dict(shape=(256, 257, 1024), residual=True),
    "L/14 plain x 256": dict(shape=(256, 257, 1024)),
}


def inputs(generator: torch.Generator, shape: tuple[int, ...], residual=False, transposed=False, offset=0.0) -> dict[str, Any]:
    """Arguments of ``layer_norm`` in fp64."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

    def rows() -> Tensor:
        if not transposed:
            return normal(*shape) + offset
        return normal(*shape[-2::-1], shape[-1]).movedim(0, len(shape) - 2)

    arguments = dict(x=rows(), weight=1 + 0.2 * normal(shape[-1]), bias=0.2 * normal(shape[-1]))
    return arguments | dict(residual=rows()) if residual else arguments


def floors(itemsize: int, shape: tuple[int, ...], residual=False, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without."""
    elements = torch.Size(shape).numel()
    passes = 2 + 2 * residual  # x in, y out, and residual in, s out
    back = 3 + residual  # dy and s in, dx out, and ds in
    return {"forward": (8 * elements, passes * elements * itemsize), "backward": (14 * elements, back * elements * itemsize)}


def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
    """What ``layer_norm`` means: differentiable, in the dtype of its input."""
    s = x if residual is None else x + residual
    y = F.layer_norm(s, s.shape[-1:], weight.to(s.dtype), bias.to(s.dtype), eps)
    return y if residual is None else (y, s)


def supports(*args: Any) -> None:
    return None


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float):
    s = (x if residual is None else x + residual).contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)  # wide gains make torch keep the statistics wide too
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y, x.new_empty(0) if residual is None else s, mean.squeeze(-1), rstd.squeeze(-1)


def backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    gain = weight.to(mean.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), s.contiguous(), s.shape[-1:], mean[..., None], rstd[..., None], gain, gain, [True, True, True]
    )
    return dx if ds is None else dx + ds, dweight.to(weight.dtype), dbias.to(weight.dtype)
