"""What other libraries' configurations say of images -> the fields of `Preprocess`; ValueError names what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Mean and deviation of each channel over CLIP's training images, on a scale of 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images
OPENAI = {
    "image_mean": MEAN,
    "image_std": STD,
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "resample": 3,
}
SQUARE = {"image_mean": HALF, "image_std": HALF, "size": {"height": 224, "width": 224}, "do_center_crop": False}
# The defaults of transformers' classes, for the fields that a preprocessor_config.json leaves out.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": OPENAI,
    "ChineseCLIP": OPENAI,
    "Siglip": SQUARE | {"resample": 3},
    "ViT": SQUARE | {"resample": 2},
}
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers


def open_clip_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `preprocess_cfg`. Keys that open_clip does not know it passes over, and so do we."""
    given = {key: value for key, value in config.items() if value is not None}
    _expect("preprocess_cfg", given, "mode", ("RGB",), "RGB")
    _expect("preprocess_cfg", given, "resize_mode", ("shortest", "longest", "squash"), "shortest")
    _expect("preprocess_cfg", given, "interpolation", ("bicubic", "bilinear", "random"), "bicubic")
    size, resize = _size("preprocess_cfg.size", given.get("size", 224)), given.get("resize_mode", "shortest")
    # "random" is for training. Of an oblong size whose shorter side is matched open_clip forgets the filter.
    bilinear = given.get("interpolation") == "bilinear" and not (resize == "shortest" and size[0] != size[1])
    return {
        "resolution": size,
        "mean": given.get("mean") or MEAN,
        "std": given.get("std") or STD,
        "interpolation": "bilinear" if bilinear else "bicubic",
        "resize": resize,
        "fill": given.get("fill_color", 0) if resize == "longest" else 0,
    }


def timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `pretrained_cfg`, as timm's resolve_data_config and create_transform read it for evaluation."""
    given = {key: value for key, value in config.items() if value is not None}
    channels, *size = given.get("input_size", (3, 224, 224))
    if channels != 3:
        raise ValueError(f"pretrained_cfg.input_size: expected 3 channels, got {channels}")
    _expect("pretrained_cfg", given, "interpolation", FILTERS, "bicubic")
    mean = given.get("mean") or IMAGENET_MEAN
    modes = {"squash": "squash", "border": "longest"}  # anything else is "center" to timm
    mode = given.get("crop_mode") or "center"
    _expect("pretrained_cfg", {"crop_mode": mode}, "crop_mode", (*modes, "center"), "center")
    return {
        "resolution": _size("pretrained_cfg.input_size", size),
        "mean": mean,
        "std": given.get("std") or IMAGENET_STD,
        "interpolation": given.get("interpolation") or "bicubic",
        "resize": modes.get(mode, "shortest"),
        "fill": tuple(round(255 * value) for value in mean) if mode == "border" else 0,
        "crop": given.get("crop_pct") or 0.875,
        "rgb_first": True,
    }


def transformers_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `preprocessor_config.json` of transformers' CLIP, ChineseCLIP, SigLIP or ViT processor."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP")
    family = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if family not in PROCESSORS:
        expected = ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
        raise ValueError(f"preprocessor_config.image_processor_type: expected {expected}, got {kind}")
    given = PROCESSORS[family] | {key: value for key, value in config.items() if value is not None}
    for field in ("do_resize", "do_rescale"):
        _expect("preprocessor_config", given, field, (True,), True)
    if not math.isclose(factor := given.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"preprocessor_config.rescale_factor: expected 1/255, got {factor}")
    known = ("do_resize", "do_rescale", "do_center_crop", "do_normalize", "do_convert_rgb")
    others = [key for key, value in given.items() if value and key not in known and key.startswith("do_")]
    if others := [*others, *(key for key in ("use_square_size", "crop_pct", "pad_size") if given.get(key))]:
        raise ValueError(f"preprocessor_config.{others[0]}: expected none of it, got {given[others[0]]}")
    if not isinstance(resample := given["resample"], int) or not 0 <= resample < len(FILTERS):
        raise ValueError(f"preprocessor_config.resample: expected one of Pillow's numbers from 0 to 5, got {resample}")
    normalize = given.get("do_normalize", True)
    return {
        "mean": given["image_mean"] if normalize else 0.0,
        "std": given["image_std"] if normalize else 1.0,
        "interpolation": FILTERS[resample],
        "rgb_first": True,
        "round_down": True,
        **_transformers_size(given, family != "ViT"),
    }


def _transformers_size(given: Mapping[str, Any], shortest: bool) -> dict[str, Any]:
    """The size's three fields: resolution, resize, crop. shortest: what a number alone means."""
    size, crop = given["size"], given.get("crop_size") if given["do_center_crop"] else None
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size} if isinstance(size, int) and shortest else {"square": size}
    if set(size) == {"shortest_edge"}:
        resized, resize = _size("preprocessor_config.size", size["shortest_edge"]), "shortest"
        if not crop:
            raise ValueError("preprocessor_config.do_center_crop: expected true beside size.shortest_edge, got false")
    elif set(size) in ({"height", "width"}, {"square"}):
        wanted = size.get("square") or (size["height"], size["width"])
        resized, resize = _size("preprocessor_config.size", wanted), "squash"
    else:
        raise ValueError(f"preprocessor_config.size: expected shortest_edge, or height and width, got {dict(size)}")
    wanted = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else crop or resized
    cropped = _size("preprocessor_config.crop_size", wanted)
    shares = {have / want for have, want in zip(cropped, resized, strict=True)}
    if len(shares) > 1 or max(shares) > 1:
        raise ValueError(f"preprocessor_config.crop_size: expected the same share of each side of {resized}, got {cropped}")
    share = shares.pop()
    while math.floor(cropped[0] / share) < resized[0] or math.floor(cropped[1] / share) < resized[1]:
        share = math.nextafter(share, 0)  # a rounded quotient may lie a hair too high
    return {"resolution": cropped, "resize": resize, "crop": share}


def _expect(where: str, given: Mapping[str, Any], field: str, allowed: tuple[Any, ...], default: Any) -> None:
    if (value := given.get(field, default)) not in allowed:
        raise ValueError(f"{where}.{field}: expected {' or '.join(map(str, allowed))}, got {value}")


def _size(field: str, value: Any) -> tuple[int, int]:
    """(height, width) of a number, [side] or [height, width]."""
    sides = (value,) if isinstance(value, (int, float)) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(sides) not in (1, 2) or any(not isinstance(side, (int, float)) or side < 1 for side in sides):
        raise ValueError(f"{field}: expected pixels a side, or height and width, got {value}")
    return int(sides[0]), int(sides[-1])
