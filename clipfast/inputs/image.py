"""Images -> the pixels that a checkpoint takes: its library's transform, without torchvision; for training, a quicker way."""

from __future__ import annotations

import errno
import importlib
import io
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clipfast.inputs.processors import MEAN, STD, open_clip_fields, timm_fields, transformers_fields
from clipfast.inputs.steps import (
    BICUBIC,  # noqa: F401 - clip.clip.BICUBIC
    INTERPOLATIONS,
    CenterCrop,
    Normalize,
    Resize,
    ResizeKeepRatio,
    ToTensor,
    _convert_image_to_rgb,
    as_rgb,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

LARGEST = 1 << 30  # bytes of an image's file
MOST = 1 << 26  # pixels of a resized image, up to which all of it is made
LONGEST = 8192  # pixels of a side that a transform resizes to: 200 MB
SCANS = 100  # of a JPEG, which has up to 14: each passes over all of its pixels, and takes a few bytes of the file
JPEG = b"\xff\xd8\xff"  # how a JPEG begins
# What is opened, by Pillow's own decoders. Never all that Pillow knows: an EPS under any name would start Ghostscript.
FORMATS = ("Jpeg", "Png", "WebP", "Bmp", "Gif", "Tiff", "Ppm", "Avif", "Jpeg2K", "Ico")


def read_image(source: Any, at_least: int = 0) -> Image.Image:
    """An image from a path, bytes, a PIL image, an array [H, W] or [H, W, 1|3|4] of uint8, or a tensor [1|3|4, H, W] of uint8.

    It keeps its mode: OpenAI's transform resizes first and converts to RGB after.

    at_least: pixels a side that a large JPEG may be scaled down to, by 2, 4 or 8, as it is decoded: quicker, but other pixels
        than OpenAI's. 0: it is not.

    Raises:
        OSError: the file is missing, truncated or not an image.
        TypeError, ValueError: not something that holds an image.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source)
    return _decode(*_contents(source), at_least)


def read_rgb(source: Any, at_least: int = 0) -> np.ndarray:
    """The pixels of ``read_image(source, at_least)`` in RGB, [H, W, 3] uint8: the training's way, which ``jpeg_decoder`` names.

    Where simplejpeg is installed it decodes JPEGs straight into the array, by the same libjpeg-turbo and so to the same values:
    a photo of 500 x 375 at quality 90 takes 0.54 ms, Pillow and its copies 0.72 (measured).
    """
    if isinstance(source, (Image.Image, np.ndarray, Tensor)):
        return np.array(as_rgb(read_image(source)))
    name, data = _contents(source)
    pixels = _decode_jpeg(data, at_least) if simplejpeg and data.startswith(JPEG) else None
    return np.array(as_rgb(_decode(name, data, at_least))) if pixels is None else pixels


def jpeg_decoder() -> str:
    """What ``read_rgb`` decodes JPEGs with here."""
    if simplejpeg:
        return f"simplejpeg {simplejpeg.__version__}"
    return f"Pillow {PIL.__version__}; quicker with simplejpeg: pip install simplejpeg"


def _decode_jpeg(data: bytes, at_least: int) -> np.ndarray | None:
    """[H, W, 3], or None for what Pillow shall judge: CMYK, more pixels than it takes unwarned, whatever is damaged."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray", "RGB") or height * width > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
            return None
        # By 8, 4 or 2 if both sides allow, as Pillow's draft. simplejpeg could also scale 500 x 375 by 5/8, but that IDCT is
        # not vectorised: even with its smaller resize it gains nothing (measured), and is 2/255 off.
        scale = next((s for s in (8, 4, 2) if 0 < s * at_least <= min(height, width)), 1)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        return simplejpeg.decode_jpeg(data, **least)  # by default strict: a warning of libjpeg's raises too
    except (ValueError, KeyError):  # KeyError: a colour space that it has no name for
        return None


def _contents(source: Any) -> tuple[str, bytes]:
    """(name for messages, bytes) of a path or bytes."""
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise TypeError(f"expected a path, bytes, a PIL image, an array or a tensor, got {type(source).__name__}")
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes", _bounded(f"{len(source)} bytes", bytes(source))
    name = os.fspath(source)
    try:
        # A table may name a pipe or a device, which never ends, or a file without an end that matters.
        if not stat.S_ISREG((about := os.stat(source)).st_mode) and not stat.S_ISDIR(about.st_mode) or about.st_size > LARGEST:
            raise OSError(errno.EINVAL, f"expected a file of at most {LARGEST >> 20} MB, got another kind or a larger one")
        data = Path(source).read_bytes()  # at once: Pillow would keep the file of an animated image open
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: expected an image, found no such file") from None
    except OSError as error:
        raise OSError(f"{name}: the image cannot be read: {error.strerror}") from None
    return name, _bounded(name, data)


def _bounded(name: str, data: bytes) -> bytes:
    if data.startswith(JPEG) and (scans := data.count(b"\xff\xda")) > SCANS:
        raise OSError(f"{name}: expected a JPEG of at most {SCANS} scans, got {scans}")
    return data


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of FORMATS, as far as it has them here. Asked for another it would import every plug-in that it has."""
    found: dict[str, None] = {}
    for name in FORMATS:
        with suppress(ImportError):
            plugin = importlib.import_module(f"PIL.{name}ImagePlugin")
            found |= {key: None for key, (make, _) in Image.OPEN.items() if make.__module__ == plugin.__name__}
    return tuple(found)


def _decode(name: str, data: bytes, at_least: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()  # here, so that a truncated file is named
    except UnidentifiedImageError:
        raise OSError(f"{name}: expected an image ({', '.join(_formats())}), got something else") from None
    except Exception as error:  # whatever a decoder meets in a broken file: also SyntaxError, RuntimeError, its bomb error
        raise OSError(f"{name}: the image cannot be read: {error}") from None
    return image


def _from_array(source: np.ndarray | Tensor) -> Image.Image:
    array = source.cpu().numpy() if isinstance(source, Tensor) else source
    if isinstance(source, Tensor) and array.ndim == 3:
        if array.shape[0] not in (1, 3, 4):
            raise ValueError(f"expected an image tensor [1, 3 or 4, H, W], got {list(array.shape)}; [H, W, 3] is for arrays")
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8:
        raise TypeError(f"expected an image of uint8, got {array.dtype}; scale to 0..255 and convert")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)):
        raise ValueError(f"expected an image array [H, W] or [H, W, 1, 3 or 4], got {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


@dataclass(frozen=True, repr=False)
class Preprocess:
    """The transform of a checkpoint. ``Preprocess(R)`` is OpenAI's, bit for bit: shorter side to R by Pillow's bicubic filter,
    centre crop, RGB (alpha dropped), normalised.

    ``preprocess(image)`` takes whatever ``read_image`` takes and gives float32 [3, height, width]; a sequence of images, or an
    array [B, H, W, 3], gives [B, 3, height, width].

    ``from_open_clip``, ``from_timm`` and ``from_transformers`` read a checkpoint's configuration. They are equal to open_clip's
    and timm's transforms bit for bit, to transformers' Pillow processors to the rounding of float32 (the same 8 bits), and to
    its torchvision processors, whose filter is another implementation, within 1/255 of each pixel's range.

    resolution: side of the result, or (height, width).
    mean, std: of each channel, on a scale of 0 to 1.
    interpolation: Pillow's filter: nearest, bilinear, bicubic, box, hamming or lanczos.
    resize: "shortest" (the image covers the size, the rest is cropped), "longest" (it lies within, `fill` around it), "squash".
    fill: value of all channels, or (red, green, blue), from 0 to 255.
    crop: share of the resized image's side that is cropped: timm's crop_pct.
    antialias: False takes torch's filter without it, equal to torchvision's on tensors of uint8 (bilinear and bicubic).
    rgb_first: converts to RGB before it resizes, as timm and transformers do: other pixels for a palette or alpha.
    round_down: how transformers crops where the rest is odd.
    """

    resolution: int | tuple[int, int]
    _: KW_ONLY
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bicubic"
    resize: str = "shortest"
    fill: int | tuple[int, int, int] = 0
    crop: float = 1.0
    antialias: bool = True
    rgb_first: bool = False
    round_down: bool = False

    def __post_init__(self) -> None:
        size = (self.resolution,) * 2 if isinstance(self.resolution, int) else tuple(self.resolution)
        given: dict[str, Any] = {"resolution": size[0] if size[0] == size[-1] else size}
        given |= {name: _channels(name, getattr(self, name)) for name in ("mean", "std")}
        if not isinstance(self.fill, int):
            given["fill"] = tuple(self.fill)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for name, valid, wanted in (
            ("resolution", len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size), "pixels, or (height, width)"),
            ("mean", all(map(math.isfinite, self.mean)), "numbers"),
            ("std", all(1e-6 < abs(own) < math.inf for own in self.std), "no zero"),
            ("interpolation", self.interpolation in INTERPOLATIONS, ", ".join(INTERPOLATIONS)),
            ("resize", self.resize in ("shortest", "longest", "squash"), "shortest, longest or squash"),
            ("fill", isinstance(self.fill, int) or (len(self.fill) == 3 and self.rgb_first), "a value; three need rgb_first"),
            ("crop", 0 < max(size) / LONGEST <= self.crop, f"a share of which no side is resized beyond {LONGEST} pixels"),
            ("antialias", self.antialias or self.interpolation in ("nearest", "bilinear", "bicubic"), "True for this filter"),
        ):
            if not valid:
                raise ValueError(f"expected {name} of a transform: {wanted}, got {getattr(self, name)!r}")

    @classmethod
    def from_open_clip(cls, preprocess_cfg: Mapping[str, Any]) -> Preprocess:
        """open_clip's transform, bit for bit. preprocess_cfg: of open_clip_config.json; without a size it means 224.

        ValueError names a field that asks for something else.
        """
        return cls(**open_clip_fields(preprocess_cfg))

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping[str, Any]) -> Preprocess:
        """timm's transform for evaluation, bit for bit, on images that are converted to RGB first, as its data sets are.

        ValueError names a field that asks for something else.
        """
        return cls(**timm_fields(pretrained_cfg))

    @classmethod
    def from_transformers(cls, preprocessor_config: Mapping[str, Any]) -> Preprocess:
        """The transform of transformers' CLIP, ChineseCLIP, SigLIP or ViT processor. preprocessor_config: of that .json.

        Equal to its Pillow processor to 1e-6; to its torchvision ("fast") processor, for bilinear and bicubic, to 1/255 of a
        pixel's range. ValueError names a field that asks for something else.
        """
        return cls(**transformers_fields(preprocessor_config))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) that the image is resized to or about, of which the middle is cropped."""
        return math.floor(self.size[0] / self.crop), math.floor(self.size[1] / self.crop)

    @cached_property
    def transforms(self) -> list[Callable[[Any], Any]]:
        """The steps, as torchvision's Compose has them. A list that was changed is what runs from then on."""
        return self._steps()

    def _steps(self) -> list[Callable[[Any], Any]]:
        geometry: list[Callable[[Any], Any]] = list(self._geometry)
        geometry.insert(0 if self.rgb_first else len(geometry), _convert_image_to_rgb)
        return [*geometry, ToTensor(), Normalize(self.mean, self.std)]

    @cached_property
    def _geometry(self) -> tuple[Resize, CenterCrop] | tuple[Resize]:
        size, filter = self.resized, INTERPOLATIONS[self.interpolation]
        keep = {"shortest": 0.0, "longest": 1.0}.get(self.resize)
        if keep is None:
            resize = Resize(size, filter, antialias=self.antialias)
        elif self.resize == "shortest" and size[0] == size[1]:
            resize = Resize(size[0], filter, antialias=self.antialias)
        else:
            resize = ResizeKeepRatio(size, filter, antialias=self.antialias, longest=keep)
        exact = self.resize == "squash" and size == self.size
        return (resize,) if exact else (resize, CenterCrop(self.size, self.fill, self.round_down))

    @cached_property
    def _mean_std(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)

    def __call__(self, image: Any) -> Tensor:
        batch = isinstance(image, Sequence) and not isinstance(image, (str, bytes, bytearray))
        if batch or (isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4):
            if not len(image):
                raise ValueError("expected at least one image, got an empty batch")
            return torch.stack([self._one(item) for item in image])
        return self._one(image)

    def _one(self, source: Any) -> Tensor:
        image = read_image(source)
        if 0 in image.size:
            raise ValueError(f"expected an image with pixels, got {image.size[0]} x {image.size[1]}")
        if "transforms" in self.__dict__ and repr(self.transforms) != repr(self._steps()):
            changed: Any = image
            for step in self.transforms:
                changed = step(changed)
            return changed
        if self.rgb_first:
            image = as_rgb(image)
        image = self._resized(image)
        for step in self._geometry[1:]:
            image = step(image)
        mean, std = self._mean_std
        return ToTensor()(as_rgb(image)).sub_(mean).div_(std)

    def _resized(self, image: Image.Image) -> Image.Image:
        """The first step; of a picture of 1 x 60,000 pixels, which would take 12 GB, only along what is cropped out of it."""
        resize, *crops = self._geometry
        width, height = image.size
        size = resize.target(height, width)
        if math.prod(size) <= MOST or not crops or not resize.antialias:
            return resize(image)
        axis = 0 if size[0] > size[1] else 1
        want, have, source = crops[0].size[axis], size[axis], (height, width)[axis]  # type: ignore[union-attr]
        first = (int if self.round_down else round)((have - want) / 2)
        around = math.ceil(4 * max(1, have / source))  # pixels of the result that the filter, 3 wide in the source, may see
        low, high = max(0, first - around), min(have, first + want + around)
        box: list[float] = [0, 0, width, height]
        box[1 - axis], box[3 - axis] = low * source / have, high * source / have
        kept = (high - low, size[1]) if axis == 0 else (size[0], high - low)
        part = image.resize(kept[::-1], resize.interpolation, box=tuple(box))  # type: ignore[arg-type]
        cut = (0, first - low, size[1], first - low + want) if axis == 0 else (first - low, 0, first - low + want, size[0])
        return part.crop(cut)

    @property
    def changed(self) -> dict[str, Any]:
        """The fields beside the resolution that are not OpenAI's."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.default is not MISSING}
        return {name: value for name, value in given.items() if value != getattr(Preprocess, name)}

    def __repr__(self) -> str:
        told = [f"{name}={value!r}" for name, value in self.changed.items()]
        return f"Preprocess({', '.join([repr(self.resolution), *told])})"


def _channels(name: str, value: Any) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * 3
    if len(values) != 3:
        raise ValueError(f"expected {name} of a transform: a value for each of 3 channels, got {list(values)}")
    return values


def _transform(n_px: int) -> Preprocess:
    """OpenAI's name for it."""
    return Preprocess(n_px)
