"""What `clipfast export` writes loads in the library that it is for, with equal features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from bench.rivals import open_clip
from clipfast.inputs.image import Preprocess
from clipfast.model import CLIP
from clipfast.weights import export
from tests.train.test_train import config as train_config
from tests.train.test_train import pairs, train

VIT: dict[str, Any] = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 16,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2,
}  # fmt: skip
RESNET = VIT | {"vision_layers": (1, 2, 1, 1), "vision_width": 16, "vision_patch_size": None}
HEADS = VIT | {"vision_heads": 4, "transformer_heads": 2}
TEXTS = ["a diagram", "a dog on a café's table, 2 p.m.", "x"]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    random = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (40, 50, 3), generator=random, dtype=torch.uint8).numpy())


def made(sizes: dict[str, Any], quick_gelu: bool) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**sizes, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also what begins at 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@torch.no_grad()
def features(model: Any, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return *(F.normalize(f, dim=-1) for f in (model.encode_image(pixels), model.encode_text(tokens))), model.logit_scale.exp()


def assert_equal(ours: CLIP, theirs: Any, photo: Image.Image) -> None:
    pixels, tokens = Preprocess(32)(photo)[None], clipfast.tokenize(TEXTS)
    for a, b in zip(features(ours, pixels, tokens), features(theirs, pixels, tokens), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["vit", "resnet"])
def test_openai(tmp_path: Path, photo: Image.Image, sizes: dict) -> None:
    """open_clip's loader for OpenAI's files is OpenAI's `build_model`: it rounds the weights to half precision."""
    model = made(sizes, quick_gelu=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    path = export(model, tmp_path / "model.pt", "openai")
    assert_equal(model, open_clip.openai.load_openai_model(str(path), "fp32", "cpu").eval(), photo)
    assert_equal(model, clipfast.load(str(path), "cpu")[0], photo)
    assert clipfast.load(str(path), "cpu")[1].resolution == 32


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("sizes", [VIT, RESNET, HEADS], ids=["vit", "resnet", "heads"])
def test_open_clip(tmp_path: Path, photo: Image.Image, sizes: dict, quick_gelu: bool) -> None:
    model = made({**sizes, "transformer_heads": 1} if sizes is RESNET else sizes, quick_gelu)
    path = export(model, tmp_path / "model", "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
    assert_equal(model, theirs.eval(), photo)
    torch.testing.assert_close(preprocess(photo), Preprocess(32)(photo), atol=1e-5, rtol=0)
    assert_equal(model, clipfast.load(str(path), "cpu")[0], photo)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("sizes", [VIT, HEADS], ids=["vit", "heads"])
def test_transformers(tmp_path: Path, photo: Image.Image, sizes: dict, quick_gelu: bool) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model = made(sizes, quick_gelu)
    path = export(model, tmp_path / "model", "transformers")
    theirs, told = CLIPModel.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    pixels, tokens = Preprocess(32)(photo)[None], clipfast.tokenize(TEXTS)
    with torch.no_grad():
        image = theirs.eval().get_image_features(pixels).pooler_output
        text = theirs.get_text_features(tokens.long()).pooler_output
    ours = features(model, pixels, tokens)
    for a, b in zip(ours, (F.normalize(image, dim=-1), F.normalize(text, dim=-1), theirs.logit_scale.exp()), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert_equal(model, clipfast.load(str(path), "cpu")[0], photo)
    for row, ids in zip(tokens.tolist(), CLIPTokenizer.from_pretrained(path)(TEXTS)["input_ids"], strict=True):
        assert row[: row.index(49407) + 1] == ids[: ids.index(49407) + 1]


@pytest.mark.parametrize("sizes", [VIT, RESNET, HEADS], ids=["vit", "resnet", "heads"])
def test_safetensors(tmp_path: Path, photo: Image.Image, sizes: dict) -> None:
    model = made(sizes, quick_gelu=False)
    path = export(model, tmp_path / "model.safetensors")
    again, preprocess = clipfast.load(str(path), "cpu")
    assert_equal(model, again, photo)
    assert preprocess.resolution == 32 and not again.quick_gelu


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_checkpoint_can_be_exported(tmp_path: Path, ema: float) -> None:
    from tests.train.test_train import endless

    done = train(train_config(tmp_path / "run", steps=2, ema=ema), endless)
    model, _ = clipfast.load(str(tmp_path / "run" / "checkpoints" / "step_00000002"), "cpu")
    batch = pairs(3)
    expected = (done.ema or done.model).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(batch.pixels), expected.encode_image(batch.pixels))


@pytest.mark.parametrize(
    ("sizes", "quick_gelu", "layout", "match"),
    [
        (VIT, False, "openai", "OpenAI's clip has no such model: {'quick_gelu': False}"),
        (HEADS, True, "openai", "OpenAI's clip has no such model: {'transformer_heads': 2, 'vision_heads': 4}"),
        (RESNET, True, "transformers", "transformers has no CLIP with a ResNet"),
        (VIT, True, "onnx", "expected a layout of openai, open_clip, transformers, safetensors, got 'onnx'"),
    ],
)
def test_what_a_library_has_not(tmp_path: Path, sizes: dict, quick_gelu: bool, layout: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        export(made(sizes, quick_gelu), tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for layout in ("openai", "open_clip"):
        with pytest.raises(FileExistsError, match="expected nothing at"):
            export(made(VIT, True), tmp_path / "mine", layout)
    assert (tmp_path / "mine").read_text() == "mine"
