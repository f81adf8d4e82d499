"""Images to pixels: what OpenAI's transform gives, bit for bit, from every kind of source."""

import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import clipfast.inputs.image
from clipfast.info import info
from clipfast.inputs.image import MEAN, STD, Preprocess, _transform, as_rgb, jpeg_decoder, read_image, read_rgb

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


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
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


def jpegs() -> dict[str, bytes]:
    """A small photo in every way of storing it that simplejpeg is given."""
    photo, turned = picture("RGB").resize((121, 90), Image.Resampling.BICUBIC), Image.Exif()
    turned[0x0112] = 6  # a quarter turn, which neither path applies
    kinds = {
        "4:2:0": {}, "4:2:2": {"subsampling": 1}, "4:4:4": {"subsampling": 0}, "progressive": {"progressive": True},
        "turned": {"exif": turned}, "profile": {"icc_profile": b"profile" * 40}, "restarts": {"restart_marker_blocks": 2},
        "RGB": {"keep_rgb": True},
    }  # fmt: skip
    return {name: encoded(photo, "JPEG", quality=90, **kind) for name, kind in kinds.items()} | {
        "grey": encoded(photo.convert("L"), "JPEG", quality=90)
    }


def pillow_alone(data: bytes, at_least: int = 0) -> np.ndarray | str:
    """The pixels, or the error's text."""
    try:
        return np.array(as_rgb(read_image(data, at_least)))
    except OSError as error:
        return str(error)


@pytest.mark.parametrize("at_least, size", [(0, (90, 121)), (45, (45, 61)), (46, (90, 121)), (20, (23, 31)), (8, (12, 16))])
def test_the_training_s_decoder_gives_pillow_s_pixels(at_least: int, size: tuple[int, int]) -> None:
    pytest.importorskip("simplejpeg")
    for name, data in jpegs().items():
        got = clipfast.inputs.image._decode_jpeg(data, at_least)
        assert got is not None and got.shape == (*size, 3) and got.dtype == np.uint8, name
        assert np.array_equal(got, pillow_alone(data, at_least)) and np.array_equal(got, read_rgb(data, at_least)), name


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (8, 8), (9, 600)])
def test_small_jpegs_are_not_scaled(size: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(noise(*size)), "JPEG")
    assert np.array_equal(read_rgb(data), pillow_alone(data)) and read_rgb(data, 224).shape == (size[1], size[0], 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_jpegs_are_pillow_s_to_judge() -> None:
    """The same files are refused with the same words, and what Pillow still decodes has its pixels."""
    rng, kinds, refused = random.Random(0), list(jpegs().values()), 0
    for _ in range(1500):
        bad = bytearray(rng.choice(kinds))
        if rng.random() < 0.2:
            del bad[rng.randrange(3, len(bad)) :]
        for _ in range(rng.randint(0, 3)):
            bad[rng.randrange(2, min(len(bad), rng.choice((250, 10_000))))] = rng.randrange(256)
        expected = pillow_alone(bytes(bad))
        try:
            assert np.array_equal(read_rgb(bytes(bad)), expected)
        except OSError as error:
            refused += 1
            assert str(error) == expected
    assert 300 < refused < 1200


def test_what_only_pillow_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        encoded(picture(mode), format) for mode, format in (("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("RGB", "WEBP"))
    ]
    for data in sources:
        (tmp_path / "image").write_bytes(data)
        for source in (data, bytearray(data), tmp_path / "image"):
            assert np.array_equal(read_rgb(source), pillow_alone(data))
    assert np.array_equal(read_rgb(picture("LA")), np.array(picture("LA").convert("RGB")))
    assert np.array_equal(read_rgb(noise(5, 4)), noise(5, 4))
    with pytest.raises(TypeError, match="expected a path, bytes"):
        read_rgb(3)
    photo = jpegs()["4:2:0"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 121 * 90 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        read_rgb(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 121 * 90 // 2 - 1)
    with pytest.raises(OSError, match="exceeds limit"):
        read_rgb(photo)


def test_the_decoder_is_optional_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = jpegs()["4:2:0"]
    assert jpeg_decoder() in info()
    monkeypatch.setattr(clipfast.inputs.image, "simplejpeg", None)
    assert np.array_equal(read_rgb(photo), pillow_alone(photo))
    assert jpeg_decoder().startswith("Pillow ") and "pip install simplejpeg" in info()


def test_no_picture_starts_another_program(tmp_path: Path, monkeypatch) -> None:
    """PostScript under a picture's name: Pillow would hand it to Ghostscript, here a `gs` that leaves a mark."""
    mark, gs = tmp_path / "ran", tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {mark}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as before it was looked for
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(OSError), Image.open(io.BytesIO(script)) as image:
        image.load()
    assert mark.exists()  # so the trap works
    mark.unlink()
    (tmp_path / "x.jpg").write_bytes(script)
    for read in (read_image, read_rgb, Preprocess(32)):
        for source in (script, tmp_path / "x.jpg"):
            with pytest.raises(OSError, match="expected an image .*JPEG, PNG, .*got something else"):
                read(source)
    assert not mark.exists()


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "PPM", "ICO", "MPO", "DIB"])
def test_other_formats_that_are_opened(format: str) -> None:
    data = encoded(picture("RGB", 32, 32), format)
    assert torch.equal(Preprocess(16)(data), reference(16)(Image.open(io.BytesIO(data))))
