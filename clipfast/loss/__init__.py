"""The contrastive losses, on one rank or many."""

from clipfast.loss.losses import clip_loss, siglip_loss
from clipfast.loss.modules import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss", "clip_loss", "siglip_loss"]
