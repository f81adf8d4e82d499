"""Files of twelve kinds of images, damaged, against Pillow: the same pixels, or one line."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.inputs import Preprocess, read_image
from clipfast.inputs.image import _formats, read_rgb
from tests.hostile.harness import Attempt, mutated, one_line

KINDS: dict[str, tuple[tuple[str, ...], dict]] = {
    "JPEG": (("RGB", "L", "CMYK"), {"quality": 80}),
    "progressive JPEG": (("RGB", "L"), {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
    "PNG": (("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), {}),
    "APNG": (("RGB", "RGBA"), {"save_all": True}),
    "WEBP": (("RGB", "RGBA"), {"quality": 60}),
    "BMP": (("RGB", "L", "P", "1"), {}),
    "GIF": (("P", "L", "RGB"), {"save_all": True}),
    "TIFF": (("RGB", "RGBA", "L", "CMYK", "I;16", "F", "1", "LAB"), {}),
    "PPM": (("RGB", "L", "1", "I;16"), {}),
    "AVIF": (("RGB", "RGBA"), {"quality": 50, "speed": 10}),
    "JPEG2000": (("RGB", "L", "RGBA"), {}),
    "ICO": (("RGBA", "RGB"), {"sizes": [(16, 16), (24, 24)]}),
}
OTHERS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run", b"8BPS\0\1", b"%PDF-1.4", b"<svg/>", b"")
TIFF = (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")


def seeds() -> list[bytes]:
    rng, made = np.random.default_rng(0), []
    for kind, (modes, options) in KINDS.items():
        for mode in modes:
            width, height = (int(n) for n in rng.integers(25, 40, 2))
            ramp = np.add.outer(np.arange(height), np.arange(width)) * 5 % 256
            image = Image.fromarray((ramp[..., None] + rng.integers(0, 60, 3)).astype(np.uint8))
            image = _in(image, mode)
            given = dict(options)
            if given.get("save_all"):
                given["append_images"] = [image.rotate(90), image.rotate(180)]
            if kind == "TIFF" and mode in ("RGB", "L"):
                for packed in TIFF:
                    made.append(_saved(image, "TIFF", {"compression": packed}))
            name = {"progressive JPEG": "JPEG", "APNG": "PNG"}.get(kind, kind)
            made.append(_saved(image, name, given))
    return made


def _in(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)


def _saved(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepare(folder: Path) -> Attempt:
    warnings.simplefilter("ignore")
    whole, transform = seeds(), Preprocess(32)
    Image.MAX_IMAGE_PIXELS = 1 << 24  # twice that is refused: the 179 million that Pillow takes by itself are 1.4 GB as RGB
    if len({Image.open(io.BytesIO(data)).format for data in whole}) != 10:  # two are a JPEG, two a PNG
        raise AssertionError("expected an image of each kind")

    def attempt(rng: random.Random) -> str:
        data = rng.choice(whole) if rng.random() < 0.97 else rng.choice(OTHERS)
        if rng.random() < 0.05:  # the head of one, the body of another
            other = rng.choice(whole)
            data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
        data = mutated(data, rng) if rng.random() < 0.95 else data
        try:
            expected = Image.open(io.BytesIO(data), formats=_formats())
            expected.load()
            pixels = np.array(expected.convert("RGB"))
        except MemoryError:
            raise
        except Exception:
            pixels = None
        got = []
        for read in (lambda: np.array(read_image(data).convert("RGB")), lambda: read_rgb(data)):
            try:
                got.append(read())
            except Exception as error:
                if what := one_line(error):
                    return what
                got.append(None)
        for image in got:
            if (image is None) != (pixels is None) or not np.array_equal(image, pixels):
                shapes = [None if one is None else one.shape for one in (pixels, image)]
                return f"expected {shapes[0]}, got {shapes[1]}{' of other values' if shapes[0] == shapes[1] else ''}"
        try:
            made = transform(data)
        except Exception as error:
            return one_line(error) or ("" if pixels is None or pixels.size == 0 else f"not transformed: {error}")
        return "" if made.shape == (3, 32, 32) and bool(made.isfinite().all()) else f"transformed to {made.shape}"

    return attempt
