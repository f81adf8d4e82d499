"""The steps of a transform, each callable by itself on a PIL image or a tensor, with torchvision's values and attributes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

MOST = 1 << 28  # pixels of a resized image: 0.8 GB
INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}  # "bicubic" -> Image.Resampling.BICUBIC
BICUBIC = Image.Resampling.BICUBIC  # OpenAI's name for it; torchvision takes it too


@dataclass
class Resize:
    """To a shorter side of `size`, or to exactly `size` = (height, width), by one of Pillow's filters.

    A tensor [..., H, W] is resized by torch's filter, as torchvision does: differentiable, and with uint8 rounded.
    """

    size: int | tuple[int, int]
    interpolation: Image.Resampling = BICUBIC
    max_size: None = None  # torchvision's, not offered
    antialias: bool = True  # False: torch's filter without it, for images too

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size becomes."""
        if not isinstance(self.size, int):
            return self.size
        # The longer side is cut to a whole number of pixels, as torchvision does.
        long = int(self.size * max(height, width) / min(height, width))
        return (long, self.size) if width <= height else (self.size, long)

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Tensor):
            return self._tensor(image)
        width, height = image.size
        size = self.target(height, width)
        if 0 in size:
            raise ValueError(f"expected an image that keeps a pixel a side, got {width} x {height} to resize to {self.size}")
        if size == (height, width):
            return image
        if math.prod(size) > MOST:
            told = f"{width} x {height} to {size[1]} x {size[0]}"
            raise ValueError(f"expected an image that is resized to at most {MOST:,} pixels, got {told}; crop it first")
        if self.antialias or self.interpolation == Image.Resampling.NEAREST:
            return image.resize(size[::-1], self.interpolation)
        resized = self._tensor(torch.from_numpy(np.array(as_rgb(image))).permute(2, 0, 1))
        return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())

    def _tensor(self, image: Tensor) -> Tensor:
        mode = self.interpolation.name.lower()
        if mode not in ("bilinear", "bicubic"):
            raise ValueError(f"expected bilinear or bicubic to resize a tensor, got {mode}")
        size, floating = self.target(*image.shape[-2:]), image.is_floating_point()
        if size == tuple(image.shape[-2:]):
            return image
        pixels = image.reshape(-1, *image.shape[-3:]) if image.ndim != 3 else image[None]
        pixels = F.interpolate(pixels if floating else pixels.float(), size=size, mode=mode, antialias=self.antialias)
        if not floating:  # bicubic swings beyond what 8 bits hold
            pixels = pixels.clamp_(0, 255).round_().to(image.dtype)
        return pixels.reshape(*image.shape[:-2], *size)


@dataclass
class ResizeKeepRatio(Resize):
    """To the largest size within `size` = (height, width), or, with `longest` 0, to the smallest one that covers it: timm's."""

    longest: float = 1.0

    def target(self, height: int, width: int) -> tuple[int, int]:
        high, wide = (self.size, self.size) if isinstance(self.size, int) else self.size
        ratios = height / high, width / wide
        ratio = max(ratios) * self.longest + min(ratios) * (1.0 - self.longest)
        return round(height / ratio), round(width / ratio)


@dataclass
class CenterCrop:
    """The middle `size` = (height, width) of an image or of a tensor [..., H, W]; where it is smaller, `fill` around it.

    round_down: an odd rest is cut as transformers does. Otherwise the corner is rounded, a half to the even pixel.
    """

    size: tuple[int, int]
    fill: int | tuple[int, int, int] = 0
    round_down: bool = False

    def __call__(self, image: Any) -> Any:
        wide, high = image.shape[:-3:-1] if isinstance(image, Tensor) else image.size
        less = max(self.size[1] - wide, 0), max(self.size[0] - high, 0)
        if any(less):
            image = self._pad(image, (less[0] // 2, less[1] // 2, (less[0] + 1) // 2, (less[1] + 1) // 2))
        whole = int if self.round_down else round
        left, top = (
            whole((have - want) / 2) for have, want in zip((wide + less[0], high + less[1]), self.size[::-1], strict=True)
        )
        right, bottom = left + self.size[1], top + self.size[0]
        return image[..., top:bottom, left:right] if isinstance(image, Tensor) else image.crop((left, top, right, bottom))

    def _pad(self, image: Any, border: tuple[int, int, int, int]) -> Any:
        """border: left, top, right, bottom."""
        if isinstance(image, Tensor):
            if not isinstance(self.fill, int):
                raise ValueError(f"expected one fill value to pad a tensor, got {self.fill}")
            return F.pad(image, (border[0], border[2], border[1], border[3]), value=self.fill)
        bands = len(image.getbands())
        fill = (self.fill,) * bands if isinstance(self.fill, int) and bands > 1 else self.fill
        padded = ImageOps.expand(image, border, fill)
        if image.mode == "P":
            padded.putpalette(image.getpalette())  # expand adds the fill to it as a colour: here it is an index
        return padded


def _convert_image_to_rgb(image: Image.Image) -> Image.Image:
    """OpenAI's name for it: a copy in RGB, alpha dropped."""
    return image.convert("RGB")


def as_rgb(image: Image.Image) -> Image.Image:
    """In RGB: the image itself where it is already, which Pillow's convert would copy (4 % of a photo of 500 x 375)."""
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass
class ToTensor:
    """An image of 8 bits, or an array [H, W, C] or [H, W] of uint8 -> float32 [C, H, W] from 0 to 1."""

    def __call__(self, image: Any) -> Tensor:
        pixels = np.array(image)
        if pixels.dtype != np.uint8:
            raise TypeError(
                f"expected an image of 8 bits a channel, got {getattr(image, 'mode', pixels.dtype)}; convert it to RGB"
            )
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


@dataclass
class Normalize:
    """A float tensor [..., C, H, W] -> (x - mean) / std of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    inplace: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std) if self.inplace else (pixels - mean) / std
