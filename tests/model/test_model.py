"""clipfast.CLIP against open_clip's towers on equal random weights: features of all sizes, gradients of small ones."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import Tensor, nn

from bench.rivals import open_clip_model
from clipfast.model import CLIP, MODELS, Bottleneck

END = 49407


def captions(lengths: list[int], context_length: int = 77, seed: int = 0) -> Tensor:
    """[B, context_length] of random ids between start and end token, zero behind."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, 49405, (length,), generator=generator)
        row[0], row[length - 1] = END - 1, END
    return text


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def shake(model: nn.Module, seed: int = 0) -> None:
    """Random values where the initial ones are 0 or 1, so that no parameter and no batch statistic can be ignored."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.ndim == 1 and value.is_floating_point():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value.data = value.data + (noise.abs() if "running_var" in name else noise)
    for name, value in model.named_parameters():
        if name.endswith("bn3.weight"):
            value.data.add_(0.3)


def ours_from(theirs: nn.Module, **sizes: object) -> CLIP:
    """Our model on their weights, without a second random initialisation."""
    with torch.device("meta"):
        model = CLIP(**sizes)
    state = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    model.load_state_dict(state, assign=True)
    return model.train(theirs.training)


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_equal_open_clip(name: str) -> None:
    config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    config["quick_gelu"] = True
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config).eval()
    shake(theirs)
    ours = ours_from(theirs, **MODELS[name])
    side = MODELS[name]["image_resolution"]
    image, text = torch.randn(1, 3, side, side), captions([3, 12, 77])
    with torch.no_grad():
        assert relative(ours.encode_image(image), theirs.encode_image(image)) < 1e-5
        assert relative(ours.encode_text(text), theirs.encode_text(text)) < 1e-5


SMALL = {
    "vit": dict(embed_dim=32, image_resolution=32, vision_layers=3, vision_width=128, vision_patch_size=8),
    "resnet": dict(embed_dim=32, image_resolution=64, vision_layers=(1, 2, 1, 1), vision_width=16, vision_patch_size=None),
    "resnet to one place": dict(
        embed_dim=32, image_resolution=32, vision_layers=(1, 1, 1, 2), vision_width=16, vision_patch_size=None
    ),
}
TEXT = dict(context_length=20, vocab_size=49408, transformer_width=128, transformer_heads=2, transformer_layers=3)


def small_pair(family: str, dtype: torch.dtype = torch.float32, quick_gelu: bool = True) -> tuple[CLIP, nn.Module]:
    """A small model of ours and open_clip's on the same weights."""
    torch.manual_seed(0)
    sizes = SMALL[family] | TEXT | dict(quick_gelu=quick_gelu)
    theirs = open_clip_model(sizes, CLIP(**sizes).state_dict())
    shake(theirs)
    theirs = theirs.to(dtype)
    return ours_from(copy.deepcopy(theirs), **sizes), theirs


def small_batch(family: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    side = SMALL[family]["image_resolution"]
    image = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return image, captions([3, 2, 20, 7, 7, 11], 20)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("family", SMALL)
def test_every_gradient_equals_open_clip(family: str, quick_gelu: bool) -> None:
    ours, theirs = small_pair(family, torch.float64, quick_gelu)
    image, text = small_batch(family, torch.float64)
    upstream = torch.randn(2, 6, 32, dtype=torch.float64)
    for model in (ours, theirs):
        features = torch.stack([model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)])
        (features * upstream).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name == "logit_scale":
            continue
        assert parameter.grad is not None, f"{name} got no gradient"
        scale = expected[name].grad.norm()
        assert (parameter.grad - expected[name].grad).norm() <= 1e-10 * scale + 1e-12, name


@pytest.mark.parametrize("family", SMALL)
def test_forward_gives_openai_logits(family: str) -> None:
    ours, theirs = (model.eval() for model in small_pair(family))
    image, text = small_batch(family)
    with torch.no_grad():
        logits_per_image, logits_per_text = ours(image, text)
        image_features, text_features, scale = theirs(image, text)
    assert relative(logits_per_image, scale * image_features @ text_features.T) < 1e-5
    assert torch.equal(logits_per_image.T, logits_per_text)


def test_text_needs_no_padding_and_ignores_what_follows_the_end() -> None:
    ours, theirs = (model.eval() for model in small_pair("vit"))
    _, text = small_batch("vit")
    lengths = text.argmax(dim=-1) + 1
    dirty = text.clone()
    dirty[dirty == 0] = 5
    with torch.no_grad():
        features = ours.encode_text(text)
        assert relative(features, theirs.encode_text(text)) < 1e-5
        assert torch.equal(features, ours.encode_text(text.int(), lengths=lengths.tolist()))
        assert torch.equal(features, ours.encode_text(dirty, lengths=lengths))
        assert relative(ours.encode_text(text[:2, :5]), features[:2]) < 1e-5
        assert ours.encode_text(text[:0]).shape == (0, 32)


@pytest.mark.parametrize("family", SMALL)
def test_intermediates_agree_with_the_short_cut(family: str) -> None:
    ours, theirs = (model.eval() for model in small_pair(family))
    image, text = small_batch(family)
    with torch.no_grad():
        out = ours.forward_intermediates(image, text)
        expected = theirs.forward_intermediates(image, text)
        assert relative(out["image_features"], ours.encode_image(image, normalize=True)) < 1e-5
        assert relative(out["text_features"], ours.encode_text(text, normalize=True)) < 1e-5
    for name in ("image_intermediates", "text_intermediates"):
        for got, state in zip(out[name], expected[name], strict=True):
            assert relative(got, state) < 1e-5


INTERMEDIATES = [
    dict(image_indices=2, text_indices=[0, -1], normalize=False),
    dict(image_output_extra_tokens=True, normalize_intermediates=True),
    dict(image_output_fmt="NLC", intermediates_only=True),
    dict(output_logits=True, output_logit_scale_bias=True, image_indices=[1]),
]


@pytest.mark.parametrize("options", INTERMEDIATES, ids=lambda options: ", ".join(options))
def test_intermediates_take_open_clips_arguments(options: dict) -> None:
    ours, theirs = (model.eval() for model in small_pair("vit"))
    image, text = small_batch("vit")
    with torch.no_grad():
        got, expected = (model.forward_intermediates(image, text, **options) for model in (ours, theirs))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        pairs = zip(got[name], value, strict=True) if isinstance(value, list) else [(got[name], value)]
        assert all(g.shape == e.shape and relative(g, e) < 1e-5 for g, e in pairs), name


def test_intermediates_refuse_what_is_not_there() -> None:
    ours, (image, text) = small_pair("vit")[0], small_batch("vit")
    for options, match in (
        (dict(image_indices=4), "indices among 3 blocks, got 4"),
        (dict(text_indices=[3]), r"among 3 blocks, got \[3\]"),
        (dict(image_output_fmt="NHWC"), "image_output_fmt NCHW"),
        (dict(text_output_fmt="NCHW"), "text_output_fmt NLC"),
        (dict(intermediates_only=True, output_logits=True), "features for logits"),
    ):
        with pytest.raises(ValueError, match=match):
            ours.forward_intermediates(image, text, **options)


def test_open_clips_calls() -> None:
    """Which weights learn, what is not decayed, and what a forward pass gives, as open_clip's class has them."""
    for family, groups in (("vit", (0, 1, 3, 5)), ("resnet", (0,))):
        for n in groups:
            ours, theirs = small_pair(family)
            for model in (ours, theirs):
                model.lock_image_tower(n, freeze_bn_stats=True)
                model.lock_text_tower(unlocked_layers=n)
                model.train()
            learning = {name for name, p in theirs.named_parameters() if p.requires_grad}
            assert {name for name, p in ours.named_parameters() if p.requires_grad} == learning
            assert not any(m.training for m in ours.visual.modules() if isinstance(m, nn.BatchNorm2d))
        assert ours.no_weight_decay() == theirs.no_weight_decay()
        assert ours.visual.image_size == theirs.visual.image_size
        ours.eval(), theirs.eval()
        image, text = small_batch(family)
        with torch.no_grad():
            for got, expected in zip(ours.get_logits(image, text), theirs.get_logits(image, text), strict=True):
                assert relative(got, expected) < 1e-5
            ours.output_dict = theirs.output_dict = True
            for given in (dict(image=image, text=text), dict(text=text), dict(image=image)):
                got, expected = ours(**given), theirs(**given)
                assert got.keys() == expected.keys()
                assert all(got[k] is None if v is None else relative(got[k], v) < 1e-5 for k, v in expected.items())


def test_a_bias_of_the_logits() -> None:
    model, (image, text) = CLIP(**SMALL["vit"], **TEXT, logit_bias=-10).eval(), small_batch("vit")
    plain = copy.deepcopy(model)
    plain.logit_bias = None
    with torch.no_grad():
        assert relative(model(image, text)[0] + 10, plain(image, text)[0]) < 1e-5
        model.output_dict = True
        assert model(image, text)["logit_bias"] is model.logit_bias


@pytest.mark.parametrize("family", SMALL)
def test_initial_weights_follow_the_paper_code(family: str) -> None:
    """Spread of every matrix as open_clip's (which keeps OpenAI's initialisation), within the noise of a sample."""
    torch.manual_seed(0)
    ours, theirs = CLIP(**SMALL[family], **TEXT), small_pair(family)[1]
    for name, parameter in ours.named_parameters():
        if parameter.ndim > 1:
            assert torch.isclose(parameter.std(), dict(theirs.named_parameters())[name].std(), rtol=0.15), name
    assert torch.isclose(ours.logit_scale.exp(), torch.tensor(1 / 0.07))
    if family != "vit":
        assert all(not m.bn3.weight.any() for m in ours.visual.modules() if isinstance(m, Bottleneck))


def test_batch_statistics_equal_open_clip() -> None:
    """A training pass in fp32 moves the same running averages, and the mode for inference uses them."""
    ours, theirs = small_pair("resnet")
    image, _ = small_batch("resnet")
    with torch.no_grad():
        assert relative(ours.train().encode_image(image), theirs.train().encode_image(image)) < 1e-5
        expected = dict(theirs.named_buffers())
        for name, buffer in ours.named_buffers():
            assert relative(buffer, expected[name]) < 1e-5, name
        assert relative(ours.eval().encode_image(image), theirs.eval().encode_image(image)) < 1e-5


def test_low_precision_copy_and_state_round_trip() -> None:
    ours, _ = small_pair("vit")
    image, text = small_batch("vit")
    with torch.no_grad():
        expected = ours.encode_image(image), ours.encode_text(text)
        twin = copy.deepcopy(ours)
        twin.load_state_dict(ours.state_dict())
        assert torch.equal(twin.encode_text(text), expected[1])
        for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
            low = copy.deepcopy(ours).to(dtype)
            assert low.encode_image(image).dtype == low.encode_text(text).dtype == low.dtype == dtype
            assert relative(low.encode_image(image), expected[0]) < bound
            assert relative(low.encode_text(text), expected[1]) < bound
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(ours.encode_image(image), expected[0]) < 0.05
            assert relative(ours.encode_text(text), expected[1]) < 0.05


@pytest.mark.parametrize("family", SMALL)
def test_pixels_may_lie_anyhow(family: str) -> None:
    """Layouts, floating types, batches of one and none; a margin narrower than a patch is not seen, as by a convolution."""
    ours, _ = (model.eval() for model in small_pair(family))
    image, _ = small_batch(family)
    with torch.no_grad():
        expected = ours.encode_image(image)
        apart = image.repeat(1, 1, 1, 2)[..., : image.shape[3]]
        for other in (image.mT.contiguous().mT, image.to(memory_format=torch.channels_last), apart, image.double()):
            assert relative(ours.encode_image(other), expected) < 1e-6
        assert relative(ours.encode_image(image[3:4].expand(2, -1, -1, -1)), expected[[3, 3]]) < 1e-6
        assert relative(ours.encode_image(image.half()), expected) < 1e-3
        assert ours.encode_image(image[:0], normalize=True).shape == (0, 32)
        assert ours.encode_image(torch.full_like(image[:1], torch.nan)).isnan().all()
        assert relative(ours.to(memory_format=torch.channels_last).encode_image(image), expected) < 1e-6
        if family == "vit":
            sizes = SMALL["vit"] | TEXT | dict(image_resolution=30)
            theirs = open_clip_model(sizes, CLIP(**sizes).state_dict()).eval()
            image = image[..., :30, :30]
            assert relative(ours_from(theirs, **sizes).encode_image(image), theirs.encode_image(image)) < 1e-5


def test_token_ids_of_any_integers() -> None:
    ours = small_pair("vit")[0].eval()
    text = captions([3, 20, 7], 20)
    with torch.no_grad():
        expected = ours.encode_text(text)
        for dtype in (torch.int32, torch.uint16, torch.uint32, torch.uint64):
            assert torch.equal(ours.encode_text(text.to(dtype)), expected), dtype
        short = torch.tensor([[3, END % 120, 0]])  # of another vocabulary, whose last id fits into a byte
        small = CLIP(**SMALL["vit"], **{**TEXT, "vocab_size": END % 120 + 1}).eval()
        for dtype in (torch.int8, torch.uint8, torch.int16):
            assert torch.equal(small.encode_text(short.to(dtype)), small.encode_text(short)), dtype
        for length in range(2, 21):  # the columns behind the end need not be there
            text = captions([length], 20)
            assert torch.equal(ours.encode_text(text[:, :length]), ours.encode_text(text))


def test_wrong_input_is_named() -> None:
    ours, _ = small_pair("vit")
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 32, 32\], got \[1, 3, 40, 40\]"):
        ours.encode_image(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match=r"L ≤ 20\], got \[1, 21\]"):
        ours.encode_text(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(TypeError, match="integer token ids, got torch.float32"):
        ours.encode_text(torch.zeros(1, 20))
    with pytest.raises(ValueError, match="expected 2 lengths"):
        ours.encode_text(torch.zeros(2, 20, dtype=torch.int64), lengths=[3])
    with pytest.raises(ValueError, match="vision_patch_size"):
        CLIP(**{**SMALL["vit"], "vision_patch_size": None}, **TEXT)


def test_lengths_from_the_host_spare_the_device_a_wait() -> None:
    """A meta tensor has no values: whatever would be read from the device fails there."""
    ours, text = small_pair("vit")[0].to("meta"), captions([3, 20, 7], 20)
    assert ours.encode_text(text.to("meta"), lengths=[3, 20, 7], normalize=True).shape == (3, 32)
    with pytest.raises(NotImplementedError, match="meta"):
        ours.encode_text(text.to("meta"))


def test_what_is_no_input_is_named() -> None:
    """Types and sizes that would else fail somewhere inside, or give features of something else."""
    ours, _ = small_pair("vit")
    pixels, text = torch.zeros(2, 3, 32, 32), captions([3, 5], 20)
    for wrong, got in (
        (pixels.byte(), "torch.uint8"),
        (pixels.to(torch.complex64), "torch.complex64"),
        (pixels.numpy(), "ndarray"),
        (["cat.jpg"], "list"),
    ):
        with pytest.raises(TypeError, match=rf"floating tensor \[B, 3, 32, 32\], got {got}; see preprocess"):
            ours.encode_image(wrong)
    for wrong in (["a dog"], text.numpy(), ours.pack(text)):
        with pytest.raises(TypeError, match=f"tensor of token ids .* got {type(wrong).__name__}; see tokenize"):
            ours.pack(wrong)
    for dtype in (torch.bool, torch.complex64, torch.float64):
        with pytest.raises(TypeError, match=f"integer token ids, got {dtype}"):
            ours.encode_text(text.to(dtype))
    with pytest.raises(ValueError, match=r"\[B, 1 ≤ L ≤ 20\], got \[2, 0\]"):
        ours.encode_text(text[:, :0])
    with pytest.raises(ValueError, match=r"expected 2 lengths, integers, got \[2\] of torch.float32"):
        ours.encode_text(text, lengths=[2.5, 5.0])


@pytest.mark.parametrize(
    "family, name, got, expected",
    [
        ("vit", "vision_heads", 7, "a divisor of 128"),
        ("vit", "transformer_heads", 3, "a divisor of transformer_width, 128"),
        ("vit", "vision_width", 48, "vision_heads to be a divisor of 48, the width of its attention, got 0"),
        ("vit", "vision_patch_size", 64, "1 to 32"),
        ("vit", "vision_layers", 0, "a depth"),
        ("vit", "transformer_layers", 0, "a positive number"),
        ("resnet", "vision_layers", (1, 1, 1), "a ResNet's four"),
        ("resnet", "image_resolution", 16, "at least 32 for a ResNet"),
    ],
)
def test_sizes_that_make_no_model_are_named(family: str, name: str, got: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CLIP(**(SMALL[family] | TEXT | {name: got}))
