"""transformers, from 5.6 on: CLIP, MetaCLIP 2, CLIPSeg, AltCLIP, Chinese CLIP, SigLIP and SigLIP 2, and the models around them.

Blocks are fused wherever they stand; where a model around a tower reads its pooled features, the tower as a whole is swapped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import __version__ as version

if tuple(int(number) for number in version.split(".")[:2]) < (5, 6):
    raise ImportError(f"expected transformers 5.6 or later, got {version}; convert the model instead (clipfast.convert)")

from clipfast.interop import attention_interface, transformers_blocks, transformers_towers
from clipfast.interop.accelerate import Swap, Way

attention_interface.register()

_PREFIXES = {
    "clip": "CLIP", "metaclip_2": "MetaClip2", "clipseg": "CLIPSeg", "altclip": "AltCLIP", "chinese_clip": "ChineseCLIP",
    "siglip": "Siglip", "siglip2": "Siglip2",
}  # fmt: skip
_BLOCK = "layer_norm (with the residual), linear (q, k, v in one), attention, mlp"


def _layer_lacks(layer: Any) -> str | None:
    if reason := transformers_blocks.lacks(layer):
        return reason
    config = layer.self_attn.config
    asked = config._attn_implementation
    if asked in ("sdpa", attention_interface.NAME) or (asked == "eager" and "Text" not in type(config).__name__):
        return None
    return f"attn_implementation={asked!r} is another attention, or gets a mask; model.set_attn_implementation('sdpa')"


_BLOCKS = Way(transformers_blocks.layer, _BLOCK, _layer_lacks)
_ENCODERS = Way(transformers_blocks.encoder, "its blocks one after the other, the residual left to the next layer_norm")
_PATCHES = Way(transformers_blocks.image_embeddings, "linear, in the place of the convolution")
_HEADS = Way(transformers_blocks.pooling_head, "pooling, keys and values not formed")
_TEXT = Way(transformers_towers.pooled_text, "text without padding, the end token alone in the last block (pooling)",
             transformers_towers.lacks_packed)  # fmt: skip
_LAST = Way(transformers_towers.pooled_last, "the last token alone in the last block (pooling)")
_IMAGE = Way(transformers_towers.pooled_image, "the class token alone in the last block (pooling)")
_PROJECTED = "as the tower in it, whose last_hidden_state is computed when it is read"
_TEXT_EMBEDS = Way(transformers_towers.text_with_projection, _PROJECTED)
_IMAGE_EMBEDS = Way(transformers_towers.image_with_projection, _PROJECTED)


class _Package(NamedTuple):
    """One of transformers.models."""

    anywhere: dict[type, Way]  # of a class wherever it stands
    towers: dict[type, Way]  # of a tower in a model that reads its pooled features
    readers: set[type]  # such models


_PACKAGES: dict[str, _Package] = {}  # those read so far


def swaps(model: nn.Module) -> Iterator[Swap]:
    """See ``accelerate``."""
    read: set[int] = set()  # towers whose pooled features are read by the model around them
    for module in model.modules():
        package = _package(type(module))
        if package is None:
            continue
        if type(module) in package.readers:
            read |= {id(tower) for name in ("text_model", "vision_model") if (tower := getattr(module, name, None)) is not None}
            yield from _unknown_towers(module)
        way = package.towers.get(type(module)) if id(module) in read else None
        way = way or package.anywhere.get(type(module))
        if way is not None:
            yield way.swap(module)


def _unknown_towers(reader: nn.Module) -> Iterator[Swap]:
    for name in ("text_model", "vision_model"):
        tower: Any = getattr(reader, name, None)
        package = None if tower is None else _package(type(tower))
        if tower is not None and not (package and any(type(inside) in package.anywhere for inside in tower.modules())):
            yield Swap(tower, None, "its blocks are of a kind that is not computed (BERT's, normalised behind), or not known")


def _package(kind: type) -> _Package | None:
    """What is known of the package of transformers.models that a class is from."""
    path = kind.__module__.split(".")
    if path[:2] != ["transformers", "models"] or len(path) < 4 or path[3] != f"modeling_{path[2]}":
        return None
    name = path[2]
    if name not in _PACKAGES and name in _PREFIXES:
        _PACKAGES[name] = _read(vars(sys.modules[kind.__module__]), _PREFIXES[name])
    if name == "vision_text_dual_encoder":  # whose towers are of other packages
        return _Package({}, {}, {kind})
    return _PACKAGES.get(name)


def _read(classes: dict[str, Any], prefix: str) -> _Package:
    """The classes of a package by their names, each of which may be absent."""
    siglip = prefix.startswith("Siglip")
    inner = f"{prefix}Vision" if prefix == "ChineseCLIP" else prefix

    def of(**ways: Way) -> dict[type, Way]:
        return {classes[name]: way for name, way in ways.items() if name in classes}

    layer = f"{inner}Layer" if inner != prefix else f"{prefix}EncoderLayer"
    transformers_blocks.FAMILIES[classes[layer]] = transformers_blocks.Family(
        classes[f"{inner}Attention"], classes[f"{inner}MLP"], classes[f"{inner}Encoder"],
        classes.get(f"{prefix}TextEmbeddings"), says_causal=not siglip, two_means_highest=prefix != "MetaClip2",
    )  # fmt: skip
    for side in ("Text", "Vision"):
        if f"{prefix}{side}ModelWithProjection" in classes:
            projected = classes[f"{prefix}{side}ModelWithProjection"]
            transformers_towers.OUTPUTS[projected] = classes[f"{prefix}{side}ModelOutput"]
    anywhere = of(**{layer: _BLOCKS, f"{inner}Encoder": _ENCODERS, f"{prefix}VisionEmbeddings": _PATCHES,
                     f"{prefix}MultiheadAttentionPoolingHead": _HEADS, f"{prefix}TextModelWithProjection": _TEXT_EMBEDS,
                     f"{prefix}VisionModelWithProjection": _IMAGE_EMBEDS})  # fmt: skip
    towers = of(**{f"{prefix}TextModel": _LAST if siglip else _TEXT})
    if not siglip and prefix != "CLIPSeg":  # SigLIP's head reads every token, CLIPSeg's decoder its states
        towers |= of(**{f"{prefix}VisionModel": _IMAGE})
    if prefix in ("AltCLIP", "ChineseCLIP"):  # their text towers are BERTs
        towers.pop(classes[f"{prefix}TextModel"])
    if prefix == "Siglip2":  # whose images come as patches
        anywhere.pop(classes["Siglip2VisionEmbeddings"])
    readers = {f"{prefix}Model", f"{prefix}TextModelWithProjection", f"{prefix}VisionModelWithProjection"}
    return _Package(anywhere, towers, {classes[name] for name in readers if name in classes})
