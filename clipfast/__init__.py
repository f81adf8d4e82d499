"""clipfast: a CLIP engine. ``import clipfast as clip`` takes the place of OpenAI's package."""

import sys
from pathlib import Path
from typing import Any

from clipfast import model
from clipfast.info import info
from clipfast.inputs import tokenizer as simple_tokenizer
from clipfast.inputs.image import BICUBIC, Preprocess, _convert_image_to_rgb, _transform  # noqa: F401 - of clip.clip
from clipfast.inputs.tokenizer import default_tokenizer, tokenize
from clipfast.interop import accelerate, restore
from clipfast.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from clipfast.model import CLIP, MODELS
from clipfast.model.graphs import graphed
from clipfast.weights import available_models, build_model, convert, convert_weights, export, get_tokenizer, hub, load

__all__ = [
    "CLIP", "MODELS", "ClipLoss", "Preprocess", "SigLipLoss", "accelerate", "available_models", "build_model", "clip_loss",
    "convert", "convert_weights", "export", "get_tokenizer", "graphed", "info", "load", "restore", "siglip_loss", "tokenize",
]  # fmt: skip
__version__ = "0.1.0"

# The other paths that users of OpenAI's package reach: clip.clip._transform, clip.model.build_model, clip.simple_tokenizer.
clip = sys.modules[__name__]
_MODELS = hub.URLS
model.build_model, model.convert_weights = build_model, convert_weights  # type: ignore[attr-defined]
sys.modules |= {"clipfast.clip": clip, "clipfast.simple_tokenizer": simple_tokenizer}


def _download(url: str, root: str) -> str:
    """OpenAI's name for it: the path of the verified archive."""
    return str(hub.download(url, Path(root)))


def __getattr__(name: str) -> Any:
    if name == "_tokenizer":  # OpenAI's; made when it is first asked for
        return default_tokenizer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
