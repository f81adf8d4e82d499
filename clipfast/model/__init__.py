"""The two towers."""

from clipfast.model.clip import CLIP, MODELS
from clipfast.model.packed import Packed

__all__ = ["CLIP", "MODELS", "Packed"]
