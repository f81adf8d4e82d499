"""What a checkpoint says of its images: the pixels that open_clip's, timm's and transformers' own transforms give."""

import copy
import pickle

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision import transforms
from torchvision.transforms import functional
from transformers import CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from clipfast.inputs import image as module
from clipfast.inputs.image import MEAN, STD, Preprocess
from clipfast.inputs.steps import BICUBIC, Resize, _convert_image_to_rgb

HALF = [0.5, 0.5, 0.5]
BOTH = {"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 24}}


def picture(mode: str, width: int, height: int) -> Image.Image:
    """Smooth, with an edge and some noise: filters, corners and roundings all show."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / 7 + c) * np.cos(y / (5 + c)) for c in range(4)], -1)
    waves[height // 3 :, width // 2 :] *= 0.4
    noise = np.random.default_rng(width * 1009 + height).normal(0, 12, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


PICTURES = [
    picture(mode, *size)
    for mode, size in (
        ("RGB", (61, 47)),
        ("RGB", (37, 90)),
        ("RGBA", (75, 31)),
        ("L", (40, 41)),
        ("P", (33, 64)),
        ("RGB", (3, 2)),
    )
]


@pytest.mark.parametrize(
    "config",
    [
        {"size": 24},
        {"size": 24, "mean": HALF, "std": HALF, "interpolation": "bilinear"},  # LAION's ViT-L/14, but for the filter
        {"size": 25, "resize_mode": "squash", "interpolation": "bilinear"},  # CLIPA
        {"size": [20, 28], "resize_mode": "squash", "interpolation": "random"},
        {"size": 26, "resize_mode": "longest", "fill_color": 0},
        {"size": [27, 20], "resize_mode": "longest", "fill_color": 90, "interpolation": "bilinear"},
        {"size": [21, 30], "interpolation": "bilinear"},  # open_clip forgets the filter of this one
        {"size": (24,), "mean": 0.0, "std": None, "mode": "RGB", "interpolation": None},
    ],
    ids=str,
)
def test_open_clip_to_the_bit(config: dict) -> None:
    known = {key: value for key, value in config.items() if value is not None}
    known["size"] = known["size"][0] if known["size"] == (24,) else known["size"]
    known["mean"] = known.get("mean") or PreprocessCfg.mean  # open_clip takes 0 for none said
    theirs, ours = image_transform_v2(PreprocessCfg(**known), is_train=False), Preprocess.from_open_clip(config)
    for image in PICTURES[:5] if config.get("resize_mode") == "longest" else PICTURES:
        assert torch.equal(ours(image), theirs(image)), (image.mode, image.size)


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 24, 24), "crop_pct": 0.9},
        {"input_size": (3, 24, 24), "crop_pct": 1.0, "crop_mode": "squash", "mean": MEAN, "std": STD},
        {"input_size": [3, 23, 23], "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "lanczos"},
        {"input_size": (3, 24, 24), "crop_pct": 0.875, "crop_mode": "border", "interpolation": "bilinear"},
        {"input_size": (3, 20, 27), "crop_pct": 0.9, "interpolation": "hamming", "mean": HALF, "std": HALF},
        {"input_size": (3, 24, 24), "crop_pct": 1.1, "crop_mode": "squash", "interpolation": "nearest"},  # padded
        {"input_size": (3, 24, 24), "interpolation": "box", "num_classes": 1000, "first_conv": "x"},
    ],
    ids=str,
)
def test_timm_to_the_bit(config: dict) -> None:
    theirs = create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False)
    ours = Preprocess.from_timm(config)
    for image in PICTURES[:5] if config.get("crop_mode") == "border" else PICTURES:
        assert torch.equal(ours(image), theirs(image.convert("RGB"))), (image.mode, image.size)
    odd = picture("RGB", 29, 24)
    assert torch.equal(ours(odd), theirs(odd))


@pytest.mark.parametrize(
    ("fast", "slow", "config"),
    [
        (CLIPImageProcessor, CLIPImageProcessorPil, BOTH),
        (CLIPImageProcessor, CLIPImageProcessorPil, {"size": 25, "crop_size": 25, "resample": 2, "image_mean": HALF}),
        (CLIPImageProcessor, CLIPImageProcessorPil, BOTH | {"size": {"shortest_edge": 27}, "resample": 2}),  # MobileViT's crop
        # MobileCLIP: neither mean nor deviation
        (CLIPImageProcessor, CLIPImageProcessorPil, BOTH | {"do_normalize": False, "resample": 2, "image_mean": [0, 0, 0]}),
        (SiglipImageProcessor, SiglipImageProcessorPil, {"size": {"height": 24, "width": 31}}),
        (SiglipImageProcessor, SiglipImageProcessorPil, {"size": {"height": 24, "width": 24}, "resample": 2}),
        (ViTImageProcessor, ViTImageProcessorPil, {"size": 24, "image_std": [0.2, 0.3, 0.4], "do_convert_rgb": True}),
    ],
)
def test_transformers(fast: type, slow: type, config: dict, tmp_path) -> None:
    """Pillow's processors to 1e-6, which is the same 8 bits; torchvision's to 1/255 of a pixel."""
    ours = Preprocess.from_transformers(config | {"image_processor_type": fast.__name__})
    for image in PICTURES[:5]:
        got = ours(image)
        for kind, allowed in ((slow, 1e-6), (fast, 1.001 / 255)):
            theirs = kind(**config)(image, return_tensors="pt")["pixel_values"][0]
            difference = (got - theirs) * torch.tensor(ours.std).view(3, 1, 1)
            assert got.shape == theirs.shape and difference.abs().max() < allowed, (kind, image.mode, image.size)
    fast(**config).save_pretrained(tmp_path)
    saved = fast.get_image_processor_dict(tmp_path)[0]
    assert Preprocess.from_transformers(saved) == ours


def test_an_odd_rest_is_cropped_as_each_library_does() -> None:
    """27 - 24 = 3: torchvision rounds the corner to pixel 2, transformers down to 1."""
    image = picture("RGB", 27, 24)
    theirs = CLIPImageProcessorPil(**BOTH)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Preprocess.from_transformers(BOTH)(image), theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(Preprocess(24)(image), theirs, atol=0.1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_without_antialias(interpolation: str) -> None:
    ours = Preprocess(24, interpolation=interpolation, resize="squash", antialias=False, mean=0, std=1)
    mode = transforms.InterpolationMode(interpolation)
    for image in PICTURES:
        pixels = functional.pil_to_tensor(image.convert("RGB"))
        assert torch.equal(ours(image), functional.resize(pixels, [24, 24], mode, antialias=False) / 255)
        if image.size != (3, 2):
            assert not torch.equal(
                ours(image), Preprocess(24, interpolation=interpolation, resize="squash", mean=0, std=1)(image)
            )


@pytest.mark.parametrize(
    ("read", "config", "field"),
    [
        ("open_clip", {"mode": "L"}, "preprocess_cfg.mode"),
        ("open_clip", {"resize_mode": "crop"}, "preprocess_cfg.resize_mode"),
        ("open_clip", {"interpolation": "lanczos"}, "preprocess_cfg.interpolation"),
        ("open_clip", {"size": "224"}, "preprocess_cfg.size"),
        ("open_clip", {"mean": [0.5]}, "mean of a transform"),
        ("timm", {"input_size": (1, 24, 24)}, "pretrained_cfg.input_size"),
        ("timm", {"interpolation": "random"}, "pretrained_cfg.interpolation"),
        ("timm", {"crop_mode": "corner"}, "pretrained_cfg.crop_mode"),
        ("transformers", {"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type"),
        ("transformers", {"do_resize": False}, "do_resize"),
        ("transformers", {"do_rescale": False}, "do_rescale"),
        ("transformers", {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ("transformers", {"do_center_crop": False}, "do_center_crop"),
        ("transformers", {"do_pad": True}, "do_pad"),
        ("transformers", {"do_flip_channel_order": True}, "do_flip_channel_order"),
        ("transformers", {"resample": 9}, "resample"),
        ("transformers", {"size": {"longest_edge": 24}}, "preprocessor_config.size"),
        ("transformers", {"size": {"shortest_edge": 24}, "crop_size": 32}, "preprocessor_config.crop_size"),
        ("transformers", {"size": {"shortest_edge": 24}, "crop_size": [24, 20]}, "preprocessor_config.crop_size"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(read: str, config: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        getattr(Preprocess, f"from_{read}")(config)


@pytest.mark.parametrize(
    "given",
    [{"std": [1, 0, 1]}, {"resize": "no"}, {"interpolation": "cubic"}, {"fill": (1, 2, 3)}, {"crop": 0}, {"mean": [1, 2]},
     {"antialias": False, "interpolation": "box"}],
    ids=str,
)  # fmt: skip
def test_fields_are_checked(given: dict) -> None:
    with pytest.raises(ValueError, match=f"expected {next(iter(given))} of a transform"):
        Preprocess(24, **given)
    with pytest.raises(ValueError, match="expected resolution of a transform"):
        Preprocess((24, 0))


def test_transforms_are_compared_printed_and_copied() -> None:
    same = Preprocess.from_open_clip({"size": [32, 32], "mean": list(MEAN), "std": list(STD)})
    assert Preprocess(32) == same and hash(Preprocess(32)) == hash(same) and repr(same) == "Preprocess(32)"
    other = Preprocess.from_timm({"input_size": (3, 20, 30), "crop_pct": 0.9})
    assert other != same and other.size == (20, 30) and other.resized == (22, 33) and other.mean == (0.485, 0.456, 0.406)
    assert eval(repr(other)) == other and pickle.loads(pickle.dumps(other)) == copy.deepcopy(other) == other


def test_the_steps_are_openais() -> None:
    """One by one the values of torchvision's, on images and, as programs that optimise pixels use them, on tensors."""
    theirs = transforms.Compose([
        transforms.Resize(24, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(24),
        lambda image: image.convert("RGB"),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    preprocess = Preprocess(24)
    assert [type(step).__name__ for step in preprocess.transforms] == [
        "Resize", "CenterCrop", "function", "ToTensor", "Normalize",
    ]  # fmt: skip
    assert (preprocess.transforms[0].size, preprocess.transforms[1].size) == (24, (24, 24))
    assert (preprocess.transforms[-1].mean, preprocess.transforms[-1].std) == (MEAN, STD)
    for image in PICTURES:
        ours, reference = image, image
        for step, expected in zip(preprocess.transforms, theirs.transforms, strict=True):
            ours, reference = step(ours), expected(reference)
            assert np.array_equal(np.asarray(ours), np.asarray(reference))
        assert torch.equal(preprocess(image), ours)
    assert transforms.Resize(24, interpolation=BICUBIC)(PICTURES[0]) == preprocess.transforms[0](PICTURES[0])
    assert _convert_image_to_rgb(PICTURES[0]) is not PICTURES[0]
    for pixels in (torch.rand(2, 3, 40, 31, requires_grad=True), torch.rand(3, 24, 24), torch.rand(3, 20, 53)):
        ours = reference = pixels
        for step, expected in zip(
            [*preprocess.transforms[:2], preprocess.transforms[-1]],
            [*theirs.transforms[:2], theirs.transforms[-1]],
            strict=True,
        ):
            ours, reference = step(ours), expected(reference)
            assert torch.equal(ours, reference)
        assert ours.requires_grad == pixels.requires_grad
    whole = (torch.rand(3, 40, 31) * 255).byte()
    assert torch.equal(Resize(24)(whole), functional.resize(whole, 24, transforms.InterpolationMode.BICUBIC))


def test_a_changed_list_of_steps_is_what_runs() -> None:
    preprocess, image = Preprocess(24), PICTURES[0]
    before = preprocess(image)
    preprocess.transforms.insert(0, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert torch.equal(preprocess(image), Preprocess(24)(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    del preprocess.transforms[0]
    assert torch.equal(preprocess(image), before)
    preprocess.transforms[-1].mean = (0.0, 0.0, 0.0)
    assert torch.equal(preprocess(image), Preprocess(24, mean=0)(image))
    del preprocess.transforms[3:]
    assert isinstance(preprocess(image), Image.Image)


@pytest.mark.parametrize("size", [(9_000, 1), (2, 9_000), (9, 700), (700, 9), (500, 500)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_very_long_picture_is_resized_where_it_is_cropped(monkeypatch, size: tuple[int, int], mode: str) -> None:
    """The whole of 60,000 x 1 at a side of 224 would be 3 billion pixels, 12 GB. Of what fits, the same values to 2/255:
    Pillow takes the axes in the order of their sizes, and rounds between them."""
    noise = np.random.default_rng(0).integers(100, 150, (size[1], size[0], 3), np.uint8)
    photo = Image.fromarray(noise).convert(mode)
    for given in ({}, {"crop": 0.875, "rgb_first": True}, {"resize": "longest"}, {"resize": "squash"}, {"round_down": True}):
        transform = Preprocess(32, **given)
        if given.get("resize") == "longest" and max(size) > 32 * min(size):
            with pytest.raises(ValueError, match="keeps a pixel a side"):
                transform(photo)
            continue
        monkeypatch.setattr(module, "MOST", 1 << 40)
        whole = transform(photo)
        monkeypatch.setattr(module, "MOST", 0)
        part = transform(photo)
        assert part.shape == whole.shape == (3, 32, 32)
        assert (part - whole).abs().max() * min(transform.std) <= 2.01 / 255


def test_a_picture_of_one_line_takes_no_gigabytes() -> None:
    assert Preprocess(224)(Image.new("L", (60_000, 1))).shape == (3, 224, 224)
    with pytest.raises(ValueError, match="at most 268,435,456 pixels, got 60000 x 1 to .*; crop it first"):
        Preprocess(224, antialias=False)(Image.new("RGB", (60_000, 1)))
