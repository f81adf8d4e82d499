"""SigLIP's sigmoid loss over all pairs (Zhai et al. 2023, algorithm 1), block by block: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.contrastive import spec as contrastive
from clipfast.kernels.contrastive.spec import blocks, pairs, strips

# The contrastive loss's, with a bias of its starting value -10, or one that makes every logit count.
CASES: dict[str, dict[str, Any]] = {
    **contrastive.CASES,
    "bias -10": dict(N=67, D=64, scale=10.0, bias=-10.0),
    "pairs far above": dict(N=33, D=64, kind="identical", scale=100.0, bias=-10.0),
}
BENCH: dict[str, dict[str, Any]] = contrastive.BENCH
BENCH_GPU: dict[str, dict[str, Any]] = contrastive.BENCH_GPU


def inputs(generator: torch.Generator, bias: float = -3.0, **case: Any) -> dict[str, Any]:
    """Arguments of ``pairwise_sigmoid`` in fp64."""
    return contrastive.inputs(generator, **case) | dict(bias=bias)


def floors(itemsize: int, N: int, D: int, n=None, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) of the sweep that makes the loss and all gradients: three GEMMs."""
    n = N if n is None else n
    return {"forward": (3 * 2 * n * N * D, (n + N) * D * (itemsize + 4)), "backward": (0, (n + N) * D * (4 + itemsize))}


def reference(
    image_features: Tensor, text_features: Tensor, scale: Tensor | float, bias: Tensor | float, offset: int = 0
) -> Tensor:
    """What ``pairwise_sigmoid`` means: differentiable, with the whole matrix, in the dtype of its input."""
    n, N = len(image_features), len(text_features)
    s = scale * image_features @ text_features.T + bias
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    i, j = torch.arange(n, device=s.device)[:, None], torch.arange(N, device=s.device)
    return -F.logsigmoid(torch.where(j == i + offset, s, -s)).sum()


def supports(*args: Any) -> None:
    return None


def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, want_image: bool, want_text: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D, columns = image.shape[1], text.to(torch.promote_types(text.dtype, torch.float32))
    image_grad = columns.new_zeros(len(image) if want_image else 0, D)
    text_grad = columns.new_zeros(len(text) if want_text else 0, D)
    loss, bias_grad = columns.new_zeros(len(image)), columns.new_zeros(len(image))
    for rows, block, s in blocks(image, text, scale):
        own, at_pairs = pairs(s.add_(bias), rows.start, offset)
        at_pairs.neg_()
        for strip, total, of_bias in strips(s, loss[rows], bias_grad[rows]):
            # softplus(l) = max(l, 0) + log(1 + exp(-|l|)), which keeps the digits of small losses
            torch.sum(strip.abs().neg_().exp_().log1p_().add_(strip.clamp(min=0)), 1, out=total)
            torch.sum(strip.sigmoid_(), 1, out=of_bias)
        bias_grad[own] -= 2 * at_pairs
        at_pairs.neg_()
        if want_image:
            torch.mm(s, columns, out=image_grad[rows])
        if want_text:
            text_grad.addmm_(s.T, block)
    return loss, bias_grad, image_grad, text_grad
