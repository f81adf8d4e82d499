"""Images -> the pixels that CLIP takes: OpenAI's transform, bit for bit, without torchvision; for training, a quicker way."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Mean and deviation of each channel over CLIP's training images, on a scale of 0 to 1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
JPEG = b"\xff\xd8\xff"  # how a JPEG begins


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
        return f"{len(source)} bytes", bytes(source)
    name = os.fspath(source)
    try:
        return name, Path(source).read_bytes()  # at once: Pillow would keep the file of an animated image open
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: expected an image, found no such file") from None
    except OSError as error:
        raise OSError(f"{name}: the image cannot be read: {error.strerror}") from None


def _decode(name: str, data: bytes, at_least: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()  # here, so that a truncated file is named
    except UnidentifiedImageError:
        raise OSError(f"{name}: expected an image that Pillow reads (JPEG, PNG, WebP, ...), got something else") from None
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


def as_rgb(image: Image.Image) -> Image.Image:
    """In RGB: the image itself where it is already, which Pillow's convert would copy (4 % of a photo of 500 x 375)."""
    return image if image.mode == "RGB" else image.convert("RGB")


class Preprocess:
    """OpenAI's transform: shorter side to R by Pillow's bicubic filter, centre crop, RGB (alpha dropped), normalised.

    ``preprocess(image)`` takes whatever ``read_image`` takes and gives float32 [3, R, R]; a sequence of images, or an array
    [B, H, W, 3], gives [B, 3, R, R].
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def __call__(self, image: Any) -> Tensor:
        batch = isinstance(image, Sequence) and not isinstance(image, (str, bytes, bytearray))
        if batch or (isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4):
            if not len(image):
                raise ValueError("expected at least one image, got an empty batch")
            return torch.stack([self._one(item) for item in image])
        return self._one(image)

    def _one(self, source: Any) -> Tensor:
        image, R = read_image(source), self.resolution
        width, height = image.size
        if 0 in image.size:
            raise ValueError(f"expected an image with pixels, got {width} x {height}")
        # The longer side is cut to a whole number of pixels, the crop's corner rounded, both as torchvision does.
        size = (R, int(R * height / width)) if width <= height else (int(R * width / height), R)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - R) / 2), round((size[1] - R) / 2)
        pixels = np.array(as_rgb(image.crop((left, top, left + R, top + R))))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255).sub_(self._mean).div_(self._std)

    def __repr__(self) -> str:
        return f"Preprocess({self.resolution})"


def _transform(n_px: int) -> Preprocess:
    """OpenAI's name for it."""
    return Preprocess(n_px)
