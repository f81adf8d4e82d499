"""Other libraries' models before and after ``accelerate``, on the same weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bench.plan import image_flops
from bench.rivals import open_clip
from bench.test_towers import CAPTIONS, DEVICE, DTYPE, agree, text_floor
from clipfast.inputs.tokenizer import tokenize
from clipfast.interop import accelerate
from clipfast.model import MODELS

timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
if isinstance(open_clip, str):
    pytest.skip(open_clip, allow_module_level=True)

SIZES = MODELS["ViT-B/32"]
TEXT, IMAGE = (dict(projection_dim=SIZES["embed_dim"]) for _ in range(2))  # their defaults are ViT-B/32's


@pytest.fixture(scope="module")
def pair() -> Callable[[str], tuple[Any, Any]]:
    """transformers' model of the size of ViT-B/32, random: accelerated, and as it is."""

    @functools.cache
    def made(name: str) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        if name == "CLIPModel":
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE))
        else:  # Stable Diffusion's
            config = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
            model = transformers.CLIPTextModel(config)
        return accelerated(model)

    return made


def accelerated(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model accelerated, and as it is."""
    before = model.eval().to(DEVICE, DTYPE)
    after = copy.deepcopy(before)
    assert accelerate(after)
    return after, before


@functools.cache
def classifier() -> tuple[nn.Module, nn.Module]:
    """timm's ViT-B/16 of CLIP with its head, random: accelerated, and as it is."""
    torch.manual_seed(0)
    return accelerated(timm.create_model("vit_base_patch16_clip_224", num_classes=1000))


@functools.cache
def open_clips() -> tuple[Any, Any]:
    """open_clip's ViT-B/32, random: accelerated, and as it is."""
    torch.manual_seed(0)
    return accelerated(open_clip.create_model("ViT-B-32"))


@pytest.mark.parametrize("B", [16, 1])
def test_clip_model_images(compare, pair, B: int) -> None:
    after, before = pair("CLIPModel")
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    weights = 4 * sum(p.numel() for p in before.vision_model.parameters())
    with torch.no_grad():
        agree(after.get_image_features(image).pooler_output, before.get_image_features(image).pooler_output)
        compare(
            lambda: after.get_image_features(image).pooler_output,
            {"transformers": lambda: before.get_image_features(image).pooler_output},
            items=B, floor=(B * int(image_flops(SIZES)), weights),
        )  # fmt: skip


@pytest.mark.parametrize("B", [16, 1])
def test_clip_model_captions(compare, pair, B: int) -> None:
    """Captions padded to 77 tokens, as sentence-transformers and most pipelines hand them over, with their mask."""
    after, before = pair("CLIPModel")
    text, lengths = tokenize(CAPTIONS[:B], return_lengths=True)
    text = text.long().to(DEVICE)
    mask = (torch.arange(text.shape[1]) < lengths[:, None]).long().to(DEVICE)
    with torch.no_grad():
        agree(after.get_text_features(text, mask).pooler_output, before.get_text_features(text, mask).pooler_output)
        compare(
            lambda: after.get_text_features(text, mask).pooler_output,
            {"transformers": lambda: before.get_text_features(text, mask).pooler_output},
            items=B, floor=text_floor(SIZES, lengths), mean_tokens=float(lengths.double().mean()),
        )  # fmt: skip


@pytest.mark.parametrize("B", [16, 1])
def test_clip_text_model_all_states(compare, pair, B: int) -> None:
    """All 77 states, which a diffusion model reads, of Stable Diffusion's text encoder."""
    after, before = pair("CLIPTextModel")
    text = tokenize(CAPTIONS[:B]).long().to(DEVICE)
    sizes = SIZES | dict(transformer_width=768, transformer_heads=12)
    with torch.no_grad():
        agree(after(text)[0], before(text)[0])
        compare(
            lambda: after(text)[0], {"transformers": lambda: before(text)[0]},
            items=B, floor=text_floor(sizes, torch.full((B,), 77)),
        )  # fmt: skip


@pytest.mark.parametrize("B", [16, 1])
def test_timm_classifier(compare, B: int) -> None:
    after, before = classifier()
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    sizes = SIZES | dict(vision_patch_size=16)
    weights = 4 * sum(p.numel() for p in before.parameters())
    with torch.no_grad():
        agree(after(image), before(image))
        compare(
            lambda: after(image), {"timm": lambda: before(image)}, items=B, floor=(B * int(image_flops(sizes)), weights),
        )  # fmt: skip


@pytest.mark.parametrize("B", [16, 1])
def test_open_clip_images(compare, B: int) -> None:
    after, before = open_clips()
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    weights = 4 * sum(p.numel() for p in before.visual.parameters())
    with torch.no_grad():
        agree(after.encode_image(image), before.encode_image(image))
        compare(
            lambda: after.encode_image(image), {"open_clip": lambda: before.encode_image(image)},
            items=B, floor=(B * int(image_flops(SIZES)), weights),
        )  # fmt: skip


@pytest.mark.parametrize("B", [16, 1])
def test_open_clip_captions(compare, B: int) -> None:
    after, before = open_clips()
    text, lengths = tokenize(CAPTIONS[:B], return_lengths=True)
    text = text.long().to(DEVICE)
    with torch.no_grad():
        agree(after.encode_text(text), before.encode_text(text))
        compare(
            lambda: after.encode_text(text), {"open_clip": lambda: before.encode_text(text)},
            items=B, floor=text_floor(SIZES, lengths), mean_tokens=float(lengths.double().mean()),
        )  # fmt: skip
