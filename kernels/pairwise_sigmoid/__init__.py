"""SigLIP's sigmoid loss over all pairs of a block and its gradients in one sweep, the matrix never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.contrastive import (
    check_features,
    check_scalar,
    fake_gradients,
    inner,
    scaled,
    supports_cpu,
    supports_cuda,
    wide,
)
from clipfast.kernels.op import Op, first_derivative, transformable

_FORWARD = (
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, int offset, bool want_image, bool want_text) -> "
    "(Tensor loss, Tensor bias_grad, Tensor image_grad, Tensor text_grad)"
)


@transformable
def pairwise_sigmoid(
    image_features: Tensor, text_features: Tensor, scale: Tensor | float, bias: Tensor | float, offset: int = 0
) -> Tensor:
    """Σ_ij -log σ(z_ij·(scale·⟨image_i, text_j⟩ + bias)) with z = 1 at pairs and -1 elsewhere, in O((n + N)·D) memory.

    The loss of Zhai et al. 2023 (SigLIP), not yet divided by the number of images. It is a sum, so its gradients are made in
    the sweep that adds it up, when some are asked for: three matrix products in all.

    Args:
        image_features: [n, D] fp32, bf16, fp16 or fp64, any strides.
        text_features: [N, D], the same dtype.
        scale, bias: [] of any floating dtype, or numbers.
        offset: the column that is the pair of row 0, so that of row i is i + offset; a row whose pair lies outside 0 .. N - 1
            has none among these columns.

    Returns:
        The sum [], fp32 (fp64 for fp64), differentiable in features, scale and bias.

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit.
    """
    check_features("pairwise_sigmoid", image_features, text_features)
    scale = check_scalar("pairwise_sigmoid", "scale", scale, image_features)
    bias = check_scalar("pairwise_sigmoid", "bias", bias, image_features)
    image, text, scaled = (torch.is_grad_enabled() and x.requires_grad for x in (image_features, text_features, scale))
    return _PairwiseSigmoid.apply(image_features, text_features, scale, bias, offset, image or (scaled and not text), text)


class _PairwiseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, offset, want_image, want_text):
        loss, bias_grad, *grads = OP(image, text, scale, bias, offset, want_image, want_text)
        ctx.save_for_backward(image, text, scale, bias, bias_grad, *grads)
        ctx.want_image = want_image
        return loss.sum()

    @staticmethod
    @first_derivative
    def backward(ctx, dy):
        image, text, scale, bias, bias_grad, image_grad, text_grad = ctx.saved_tensors
        needs_image, needs_text, needs_scale, needs_bias, *_ = ctx.needs_input_grad
        # dscale = Σ g_ij·⟨image_i, text_j⟩, which is ⟨image, g·text⟩ as well as ⟨text, gᵀ·image⟩.
        features, gradient = (image, image_grad) if ctx.want_image else (text, text_grad)
        return (
            scaled(image_grad, scale * dy, image.dtype, spend=False) if needs_image else None,
            scaled(text_grad, scale * dy, text.dtype, spend=False) if needs_text else None,
            (inner(features, gradient) * dy).to(scale.dtype) if needs_scale else None,
            (bias_grad.sum() * dy).to(bias.dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _fake(image, text, scale, bias, offset, want_image, want_text):
    loss = image.new_empty(image.shape[0], dtype=wide(image))
    return loss, torch.empty_like(loss), *fake_gradients(image, text, want_image, want_text)


OP = Op(__name__, (_FORWARD, _fake), compiled={"cpu": supports_cpu, "cuda": supports_cuda})
