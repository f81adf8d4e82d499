"""Preprocess against torchvision's transforms put together as OpenAI does, bit for bit; what it takes; what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from clipfast.image import MEAN, STD, Preprocess, _transform, read_image

SIZES = [(500, 375), (375, 500), (224, 224), (225, 224), (13, 7), (641, 480), (31, 1000)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 7 + height)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65535, (height, width), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


def theirs(side: int) -> T.Compose:
    bicubic = T.InterpolationMode.BICUBIC
    steps = [T.Resize(side, interpolation=bicubic), T.CenterCrop(side), lambda i: i.convert("RGB"), T.ToTensor()]
    return T.Compose([*steps, T.Normalize(MEAN, STD)])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_openai_transform(size: tuple[int, int], mode: str) -> None:
    image = picture(*size, mode)
    for side in (224, 48):
        assert torch.equal(Preprocess(side)(image), theirs(side)(image))


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image, transform = picture(60, 40), _transform(32)
    expected, buffer = transform(image), io.BytesIO()
    image.save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (path, str(path), buffer.getvalue(), array, tensor):
        assert torch.equal(transform(source), expected)
    for batch in ([image, path], np.stack([array, array]), torch.stack([tensor, tensor])):
        assert torch.equal(transform(batch), torch.stack([expected, expected]))
    grey = np.asarray(image.convert("L"))
    assert torch.equal(transform(grey), transform(grey[..., None]))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(300, 200).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("not an image")
    for name, message in (("cut.jpg", "cut.jpg: the image cannot be read"), ("text.jpg", "text.jpg: expected an image")):
        with pytest.raises(OSError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png: expected an image, found no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(TypeError, match="uint8, got float32"):
        read_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"got \[4, 4, 2\]"):
        read_image(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(TypeError, match="got int"):
        read_image(3)
    with pytest.raises(ValueError, match="empty batch"):
        Preprocess(32)([])


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(100, 100).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match="bomb.png: the image cannot be read"):
        read_image(tmp_path / "bomb.png")
