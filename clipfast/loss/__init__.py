"""The contrastive losses, on one rank or many."""

from clipfast.loss.losses import ClipLoss, SigLipLoss, clip_loss, siglip_loss

__all__ = ["ClipLoss", "SigLipLoss", "clip_loss", "siglip_loss"]
