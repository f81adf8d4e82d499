"""The two towers, of OpenAI's modules."""

from clipfast.model.clip import CLIP, MODELS
from clipfast.model.fused import QuickGELU
from clipfast.model.packed import Packed
from clipfast.model.resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from clipfast.model.transformer import LayerNorm, ResidualAttentionBlock, Transformer
from clipfast.model.vit import VisionTransformer

__all__ = [
    "CLIP", "MODELS", "AttentionPool2d", "Bottleneck", "LayerNorm", "ModifiedResNet", "Packed", "QuickGELU",
    "ResidualAttentionBlock", "Transformer", "VisionTransformer",
]  # fmt: skip
