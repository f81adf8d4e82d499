"""Features and a scale to a contrastive loss, CLIP's or SigLIP's, on one rank or many."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.contrastive import OP as CONTRASTIVE
from clipfast.kernels.contrastive import check_features, check_scalar, inner, scaled, wide
from clipfast.kernels.op import first_derivative
from clipfast.kernels.pairwise_sigmoid import OP as PAIRWISE_SIGMOID
from clipfast.loss.ranks import ALONE, Ranks, Returned

FEATURES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # others cannot be sorted


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = False,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's symmetric cross-entropy over all pairs of a batch (figure 3 of the paper), in O(N·D) memory.

    Args:
        image_features, text_features: [n, D] fp32, bf16, fp16 or fp64; row i of one is the pair of row i of the other.
        logit_scale: scalar, the factor itself (``model.logit_scale.exp()``).
        normalize: divide every row by its length first; otherwise the features come normalised.
        labels: [n] integers; rows with equal labels are positives of each other and share the target mass equally, as
            duplicate captions should. With distinct labels the loss is that without them, bit for bit.
        group: the processes whose rows make up the batch of N, n of them here (n may differ from rank to rank); None: this
            process alone. Each block of similarities is computed once in the whole job. With several ranks torch.compile
            breaks its graph here.

    Returns:
        The loss [] of the whole batch on every rank, fp32 (fp64 for fp64), differentiable in both features and the scale. With
        a group every rank's gradients are such that their mean over the ranks, which DDP and FSDP take, is that of one process
        with the whole batch.

    Raises:
        TypeError, ValueError: an argument does not fit, here or on another rank; says what was expected.
    """
    given = dict(image_features=image_features, text_features=text_features, labels=labels)
    image, text, scale, ranks = _prepared("clip_loss", given, normalize, group, logit_scale=logit_scale)
    return _Clip.apply(image, text, scale, labels, ranks)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss, the sum over all pairs divided by the number of images (Zhai et al. 2023), in O(N·D) memory.

    The arguments are ``clip_loss``'s, and ``logit_bias``, the scalar that is added to every logit. Equal labels make a pair
    positive. The gradients are made in the forward pass, where they are asked for, which with a group also sends them.
    """
    given = dict(image_features=image_features, text_features=text_features, labels=labels)
    image, text, *scalars, ranks = _prepared(
        "siglip_loss", given, normalize, group, logit_scale=logit_scale, logit_bias=logit_bias
    )
    of_image, of_text, of_scale = map(_wanted, (image, text, scalars[0]))
    return _SigLip.apply(image, text, *scalars, labels, ranks, of_image or (of_scale and not of_text), of_text)


def _prepared(op: str, given: dict[str, Any], normalize: bool, group: dist.ProcessGroup | None, **scalars: Any) -> Any:
    """Image and text features, the scalars as tensors, the ranks; raises on all ranks where the arguments of one do not fit."""
    image, text, labels = given.values()
    said: str | Exception
    try:
        _check(op, image, text, labels)
        # open_clip's scalars may come as [1].
        scalars = {k: v.reshape(()) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in scalars.items()}
        scalars = {k: check_scalar(op, k, v, image) for k, v in scalars.items()}
        said = f"{op} of [n, {image.shape[1]}] {image.dtype} on {image.device.type}, labels "
        said += f"{labels is not None and labels.dtype}, gradients of images {_wanted(image)}, of texts {_wanted(text)}, "
        said += f"normalize {normalize}"
    except (TypeError, ValueError) as error:
        said = error
    if group is not None and not isinstance(group, dist.ProcessGroup):  # what new_group gives to a rank that is not in it
        raise ValueError(f"{op}: expected a group that this rank belongs to, got {group!r}; call it on the group's ranks only")
    if group is not None and group.size() > 1:
        ranks = Ranks.meet(group, said, image)
    elif isinstance(said, Exception):
        raise said
    else:
        ranks = ALONE
    if ranks.total(image) == 0:
        raise ValueError(f"{op}: expected at least one pair, got features {tuple(image.shape)}")
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return image, text, *scalars.values(), ranks


def _wanted(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _check(op: str, image: Tensor, text: Tensor, labels: Tensor | None) -> None:
    check_features(op, image, text)
    if image.dtype not in FEATURES or image.layout != torch.strided or text.layout != torch.strided or not image.shape[1]:
        got = f"{tuple(image.shape)} {image.dtype}, {image.layout} and {text.layout}"
        raise TypeError(f"{op}: expected dense features of float16, bfloat16, float32 or float64, at least one wide, got {got}")
    if image.shape[0] != text.shape[0]:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise ValueError(f"{op}: expected as many texts as images, got {shapes}; pass the pairs row by row")
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: expected labels as a tensor, got {type(labels).__name__}; pass torch.tensor(labels)")
    if labels.shape != image.shape[:1]:
        raise ValueError(f"{op}: expected one label per row, ({len(image)},), got {tuple(labels.shape)}")
    if labels.dtype not in LABELS:
        raise TypeError(f"{op}: expected integer labels, got {labels.dtype}; convert with .long()")
    if labels.device != image.device:
        raise ValueError(f"{op}: expected labels on {image.device}, got {labels.device}; move them with .to")


class _Clip(torch.autograd.Function):
    """This rank's images against every text, block by block: statistics forward, gradients backward.

    With labels the target mass 1/count of every positive is symmetric in i and j, so one term moves both directions from the
    plain loss to the one with shared targets: the mean over i of ⟨image_i, excess_i⟩, where excess_i is the mean of the texts
    with its label less its own. It is exactly 0 for distinct labels.
    """

    @staticmethod
    def forward(ctx, image, text, scale, labels, ranks):
        N, arriving, others = ranks.total(image), ranks.gathered(text), []
        row_max, row_sum, col_max, col_sum, diagonal = CONTRASTIVE(image, text, scale, 0)
        everyone, excess = _labelled(text, labels, ranks)
        col_max, col_sum = ranks.spread(col_max, -torch.inf), ranks.spread(col_sum, 0.0)
        for part, block in arriving:
            block_max, block_sum, other_max, other_sum, _ = CONTRASTIVE(image, block, scale, len(block))
            top = torch.maximum(row_max, block_max)
            row_sum = row_sum * torch.exp(row_max - top) + block_sum * torch.exp(block_max - top)
            row_max = top
            part.put(col_max, other_max)
            part.put(col_sum, other_sum)
            others.append(block)
            if labels is not None:
                excess += _sums(block, part.others(everyone), labels)
        if ranks.parts:  # the column's sum over all ranks, by its maximum over all
            top = col_max.clone()
            ranks.reduce(top, dist.ReduceOp.MAX)
            col_sum *= torch.exp(col_max - top)
            ranks.reduce(col_sum, dist.ReduceOp.SUM)
            col_max = top
        # Near 100 an fp32 log-sum-exp is rounded to 4e-6: the maximum less the diagonal first keeps a small loss exact.
        row_log, col_log = row_sum.log(), col_sum.log()
        row_nll, col_nll = (row_max - diagonal) + row_log, (ranks.own(col_max) - diagonal) + ranks.own(col_log)
        loss = (row_nll.sum() + col_nll.sum()) / (2 * N)
        if labels is not None:
            excess = excess / _counts(everyone, labels)[:, None] - text
            loss = loss - scale * (inner(image, excess) / N)
        if ranks.parts:
            ranks.reduce(loss, dist.ReduceOp.SUM)
        on_diagonal = torch.expm1(-row_nll) + torch.expm1(-col_nll)  # p - 1 would cancel where p is near 1
        ctx.ranks, ctx.N = ranks, N
        saved = image, text, scale, row_max + row_log, col_max + col_log, on_diagonal, labels, everyone, excess
        ctx.save_for_backward(*saved, *(others if any(ctx.needs_input_grad) else ()))
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx, dy):
        image, text, scale, row_lse, col_lse, on_diagonal, labels, everyone, excess, *others = ctx.saved_tensors
        needs_image, needs_text, needs_scale, *_ = ctx.needs_input_grad
        want_image = needs_image or (needs_scale and not needs_text)
        # Times the number of ranks, over which DDP takes the mean of the gradients.
        ranks, unit = ctx.ranks, dy * (ctx.ranks.size / (2 * ctx.N))
        row_grad, col_grad, diagonal_grad = unit.expand(len(image)), unit.expand(ctx.N), on_diagonal * unit

        def gradients(block: Tensor, lse: Tensor, theirs: Tensor | None, own: bool) -> tuple[Tensor, Tensor]:
            of_image, of_text = CONTRASTIVE.backward(
                image, block, scale, 0 if own else len(block), row_lse, lse, row_grad, col_grad[: len(block)], diagonal_grad,
                want_image, needs_text,
            )  # fmt: skip
            if theirs is not None and needs_text:
                means = _sums(image, labels, theirs) / _counts(everyone, theirs)[:, None]
                of_text -= 2 * unit * (means - image if own else means)
            return of_image, of_text

        others_grad: Tensor | int = 0
        returned = Returned(ranks)
        for part, block in zip(ranks.parts, others, strict=True):
            theirs = None if labels is None else part.others(everyone)
            of_image, of_text = gradients(block, part.others(col_lse), theirs, own=False)
            others_grad = others_grad + of_image
            if needs_text:
                returned.send(part, of_text)
        image_grad, text_grad = gradients(text, ranks.own(col_lse), labels, own=True)
        if ranks.parts:
            image_grad += others_grad
        returned.add_to(text_grad)
        if labels is not None and want_image:
            image_grad -= 2 * unit * excess
        # dscale = Σ G_ij·⟨image_i, text_j⟩, which is ⟨image, G·text⟩ as well as ⟨text, Gᵀ·image⟩.
        dscale = inner(image, image_grad) if want_image else inner(text, text_grad)
        image_grad = scaled(image_grad, scale, image.dtype)  # one after the other: each frees its wider self
        text_grad = scaled(text_grad, scale, text.dtype)
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            dscale.to(scale.dtype) if needs_scale else None,
            None,
            None,
        )


class _SigLip(torch.autograd.Function):
    """The sum over this rank's images and every text, block by block, and its gradients in the same sweep.

    With labels, softplus(-l) = softplus(l) - l turns another positive than the pair into one by a term linear in its logit.
    """

    @staticmethod
    def forward(ctx, image, text, scale, bias, labels, ranks, want_image, want_text):
        N, arriving, returned = ranks.total(image), ranks.gathered(text), Returned(ranks)
        everyone, excess = _labelled(text, labels, ranks)

        def sweep(block: Tensor, theirs: Tensor | None, own: bool) -> list[Tensor]:
            offset = 0 if own else len(block)
            parts = PAIRWISE_SIGMOID(image, block, scale, bias, offset, want_image, want_text)
            if theirs is not None and want_text:
                sums = _sums(image, labels, theirs)
                parts[3].sub_(sums - image if own else sums)
            return parts

        loss, bias_grad, image_grad, text_grad = sweep(text, labels, own=True)
        for part, block in arriving:
            theirs: Any = None if labels is None else part.others(everyone)
            of_loss, of_bias, of_image, of_text = sweep(block, theirs, own=False)
            loss, bias_grad, image_grad = loss + of_loss, bias_grad + of_bias, image_grad.add_(of_image)
            if want_text:
                returned.send(part, of_text)
            if labels is not None:
                excess += _sums(block, theirs, labels)
        returned.add_to(text_grad)
        loss = loss.sum()
        if labels is not None:
            excess, more = excess - text, _counts(everyone, labels) - 1
            loss, bias_grad = loss - scale * inner(image, excess) - bias * more.sum(), bias_grad - more
            if want_image:
                image_grad -= excess
        loss = loss / N
        if ranks.parts:
            ranks.reduce(loss, dist.ReduceOp.SUM)
        ctx.share = ranks.size / N  # times the number of ranks, over which DDP takes the mean of the gradients
        ctx.dtypes = [x.dtype for x in (image, text, scale, bias)]
        # dscale = Σ g_ij·⟨image_i, text_j⟩, which is ⟨image, g·text⟩ as well as ⟨text, gᵀ·image⟩.
        dscale = inner(image, image_grad) if want_image else inner(text, text_grad) if want_text else None
        ctx.save_for_backward(scale, image_grad, text_grad, dscale, bias_grad.sum())
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx, dy):
        scale, image_grad, text_grad, dscale, dbias = ctx.saved_tensors
        of_image, of_text, of_scale, of_bias, *_ = ctx.needs_input_grad
        unit, (image_type, text_type, scale_type, bias_type) = dy * ctx.share, ctx.dtypes
        return (
            scaled(image_grad, unit * scale, image_type, spend=False) if of_image else None,
            scaled(text_grad, unit * scale, text_type, spend=False) if of_text else None,
            (dscale * unit).to(scale_type) if of_scale else None,
            (dbias * unit).to(bias_type) if of_bias else None,
            *(None,) * 4,
        )


def _labelled(text: Tensor, labels: Tensor | None, ranks: Ranks) -> Any:
    """The labels of all ranks [N], and for each row the sum [n, D] of this rank's texts with its label."""
    return (None, None) if labels is None else (ranks.collect(labels), _sums(text, labels, labels))


def _sums(x: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """For every label of ``wanted`` [k] the sum [k, D] of the rows of x [m, D] with that label, in a fixed order.

    No shape depends on the labels' values, so this compiles whole and asks no GPU.
    """
    if len(x) == 0:
        return x.new_zeros(len(wanted), x.shape[1], dtype=wide(x))
    ordered, order = labels.sort(stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    numbers = starts.cumsum(0) - 1
    # A bag for each distinct label, then empty ones up to m.
    bags = torch.searchsorted(numbers, torch.arange(len(x), device=x.device))
    sums = F.embedding_bag(order, x.to(wide(x)), bags, mode="sum")
    first = torch.searchsorted(ordered, wanted)
    found = numbers[first.clamp(max=len(x) - 1)]
    return torch.where((_counts(labels, wanted) > 0)[:, None], sums[found], 0)


def _counts(labels: Tensor, wanted: Tensor) -> Tensor:
    """How often each of ``wanted`` [k] occurs among ``labels``."""
    ordered = labels.sort()[0]
    return torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
