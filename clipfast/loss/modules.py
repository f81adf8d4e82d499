"""The losses as open_clip's modules: constructors, calls, attributes, and the methods that a subclass may override."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.kernels.contrastive import check_scalar
from clipfast.loss.losses import clip_loss, siglip_loss
from clipfast.loss.ranks import Gathered, Ranks


def _overridden(module: nn.Module, home: type, *names: str) -> bool:
    """Whether one of these methods is no longer ``home``'s, in a subclass or on the module itself."""
    return any(getattr(type(module), name) is not vars(home)[name] or name in vars(module) for name in names)


_told: set[type] = set()


def _tell(module: nn.Module, home: type) -> None:
    if type(module) not in _told:
        _told.add(type(module))
        warnings.warn(
            f"{type(module).__name__} makes the matrix of all logits, as open_clip's {home.__name__} does, in O(N²) memory and "
            "with the gradients that its options have there, because its own get_logits, get_ground_truth or _loss is called; "
            f"clipfast's {home.__name__} itself makes none",
            stacklevel=3,
        )


def _group(module: nn.Module, rank: int, world_size: int) -> dist.ProcessGroup | None:
    """All processes, for a module that was told of several."""
    name = type(module).__name__
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{name}: expected torch.distributed initialised for world_size {world_size}, it is not; call "
            "torch.distributed.init_process_group first"
        )
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"{name}: expected rank {dist.get_rank()} of {dist.get_world_size()}, as torch.distributed has it, "
            f"got rank {rank} of {world_size}; pass those"
        )
    return dist.group.WORLD


def _meet(module: nn.Module, group: dist.ProcessGroup | None, image: Tensor, text: Tensor) -> None:
    """Raises on all ranks unless all bring equal shapes: the matrix is made of equal blocks."""
    if group is not None:
        Ranks.meet(group, f"{type(module).__name__} of {tuple(image.shape)} and {tuple(text.shape)} {text.dtype}", image)


class ClipLoss(nn.Module):
    """``clip_loss`` with the constructor and the call of open_clip's ``ClipLoss``.

    ``local_loss``, ``gather_with_grad`` and ``cache_labels`` choose variants of the same loss; they change nothing here: every
    block of similarities is computed once in the job, and gradients are those of the whole batch. With ``world_size`` above 1
    the batch is that of all processes of ``torch.distributed``, and every rank returns the whole loss.

    A subclass that overrides ``get_logits`` or ``get_ground_truth``, or calls them, gets open_clip's: the logits of all pairs
    in memory, and gradients by those options. A warning says so once.
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
        if use_horovod:
            raise ValueError("ClipLoss: expected use_horovod False, got True; use torch.distributed")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.prev_num_logits = 0
        self.labels: dict[Any, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """For each of ``num_logits`` rows the column of its pair, [num_logits] int64."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, [N, N]; with ``local_loss`` this rank's rows of both, [n, N]."""
        _tell(self, ClipLoss)
        images, texts = image_features, text_features
        if self.world_size > 1:
            _meet(self, _group(self, self.rank, self.world_size), images, texts)
            images, texts = (self._gathered(x) for x in (images, texts))
        if self.local_loss or self.world_size == 1:
            per_image, per_text = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def _gathered(self, own: Tensor) -> Tensor:
        """[n, D] -> [N, D]. Gradients reach all ranks (``gather_with_grad``), this one (not ``local_loss``), or none."""
        if self.gather_with_grad:
            return Gathered.apply(own, self.world_size).flatten(0, 1)
        found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(found, own.detach().contiguous())
        if not self.local_loss:
            found[self.rank] = own
        return torch.cat(found)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss [], or {"contrastive_loss": loss}. A bias common to all logits cancels in the softmax: its gradient is 0."""
        if not _overridden(self, ClipLoss, "get_logits", "get_ground_truth"):
            loss = clip_loss(image_features, text_features, logit_scale, group=_group(self, self.rank, self.world_size))
            if logit_bias is not None:
                one = isinstance(logit_bias, Tensor) and logit_bias.numel() == 1
                bias = check_scalar("ClipLoss", "logit_bias", logit_bias.reshape(()) if one else logit_bias, image_features)
                loss = loss + (0 * bias).to(loss.dtype)  # that of a parameter is there: DDP waits for it
        else:
            _tell(self, ClipLoss)
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            labels = self.get_ground_truth(image_features.device, logits[0].shape[0])
            loss = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """``siglip_loss`` with the constructor and the call of open_clip's ``SigLipLoss``.

    ``cache_labels``, ``dist_impl`` and ``chunk_size`` choose how the same loss is computed; they are accepted and change
    nothing. With ``world_size`` above 1 every rank returns the loss of the whole batch, where open_clip's return shares of it,
    whose mean it is; the gradients' mean is the same.

    A subclass that overrides ``get_logits``, ``get_ground_truth`` or ``_loss``, or calls them, gets open_clip's, a rank's share
    and the matrix of logits (of ``chunk_size`` images at a time) included. A warning says so once.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"SigLipLoss: expected dist_impl bidir, shift, reduce, gather or None, got {dist_impl!r}")
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 0:
            raise ValueError(f"SigLipLoss: expected chunk_size of 0 (the whole) or images at a time, got {chunk_size!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or "bidir", chunk_size
        self.prev_num_logits = 0
        self.labels: dict[Any, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """1 for a pair, -1 elsewhere, [num_logits, num_logits]; ``negative_only``: -1."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels + 2 * torch.eye(num_logits, device=device, dtype=dtype)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """[images, texts]."""
        _tell(self, SigLipLoss)
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The sum over these pairs, divided by the number of images."""
        images = len(image_features)
        if not self.chunk_size:
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, image_features.dtype, images, negative_only=negative_only)
            return -F.logsigmoid(labels * logits).sum() / images
        total = torch.zeros((), device=image_features.device)
        for start in range(0, images, self.chunk_size):
            rows = image_features[start : start + self.chunk_size]
            logits = self.get_logits(rows, text_features, logit_scale, logit_bias)
            positives = 0 if negative_only else logits.diagonal(start).sum()  # softplus(-l) = softplus(l) - l
            total = total + F.softplus(logits).sum() - positives
        return total / images

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss [], or {"contrastive_loss": loss}."""
        group = _group(self, self.rank, self.world_size)
        if not _overridden(self, SigLipLoss, "get_logits", "get_ground_truth", "_loss"):
            bias = 0.0 if logit_bias is None else logit_bias
            loss = siglip_loss(image_features, text_features, logit_scale, bias, group=group)
        else:
            _tell(self, SigLipLoss)
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
            if group is not None:
                _meet(self, group, image_features, text_features)
                for rank, texts in enumerate(Gathered.apply(text_features, self.world_size)):
                    # Its own once more, times 0: every rank's gradients then take part in the same sum.
                    share = self._loss(image_features, texts, logit_scale, logit_bias, negative_only=True)
                    loss = loss + float(rank != self.rank) * share
        return {"contrastive_loss": loss} if output_dict else loss
