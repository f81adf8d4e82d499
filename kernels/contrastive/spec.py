"""CLIP's softmax loss in both directions (Radford et al. 2021, figure 3), block by block: definition, cases, floors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    **{f"D{D}": dict(N=7, D=D) for D in (64, 320, 512, 640, 768, 1024, 1152)},
    "one pair": dict(N=1, D=64),
    "prime": dict(N=131, D=37),
    "rows of a rank": dict(n=17, N=61, D=64, offset=23),
    "pairs of the last rows": dict(n=17, N=61, D=64, offset=-5),
    "pairs of the first rows": dict(n=29, N=23, D=64, offset=7),
    "no pairs": dict(n=9, N=13, D=64, offset=13),
    "transposed": dict(N=37, D=64, transposed=True),
    "scale 100": dict(N=67, D=64, scale=100.0),
    "scale 1": dict(N=67, D=64, scale=1.0),
    "identical": dict(N=33, D=64, kind="identical", scale=100.0),
    "orthogonal": dict(N=33, D=64, kind="orthogonal", scale=3.0),
    "opposite": dict(N=33, D=64, kind="opposite", scale=100.0),
    "norm 1000": dict(N=35, D=64, norm=1e3, scale=2e-5),
}
BENCH: dict[str, dict[str, Any]] = {"1k": dict(N=1024, D=512), "4k": dict(N=4096, D=512)}
BENCH_GPU: dict[str, dict[str, Any]] = {"16k": dict(N=16384, D=768), "32k": dict(N=32768, D=768)}
BLOCK = 1024  # rows: 512 cost the four GEMMs 1.5 %, 256 cost 8 % (2 cores, N = 8,192)
STRIP = 1 << 19  # elements of a pass, 1 MB for each of two cores: from their caches, passes take 25 % less than over a block


def inputs(
    generator: torch.Generator, N: int, D: int, n=None, offset=0, kind="random", norm=1.0, scale=14.3, transposed=False
) -> dict[str, Any]:
    """Arguments of ``contrastive`` in fp64: rows of length ``norm``. The scale's gradient, one number in which everything may
    cancel, has its own test against the size of its terms (tests/test_loss.py)."""

    def rows(count: int) -> Tensor:
        shape = (D, count) if transposed else (count, D)
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return norm * F.normalize(x.T if transposed else x, dim=1)

    text = rows(N)
    if kind == "random":
        image = rows(N if n is None else n)
    elif kind == "identical":
        text = (text[:1].sign() * D**-0.5).repeat(N, 1)  # D = 64: all products are exact, so that no rounding tells rows apart
        image = text.clone()
    elif kind == "orthogonal":
        image = torch.eye(N, D, dtype=torch.float64, device=generator.device)
        text = image.clone()
    else:
        image = -text
    return dict(image_features=image, text_features=text, scale=scale, offset=offset)


def floors(itemsize: int, N: int, D: int, n=None, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: one GEMM and, with the logits made again, three."""
    n = N if n is None else n
    gemm, features = 2 * n * N * D, (n + N) * D
    return {"forward": (gemm, features * itemsize), "backward": (3 * gemm, 2 * features * itemsize)}


def reference(image_features: Tensor, text_features: Tensor, scale: Tensor | float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """What ``contrastive`` means: differentiable, with the whole matrix, in the dtype of its input."""
    n, N = len(image_features), len(text_features)
    s = scale * image_features @ text_features.T
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    i, j = torch.arange(n, device=s.device)[:, None], torch.arange(N, device=s.device)
    pair = torch.where(j == i + offset, s, 0)
    return s.logsumexp(1) - pair.sum(1), s.logsumexp(0) - pair.sum(0)


def supports(*args: Any) -> None:
    return None


def blocks(image: Tensor, text: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, image [b, D] in at least fp32 and s [b, N] of each block; every s lies in the same memory."""
    wide = torch.promote_types(image.dtype, torch.float32)
    columns, factor = text.to(wide).T, scale.to(wide)
    memory = image.new_empty(min(BLOCK, len(image)), len(text), dtype=wide)
    for start in range(0, len(image), BLOCK):
        rows = slice(start, min(start + BLOCK, len(image)))
        block = image[rows].to(wide)
        yield rows, block, torch.mm(block * factor, columns, out=memory[: len(block)])


def strips(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Groups of rows of all ``tensors``, such that those of the first, [b, N], stay in cache; on a GPU all rows at once."""
    b, N = tensors[0].shape
    step = max(1, STRIP // max(1, N)) if tensors[0].device.type == "cpu" else b
    return zip(*(x.split(step) for x in tensors), strict=True)


def pairs(s: Tensor, start: int, offset: int) -> tuple[slice, Tensor]:
    """The rows of the batch that have their pair in s [b, N], the block from row ``start`` on, and s at those pairs, a view."""
    b, N = s.shape
    diagonal = s.diagonal(min(max(offset + start, -b), N))
    first = start + max(0, -(offset + start))
    return slice(first, first + len(diagonal)), diagonal


def forward(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(image.dtype, torch.float32)
    row_max, row_sum, diagonal = (image.new_zeros(len(image), dtype=wide) for _ in range(3))
    col_max, col_sum = text.new_full((len(text),), -torch.inf, dtype=wide), text.new_zeros(len(text), dtype=wide)
    if len(text) == 0:
        return row_max - torch.inf, row_sum, col_max, col_sum, diagonal
    for rows, block, s in blocks(image, text, scale):
        own, at_pairs = pairs(s, rows.start, offset)
        diagonal[own] = at_pairs
        if image.device.type != "cpu":  # two exponentials: to know whether one may serve, a GPU would have to be asked
            block_max = s.amax(0)
            block_sum = (s - block_max).exp_().sum(0)
        for strip, largest, total in strips(s, row_max[rows], row_sum[rows]):
            torch.amax(strip, 1, out=largest)
            torch.sum(strip.sub_(largest[:, None]).exp_(), 1, out=total)
        if image.device.type == "cpu":
            block_max, block_sum = _columns(s, row_max[rows], block, text, scale)
        top = torch.maximum(col_max, block_max)
        col_sum.mul_((col_max - top).exp_()).add_(block_sum.mul_((block_max - top).exp_()))
        col_max = top
    return row_max, row_sum, col_max, col_sum, diagonal


def _columns(e: Tensor, row_max: Tensor, block: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, sum) [N] of the columns from e_ij = exp(s_ij - row_max_i) [b, N].

    One exponential serves rows and columns: Σ_i exp(s_ij - t) = Σ_i exp(row_max_i - t)·e_ij with t the largest of all.
    A column whose entries all lie far below t would underflow: where a sum comes out so small, its column is done again by
    its own maximum.
    """
    top = row_max.amax()
    col_sum = (row_max - top).exp_() @ e
    col_max = top.expand(len(col_sum))
    # Fp32: 5e-26. The largest term is at least 1/1,024 of it, and what matters beside that, 1e-8 of it, is still normal.
    low = (col_sum < torch.finfo(e.dtype).tiny ** (2 / 3)).nonzero()[:, 0]
    if len(low):
        again = block * scale.to(e.dtype) @ text[low].to(e.dtype).T
        col_max = col_max.index_copy(0, low, again.amax(0))
        col_sum[low] = again.sub_(col_max[low]).exp_().sum(0)
    return col_max, col_sum


def backward(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, row_lse: Tensor, col_lse: Tensor, row_grad: Tensor,
    col_grad: Tensor, diagonal_grad: Tensor, want_image: bool, want_text: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    D, columns = image.shape[1], text.to(row_lse.dtype)
    image_grad = columns.new_zeros(len(image) if want_image else 0, D)
    text_grad = columns.new_zeros(len(text) if want_text else 0, D)
    for rows, block, s in blocks(image, text, scale):
        _to_gradient(s, row_lse[rows], col_lse, row_grad[rows], col_grad)
        own, at_pairs = pairs(s, rows.start, offset)
        at_pairs.copy_(diagonal_grad[own])
        if want_image:
            torch.mm(s, columns, out=image_grad[rows])
        if want_text:
            text_grad.addmm_(s.T, block)
    return image_grad, text_grad


def _to_gradient(s: Tensor, row_lse: Tensor, col_lse: Tensor, row_grad: Tensor, col_grad: Tensor) -> None:
    """Turn s [b, N] into row_grad_i·exp(s_ij - row_lse_i) + col_grad_j·exp(s_ij - col_lse_j).

    One exponential serves both where row_lse_i - col_lse_j stays below 60: what exp(s_ij - row_lse_i) loses below 1e-38 is
    then less than 1e-12 of a column. exp(row_lse_i - col_lse_j) is a product of two vectors, so the factor has rank two.
    """
    if s.numel() == 0:
        return
    top = row_lse.amax()
    if s.device.type != "cpu" or not bool(top - col_lse.amin() < 60):  # as well where one is NaN; a GPU is not asked
        for strip, lse, grad in strips(s, row_lse[:, None], row_grad[:, None]):
            of_columns = (strip - col_lse).exp_().mul_(col_grad)
            strip.sub_(lse).exp_().mul_(grad).add_(of_columns)
        return
    by_row = torch.stack([row_grad, (row_lse - top).exp_()], 1)
    by_column = torch.stack([torch.ones_like(col_grad), col_grad * (top - col_lse).exp_()])
    for strip, lse, factors in strips(s, row_lse[:, None], by_row):
        strip.sub_(lse).exp_().mul_(factors @ by_column)
