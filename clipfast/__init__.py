"""clipfast: a CLIP engine. ``import clipfast as clip`` takes the place of OpenAI's package."""

import sys

from clipfast import model
from clipfast.info import info
from clipfast.inputs import tokenizer as simple_tokenizer
from clipfast.inputs.image import Preprocess, _transform  # noqa: F401 - reached as clip.clip._transform
from clipfast.inputs.tokenizer import tokenize
from clipfast.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from clipfast.model import CLIP, MODELS
from clipfast.model.graphs import graphed
from clipfast.weights import available_models, build_model, convert, convert_weights, load

__all__ = [
    "CLIP", "MODELS", "ClipLoss", "Preprocess", "SigLipLoss", "available_models", "build_model", "clip_loss", "convert",
    "convert_weights", "graphed", "info", "load", "siglip_loss", "tokenize",
]  # fmt: skip
__version__ = "0.1.0"

# The other paths that users of OpenAI's package reach: clip.clip._transform, clip.model.build_model, clip.simple_tokenizer.
clip = sys.modules[__name__]
model.build_model, model.convert_weights = build_model, convert_weights  # type: ignore[attr-defined]
sys.modules |= {"clipfast.clip": clip, "clipfast.simple_tokenizer": simple_tokenizer}
