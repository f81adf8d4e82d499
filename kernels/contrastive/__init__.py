"""Both log-sum-exps of CLIP's similarity matrix and their gradients, the matrix never formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.kernels import dispatch

_FORWARD = (
    "(Tensor image, Tensor text, Tensor scale, int offset) -> "
    "(Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor diagonal)"
)
_BACKWARD = (
    "(Tensor image, Tensor text, Tensor scale, int offset, Tensor row_lse, Tensor col_lse, Tensor row_nll, Tensor col_nll, "
    "Tensor row_grad, Tensor col_grad, bool want_image, bool want_text) -> (Tensor image_grad, Tensor text_grad)"
)


def contrastive(image_features: Tensor, text_features: Tensor, scale: Tensor | float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of the pairs, image to text and text to image, in O((n + N)·D) memory.

    With s_ij = scale·⟨image_i, text_j⟩ in fp32 (fp64 for fp64), whatever the dtype of the features:

    Args:
        image_features: [n, D] fp32, bf16, fp16 or fp64, any strides; the rows offset .. offset + n of a batch of N.
        text_features: [N, D], the same dtype.
        scale: [] of any floating dtype, or a number: the factor itself, not its logarithm.
        offset: the column that is the pair of row 0.

    Returns:
        row_nll [n]: log Σ_j exp(s_ij) - s_i,offset+i. col_nll [N]: log Σ_i exp(s_ij) over these n rows, less the pair's own
        similarity where its row is among them. Both in fp32 (fp64).

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit.
    """
    if isinstance(scale, (int, float)):
        scale = torch.full((), scale, dtype=_wide(image_features), device=image_features.device)
    _check(image_features, text_features, scale, offset)
    return _Contrastive.apply(image_features, text_features, scale, offset)


def _check(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> None:
    shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
    if image.ndim != 2 or text.ndim != 2:
        raise ValueError(f"contrastive: expected features [n, D] and [N, D], got {shapes}; flatten them to one row per sample")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"contrastive: expected one width D, got {shapes}; project both towers to the same width")
    if not 0 <= offset <= text.shape[0] - image.shape[0]:
        raise ValueError(
            f"contrastive: expected the pairs of all rows among the columns, 0 <= offset <= N - n, got offset {offset} "
            f"with shapes {shapes}; pass as many texts as images"
        )
    if not image.is_floating_point() or not text.is_floating_point():
        raise TypeError(f"contrastive: expected floating features, got {image.dtype} and {text.dtype}; convert with .float()")
    if image.dtype != text.dtype:
        raise TypeError(f"contrastive: expected one dtype, got {image.dtype} and {text.dtype}; convert one with .to(dtype)")
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        got = getattr(scale, "dtype", type(scale).__name__)
        raise TypeError(f"contrastive: expected a number or a floating tensor as scale, got {got}; pass scale.float()")
    if scale.ndim != 0:
        raise ValueError(f"contrastive: expected a scalar scale of shape (), got {tuple(scale.shape)}; pass one factor")
    if not image.device == text.device == scale.device:
        raise ValueError(
            f"contrastive: expected one device, got {image.device}, {text.device} and scale on {scale.device}; use .to(device)"
        )


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, offset):
        row_max, row_sum, col_max, col_sum, diagonal = torch.ops.clipfast.contrastive(image, text, scale, offset)
        row_log, col_log = row_sum.log(), col_sum.log()
        own = slice(offset, offset + image.shape[0])
        # Near 100 an fp32 log-sum-exp is rounded to 4e-6: the maximum less the diagonal first keeps a small loss exact.
        row_nll, col_nll = (row_max - diagonal) + row_log, col_max + col_log
        col_nll[own] = (col_max[own] - diagonal) + col_log[own]
        ctx.offset = offset
        ctx.save_for_backward(image, text, scale, row_max + row_log, col_max + col_log, row_nll, col_nll)
        return row_nll, col_nll

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad, col_grad):
        image, text, scale, *statistics = ctx.saved_tensors
        needs_image, needs_text, needs_scale, _ = ctx.needs_input_grad
        want_image = needs_image or (needs_scale and not needs_text)
        image_grad, text_grad = torch.ops.clipfast.contrastive_backward(
            image, text, scale, ctx.offset, *statistics, row_grad, col_grad, want_image, needs_text
        )
        # dscale = Σ G_ij·⟨image_i, text_j⟩, which is ⟨image, G·text⟩ as well as ⟨text, Gᵀ·image⟩.
        features, gradient = (image, image_grad) if want_image else (text, text_grad)
        dscale = (features * gradient).sum().to(scale.dtype) if needs_scale else None
        return (
            image_grad.mul_(scale).to(image.dtype) if needs_image else None,
            text_grad.mul_(scale).to(text.dtype) if needs_text else None,
            dscale,
            None,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(image, text, scale, offset):
    rows, columns = (x.new_empty(x.shape[0], dtype=_wide(x)) for x in (image, text))
    return rows, torch.empty_like(rows), columns, torch.empty_like(columns), torch.empty_like(rows)


def _fake_backward(image, text, scale, offset, row_lse, col_lse, row_nll, col_nll, row_grad, col_grad, want_image, want_text):
    D = image.shape[1]
    return (
        image.new_empty((image.shape[0] if want_image else 0, D), dtype=_wide(image)),
        text.new_empty((text.shape[0] if want_text else 0, D), dtype=_wide(text)),
    )


OP = dispatch.Op(__name__, (_FORWARD, _fake), (_BACKWARD, _fake_backward), compiled={})
