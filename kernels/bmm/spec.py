"""A batch of products of matrices: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "heads of 64": dict(shape=(3, 17, 64, 192)),
    "C512": dict(shape=(8, 5, 64, 512)),
    "deep": dict(shape=(2, 9, 1000, 33)),
    "long": dict(shape=(2, 150, 48, 48)),
    "prime": dict(shape=(3, 7, 13, 101)),
    "one product": dict(shape=(1, 64, 64, 64)),
    "one row": dict(shape=(4, 1, 64, 32)),
    "one column": dict(shape=(4, 31, 5, 1)),
    "heads beside one another": dict(shape=(3, 50, 64, 96), a="beside"),
    "turned weight": dict(shape=(3, 10, 192, 64), a="beside", b="turned"),
    "both turned": dict(shape=(2, 37, 29, 53), a="turned", b="turned"),
    "apart": dict(shape=(2, 9, 16, 24), a="apart", b="apart"),
    "no rows": dict(shape=(2, 0, 16, 24)),
}
BENCH: dict[str, dict[str, Any]] = {
    "demo's queries": dict(shape=(8, 128, 64, 512), a="beside"),
    "demo's values": dict(shape=(8, 128, 512, 64), a="beside", b="turned"),
    "B/32 queries, 64 images": dict(shape=(12, 64, 64, 768), a="beside"),
}


def inputs(generator: torch.Generator, shape: tuple[int, ...], a="plain", b="plain") -> dict[str, Any]:
    """Arguments of ``bmm`` in fp64; ``shape``: n, M, K, N."""
    n, M, K, N = shape

    def normal(rows: int, columns: int, layout: str) -> Tensor:
        def drawn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)

        if layout == "beside":  # as the heads of packed channels
            return drawn(rows, n, columns).transpose(0, 1)
        if layout == "turned":
            return drawn(n, columns, rows).transpose(1, 2)
        return drawn(n, 2 * rows, 2 * columns)[:, ::2, ::2] if layout == "apart" else drawn(n, rows, columns)

    return dict(a=normal(M, K, a) * K**-0.5, b=normal(K, N, b))


def floors(itemsize: int, shape: tuple[int, ...], **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: one GEMM and two, every operand once."""
    n, M, K, N = shape
    gemm, a, b, c = 2 * n * M * K * N, n * M * K, n * K * N, n * M * N
    return {"forward": (gemm, itemsize * (a + b + c)), "backward": (2 * gemm, itemsize * (2 * a + 2 * b + c))}


def reference(a: Tensor, b: Tensor) -> Tensor:
    """What ``bmm`` means: differentiable, in the dtype of its input."""
    return torch.bmm(a, b)


def supports(*args: Any) -> None:
    return None


def forward(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b)


def turned(x: Tensor) -> bool:
    """Whether neighbours in memory stand in columns, not in rows; the gradient of such a matrix lies as it does."""
    return x.stride(2) != 1 and x.stride(1) == 1


def backward(dy: Tensor, a: Tensor, b: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a and b; empty where not asked for."""

    def gradient(left: Tensor, right: Tensor, of: Tensor) -> Tensor:
        return torch.bmm(right.mT, left.mT).mT if turned(of) else torch.bmm(left, right)

    none = dy.new_empty(0)
    return gradient(dy, b.mT, a) if need_a else none, gradient(a.mT, dy, b) if need_b else none
