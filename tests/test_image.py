"""Images to pixels: what OpenAI's transform gives, bit for bit, from every kind of source."""

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from clipfast.image import MEAN, STD, Preprocess, _transform, read_image

SIZES = [
    (224, 224), (225, 224), (224, 227), (640, 480), (375, 500), (333, 217), (400, 223), (223, 449), (1, 1), (2, 3), (5, 1),
    (1, 40), (31, 32),
]  # fmt: skip
MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "I;16", "F"]


def reference(resolution: int) -> transforms.Compose:
    """OpenAI's `_transform`, as its `clip.py` composes it."""
    return transforms.Compose([
        transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(resolution),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]"""
    return np.random.default_rng(width * 1009 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(mode: str, width: int = 57, height: int = 40) -> Image.Image:
    if mode in ("I;16", "I", "F"):
        values = np.random.default_rng(0).integers(0, 65536, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode in ("RGBA", "LA"):
        return Image.fromarray(noise(width, height, 4), "RGBA").convert(mode)
    return Image.fromarray(noise(width, height)).convert(mode)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resolution", [224, 65])
def test_sizes(size: tuple[int, int], resolution: int) -> None:
    image = Image.fromarray(noise(*size))
    got = Preprocess(resolution)(image)
    assert got.shape == (3, resolution, resolution) and got.dtype == torch.float32 and got.is_contiguous()
    assert torch.equal(got, reference(resolution)(image))


def test_roundings_of_many_sizes() -> None:
    rng = random.Random(0)
    for _ in range(150):
        size, resolution = (rng.randint(1, 90), rng.randint(1, 90)), rng.randint(1, 40)
        image = Image.fromarray(noise(*size))
        assert torch.equal(Preprocess(resolution)(image), reference(resolution)(image)), (size, resolution)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_resized_before_they_become_rgb(mode: str) -> None:
    """Palettes are resized without interpolation, alpha weighs the colours and is then dropped, 16 bits are cut to 8."""
    image = picture(mode)
    assert image.mode == mode
    assert torch.equal(Preprocess(32)(image), reference(32)(image))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_and_bytes(format: str, tmp_path: Path) -> None:
    data = encoded(picture("RGB", 300, 200), format)
    path = tmp_path / f"image.{format.lower()}"
    path.write_bytes(data)
    expected = reference(64)(Image.open(path))
    for source in (path, str(path), data, bytearray(data)):
        assert torch.equal(Preprocess(64)(source), expected)


def test_arrays_and_tensors() -> None:
    preprocess, array = Preprocess(32), noise(57, 40)
    expected = reference(32)(Image.fromarray(array))
    for source in (array, np.asfortranarray(array), array[:, ::-1][:, ::-1], torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(preprocess(source), expected)
    grey = array[..., 0]
    expected = reference(32)(Image.fromarray(grey))
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert torch.equal(preprocess(source), expected)
    rgba = noise(57, 40, 4)
    assert torch.equal(preprocess(rgba), reference(32)(Image.fromarray(rgba, "RGBA")))


def test_batches_and_sequences() -> None:
    preprocess, arrays = Preprocess(32), np.stack([noise(57, 40), 255 - noise(57, 40)])
    expected = torch.stack([reference(32)(Image.fromarray(array)) for array in arrays])
    mixed = [Image.fromarray(arrays[0]), encoded(Image.fromarray(arrays[1]))]
    for source in (arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2), list(arrays), tuple(mixed)):
        assert torch.equal(preprocess(source), expected)
    assert preprocess([arrays[0]]).shape == (1, 3, 32, 32)
    assert not torch.equal(expected[0], expected[1])


def test_the_name_that_openais_users_know() -> None:
    image = picture("RGB")
    assert torch.equal(_transform(48)(image), Preprocess(48)(image))


def test_unreadable_files_are_named_in_one_line(tmp_path: Path) -> None:
    photo = encoded(picture("RGB", 300, 200), "JPEG")
    cases = {
        "truncated.jpg": photo[: len(photo) // 2],
        "truncated.png": encoded(picture("RGB", 300, 200))[:5000],
        "text.jpg": b"not an image",
        "empty.png": b"",
        # The header of an image of 100,000 x 100,000 pixels, which Pillow refuses to unpack.
        "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source, subject in ((path, str(path)), (data, f"{len(data)} bytes")):
            with pytest.raises(OSError) as error:
                Preprocess(32)(source)
            assert str(error.value).startswith(f"{subject}: ") and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"missing\.png: expected an image, found no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(OSError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_damaged_files_raise_nothing_but_oserror() -> None:
    """Whatever a decoder stumbles over; a file that still decodes is fine."""
    rng, refused = random.Random(0), 0
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encoded(picture("RGB", 31, 20), format)
        for _ in range(150):
            bad = bytearray(good[: rng.randint(1, len(good))] if rng.random() < 0.3 else good)
            for _ in range(rng.randint(1, 4)):
                bad[rng.randrange(min(60, len(bad)))] = rng.randrange(256)
            try:
                read_image(bytes(bad))
            except OSError:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "source, error, message",
    [
        (3, TypeError, "expected a path, bytes, a PIL image, an array or a tensor, got int"),
        (noise(4, 4) / 255, TypeError, "expected an image of uint8, got float64"),
        (torch.rand(3, 4, 4), TypeError, "expected an image of uint8, got float32"),
        (noise(4, 4, 2), ValueError, r"got \[4, 4, 2\]"),
        (noise(4, 4)[0, 0], ValueError, r"got \[3\]"),
        (torch.from_numpy(noise(9, 8)), ValueError, r"expected an image tensor \[1, 3 or 4, H, W\], got \[8, 9, 3\]"),
        (noise(4, 4)[:0], ValueError, "expected an image with pixels, got 4 x 0"),
        (Image.new("RGB", (0, 5)), ValueError, "expected an image with pixels, got 0 x 5"),
        ([], ValueError, "expected at least one image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_holds_no_image(source, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Preprocess(32)(source)
