"""Features and a scale to CLIP's contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.kernels.contrastive import contrastive


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    normalize: bool = False,
    labels: Tensor | None = None,
) -> Tensor:
    """CLIP's symmetric cross-entropy over all pairs of a batch, in O(N·D) memory.

    Args:
        image_features, text_features: [N, D] fp32, bf16, fp16 or fp64; row i of one is the pair of row i of the other.
        logit_scale: scalar, the factor itself (``model.logit_scale.exp()``).
        normalize: divide every row by its length first; otherwise the features come normalised.
        labels: [N] integers; rows with equal labels are positives of each other and share the target mass equally, as
            duplicate captions should. With distinct labels the loss is that without them, bit for bit.

    Returns:
        The loss [], fp32 (fp64 for fp64), differentiable in both features and the scale.

    Raises:
        TypeError, ValueError: an argument does not fit; says what was expected.
    """
    if image_features.shape[:1] != text_features.shape[:1] or image_features.shape[:1] == (0,):
        raise ValueError(
            f"clip_loss: expected as many texts as images, at least one, got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}"
        )
    if labels is not None:
        _check_labels(image_features, labels)
    if normalize:
        image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) and logit_scale.numel() == 1 else logit_scale
    row_nll, col_nll = contrastive(image_features, text_features, scale)
    loss = (row_nll.mean() + col_nll.mean()) / 2
    if labels is None:
        return loss
    return loss - scale * _gain(image_features, text_features, labels)


def _check_labels(image_features: Tensor, labels: Tensor) -> None:
    if labels.shape != image_features.shape[:1]:
        raise ValueError(f"clip_loss: expected one label per row, ({len(image_features)},), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"clip_loss: expected integer labels, got {labels.dtype}; convert with .long()")
    if labels.device != image_features.device:
        raise ValueError(f"clip_loss: expected labels on {image_features.device}, got {labels.device}; move them with .to")


def _gain(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Mean over i of ⟨image_i, mean of text_j over the positives j of i⟩ - ⟨image_i, text_i⟩, exactly 0 for distinct labels.

    The target mass 1/count of each positive is symmetric in i and j, so this one term moves both directions from the plain
    loss to the one with shared targets.
    """
    text = text.to(torch.promote_types(text.dtype, torch.float32))
    ordered, order = labels.sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    numbers = starts.cumsum(0) - 1
    group = torch.empty_like(order).scatter_(0, order, numbers)
    # A bag for each group, then empty ones up to N: no shape depends on the labels' values, so this compiles whole.
    offsets = torch.searchsorted(numbers, torch.arange(len(labels), device=labels.device))
    return (image * (_GroupMean.apply(text, group, order, offsets) - text)).sum() / len(labels)


class _GroupMean(torch.autograd.Function):
    """x [N, D] -> the mean of x over the group of each row: a symmetric matrix, so its own gradient, and deterministic."""

    @staticmethod
    def forward(ctx, x, group, order, offsets):
        ctx.save_for_backward(group, order, offsets)
        return F.embedding_bag(order, x, offsets, mode="mean")[group]

    @staticmethod
    def backward(ctx, dy):
        group, order, offsets = ctx.saved_tensors
        return F.embedding_bag(order, dy.contiguous(), offsets, mode="mean")[group], None, None, None


class ClipLoss(nn.Module):
    """``clip_loss`` with the constructor and the call of open_clip 3.3's ``ClipLoss``.

    ``local_loss``, ``gather_with_grad`` and ``cache_labels`` choose variants of the same loss; they are accepted and change
    nothing. It runs in one process.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if world_size != 1 or rank != 0 or use_horovod:
            raise ValueError(
                f"ClipLoss: expected one process (rank 0, world_size 1, no Horovod), got rank {rank}, world_size {world_size}, "
                f"use_horovod {use_horovod}; its batch may be of any size, as the loss needs memory for the features only"
            )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss [], or {"contrastive_loss": loss}. A bias common to all logits cancels in the softmax and is left out."""
        loss = clip_loss(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
