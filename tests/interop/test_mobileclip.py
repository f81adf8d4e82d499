"""MobileCLIP against its definition, with its branches apart, and against open_clip's and timm's own models."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.layers import LayerNorm2d
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from torch import Tensor, nn

import clipfast
from clipfast.interop import accelerate, mobileclip

L, VOCAB, WIDTH, EMBED = 20, 60, 64, 32
TEXT = dict(context_length=L, vocab_size=VOCAB, width=WIDTH, heads=8, layers=2)


# ---- Apple's text tower of S0 as it is trained; the names are those of its checkpoint


class Branches(nn.Module):
    """The sum of batch norms of what is convolved and of what is not."""

    def __init__(self, width: int, kernel: int, convolved: bool) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(width)
        self.rbr_conv = nn.ModuleList([convolution(width, kernel)] if convolved else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_skip(x) + sum(branch(x) for branch in self.rbr_conv)


def convolution(width: int, kernel: int) -> nn.Module:
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width, bias=False))
    block.add_module("bn", nn.BatchNorm2d(width))
    return block


class RepMixer(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.token_mixer, self.convffn = nn.Module(), nn.Module()
        self.token_mixer.norm, self.token_mixer.mixer = Branches(width, kernel, False), Branches(width, kernel, True)
        self.token_mixer.layer_scale = nn.Parameter(torch.empty(width, 1, 1))
        self.convffn.conv = convolution(width, kernel)
        self.convffn.fc1, self.convffn.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.layer_scale = nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1)[:, :, None]
        mixer, ffn = self.token_mixer, self.convffn
        x = x + mixer.layer_scale * (mixer.mixer(x) - mixer.norm(x))
        x = x + self.layer_scale * ffn.fc2(F.gelu(ffn.fc1(ffn.conv(x))))
        return x[:, :, 0].permute(0, 2, 1)


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        attention = nn.Module()
        attention.qkv_proj, attention.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(width), attention)
        mlp = nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width)
        self.pre_norm_ffn = nn.Sequential(nn.LayerNorm(width), *mlp)

    def forward(self, x: Tensor) -> Tensor:
        norm, attention = self.pre_norm_mha
        q, k, v = attention.qkv_proj(norm(x)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + attention.out_proj((scores @ v).transpose(1, 2).flatten(2))
        return x + self.pre_norm_ffn(x)


class MCT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(VOCAB, WIDTH)
        self.positional_embedding = nn.Module()
        self.positional_embedding.pos_embed = nn.Module()
        self.positional_embedding.pos_embed.pos_embed = nn.Parameter(torch.empty(1, 1, L, WIDTH))
        blocks = RepMixer(WIDTH, 11), Encoder(WIDTH), Encoder(WIDTH), RepMixer(WIDTH, 11)
        self.transformer, self.final_layer_norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.projection_layer = nn.Parameter(torch.empty(WIDTH, EMBED))

    def forward(self, text: Tensor) -> Tensor:
        places = self.positional_embedding.pos_embed.pos_embed
        if text.shape[1] != L:
            places = F.interpolate(places, (text.shape[1], WIDTH), mode="bilinear")
        x = self.embedding_layer(text) + places[0]
        for block in self.transformer:
            x = block(x)
        return self.final_layer_norm(x)[range(len(text)), text.argmax(-1)] @ self.projection_layer


def apples(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of timm's fastvit_mci0 under the names of Apple's first layout."""
    places = {"0.blocks": 0, "1.downsample": 1, "1.blocks": 2, "2.downsample": 3, "2.blocks": 4, "3.downsample": 5,
              "3.pos_emb": 6, "3.blocks": 7}  # fmt: skip
    out = {}
    for name, tensor in trunk.items():
        name = re.sub(r"stages\.(\d\.[a-z_]+)", lambda found: f"network.{places[found[1]]}", name)
        for ours, theirs in (
            ("stem", "patch_embed"), ("final_conv", "conv_exp"), ("conv_kxk", "rbr_conv"), ("conv_scale", "rbr_scale"),
            ("identity", "rbr_skip"), ("large_conv", "lkb_origin"), ("mlp", "convffn"), (".gamma", ""), ("pos_enc", "pe"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        name = re.sub(r"(conv_exp\.se)\.fc(\d)", lambda found: f"{found[1]}.{'reduce' if found[2] == '1' else 'expand'}", name)
        if name == "head.fc.weight":
            out["image_encoder.model.head.proj"] = tensor.T
        elif name != "head.fc.bias":
            out[f"image_encoder.model.{name}"] = tensor
    return out


# ----


def shaken(model: Any) -> Any:
    """Weights at which every branch, norm and scale counts."""
    generator = torch.Generator().manual_seed(0)
    statistics = [(name, tensor) for name, tensor in model.named_buffers() if "running_" in name]
    for name, tensor in [*model.named_parameters(), *statistics]:
        random = torch.randn(tensor.shape, generator=generator)
        if "running_var" in name:
            tensor.data = 0.5 + random.abs()
        elif tensor.ndim > 1 and "scale" not in name and "gamma" not in name:
            tensor.data = random * tensor[0].numel() ** -0.5
        elif tensor.ndim:
            tensor.data = 0.3 * random + (1 if name.endswith("weight") else 0)
    return model.eval()


def texts(length: int = L) -> Tensor:
    ids = torch.randint(1, VOCAB - 1, (3, length), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([4, length - 1, 9])
    ids[range(3), ends] = VOCAB - 1
    return ids.masked_fill(torch.arange(length) > ends[:, None], 0)


def images(side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def equal(got: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def as_exact(got: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Ours is as near to the float64 truth as theirs: a deep sum of convolutions is off by 2e-6 to 4e-6 in either."""
    errors = [(features.double() - truth).norm() / truth.norm() for features in (got, theirs)]
    assert errors[0] < 3 * errors[1], f"relative error {errors[0]:.1e}, theirs {errors[1]:.1e}"


def open_clip_model(name: str, meta: bool = False, **text: Any) -> Any:
    config = copy.deepcopy(open_clip.get_model_config(name))
    config.pop("custom_text")
    config["text_cfg"] |= text
    with torch.device("meta" if meta else "cpu"):
        return open_clip.CustomTextCLIP(**config).eval()


@pytest.fixture(scope="module")
def s0() -> tuple[Any, MCT, dict[str, Tensor]]:
    torch.manual_seed(0)
    trunk = shaken(timm.create_model("fastvit_mci0", num_classes=EMBED))
    nn.init.zeros_(trunk.head.fc.bias)
    text = shaken(MCT())
    state = apples(trunk.state_dict()) | {f"text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    return trunk, text, state | {"logit_scale": torch.tensor(3.0)}


@torch.inference_mode()
def test_s0_is_what_its_definition_gives(s0: Any, tmp_path: Path) -> None:
    trunk, text, state = s0
    torch.save(state, tmp_path / "mobileclip_s0.pt")
    model = mobileclip.load(tmp_path / "mobileclip_s0.pt", "MobileCLIP-S0")
    equal(model.encode_image(images()), trunk(images()))
    equal(model.encode_text(texts()), text(texts()))
    equal(model.encode_text(texts(12)), text(texts(12)))  # their positions are stretched
    equal(model.encode_text(texts(), lengths=[5, L, 10]), text(texts()))
    of_images, of_texts = model(images(), texts())
    expected = F.normalize(trunk(images()), dim=-1) @ F.normalize(text(texts()), dim=-1).T * torch.tensor(3.0).exp()
    equal(of_images, expected)
    equal(of_texts, expected.T)
    equal(copy.deepcopy(model).encode_image(images(), normalize=True), F.normalize(trunk(images()), dim=-1))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 2  # before the two blocks of attention
    given = {tensor.data_ptr() for tensor in state.values()}
    assert not given & {parameter.data_ptr() for parameter in mobileclip.load(state).parameters()}


@torch.inference_mode()
def test_mobileclip2_is_open_clips() -> None:
    theirs = shaken(open_clip_model("MobileCLIP2-S0", **TEXT))
    ours = mobileclip.load({f"module.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert ours.names == ("MobileCLIP2-S0",)
    features = theirs.encode_image(images()), theirs.encode_text(texts())
    truth = copy.deepcopy(theirs).double().encode_image(images().double())
    as_exact(ours.encode_image(images()), features[0], truth)
    equal(ours.encode_text(texts()), features[1])
    folded = mobileclip.reparameterize(theirs)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in theirs.parameters())
    mobileclip.reparameterize(folded, inplace=True)  # once more: nothing is left to do
    accelerate(folded)
    as_exact(folded.encode_image(images()), features[0], truth)
    equal(folded.encode_text(texts()), features[1])
    assert torch.equal(theirs.encode_image(images()), features[0])  # and theirs is as it was


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B", "MobileCLIP2-S3", "MobileCLIP2-S4",
                                  "MobileCLIP2-L-14"])  # fmt: skip
@torch.inference_mode()
def test_the_larger_ones_are_open_clips(name: str) -> None:
    heads = open_clip.get_model_config(name)["text_cfg"]["heads"]
    theirs = shaken(open_clip_model(name, **TEXT | dict(width=heads * 8, heads=heads)))
    ours, x = mobileclip.load(theirs.state_dict(), name), images(64 if "-S" in name else 224)
    # Of S1 open_clip's own error against float64 is 6e-6, at these weights.
    equal(ours.encode_image(x), theirs.encode_image(x), 3e-5)
    equal(ours.encode_text(texts()), theirs.encode_text(texts()))


# Millions of parameters of the image and the text tower, by Apple's table, which has 304.3 for L-14: open_clip's has 304.0.
SIZES = {  # of each architecture one
    "MobileCLIP-S1": (21.5, 63.4), "MobileCLIP-S2": (35.7, 63.4), "MobileCLIP-B": (86.3, 63.4), "MobileCLIP2-S0": (11.4, 63.4),
    "MobileCLIP2-S3": (125.1, 123.6), "MobileCLIP2-S4": (321.6, 123.6), "MobileCLIP2-L-14": (304.0, 123.6),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_transforms(name: str) -> None:
    theirs = open_clip_model(name, meta=True)
    model = mobileclip.load(theirs.state_dict(), name)
    counts = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (model.visual, model.text)]
    assert counts == pytest.approx(SIZES[name], abs=0.11)
    assert model.context_length == 77 and model.visual.output_dim == theirs.text.output_dim
    assert model.text.causal is (theirs.text.attn_mask is not None)
    preprocess_cfg = next(iter(open_clip.pretrained._PRETRAINED[name].values()))
    told = {key: preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    transform = image_transform_v2(PreprocessCfg(size=theirs.visual.image_size, **told), is_train=False)
    assert torch.equal(model.preprocess(image), transform(image))


def test_parameters_of_s0() -> None:
    with torch.device("meta"):
        tower = mobileclip.MixerText(49408, 77, 512, 8, 4, 512, 11, 2048)
        trunk = timm.create_model("fastvit_mci0", num_classes=512)
    counts = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (trunk, tower)]
    assert counts == pytest.approx((11.4, 42.4), abs=0.05)


def test_the_tokenizer_is_open_clips(s0: Any) -> None:
    captions = ["a dog", "two cats, on a mat"]
    theirs = open_clip.get_tokenizer("MobileCLIP-S1")(captions, context_length=L)
    assert torch.equal(mobileclip.load(s0[2]).tokenizer(captions).long(), theirs)


def test_b_in_apples_layout_has_apples_padding_and_eps() -> None:
    """timm's model has neither, and gives other features for the same weights."""
    trunk = open_clip_model("MobileCLIP-B", meta=True).visual.trunk.state_dict()
    image = {}
    for name, tensor in trunk.items():
        for ours, theirs in (
            ("patch_embed.backbone", "patch_emb"), ("conv.", "block.conv."), ("bn.", "block.norm."),
            ("blocks.", "transformer."), ("norm1", "pre_norm_mha.0"), ("attn.qkv", "pre_norm_mha.1.qkv_proj"),
            ("attn.proj", "pre_norm_mha.1.out_proj"), ("norm2", "pre_norm_ffn.0"), ("mlp.fc1", "pre_norm_ffn.1"),
            ("mlp.fc2", "pre_norm_ffn.4"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        name = "post_transformer_" + name if name.startswith("norm.") else name
        if name == "pos_embed":
            name, tensor = "pos_embed.pos_embed.pos_embed", tensor[None]
        if name == "head.weight":
            name, tensor = "classifier.proj", tensor.T
        image[f"image_encoder.model.{name}"] = tensor
    del image["image_encoder.model.head.bias"]
    with torch.device("meta"):
        text = MCT()
    text.transformer = text.transformer[1:3]
    text_state = {f"text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    scale = torch.zeros((), device="meta")
    image["image_encoder.model.classifier.proj"] = torch.empty(768, EMBED, device="meta")
    model = mobileclip.load(image | text_state | {"logit_scale": scale})
    assert model.names[0] == "MobileCLIP-B" and model.text.causal and len(model.text.transformer.resblocks) == 2
    trunk = model.visual.trunk
    assert trunk.patch_embed.backbone[0].conv.padding == (1, 1)
    assert {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    assert model.visual(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, EMBED)


TINY = dict(layers=(1, 1, 1, 1), embed_dims=(32, 32, 64, 64), mlp_ratios=(2,) * 4, num_classes=8,
            token_mixers=("repmixer", "repmixer", "attention", "attention"), lkc_use_act=True,
            pos_embs=(None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))))  # fmt: skip


@pytest.mark.parametrize("options", [
    dict(se_downsamples=(False, False, True, True)),
    dict(norm_layer=partial(LayerNorm2d, eps=1e-5), stem_use_scale_branch=False, downsamples=(False, True, True, True)),
    dict(layer_scale_init_value=None),
])  # fmt: skip
def test_reparameterised_is_equal(options: dict[str, Any]) -> None:
    model = shaken(FastVit(**TINY | options)).double()
    folded = mobileclip.reparameterize(model)
    names = " ".join(folded.state_dict())
    assert all(gone not in names for gone in ("conv_kxk", "identity", "conv_scale", "small_conv", ".bn.", "gamma", "pos_enc"))
    equal(folded(images().double()), model(images().double()), 1e-12)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in folded.parameters())
    half = mobileclip.reparameterize(copy.deepcopy(model).bfloat16().requires_grad_(False), inplace=True)
    assert not any(p.requires_grad or p.dtype != torch.bfloat16 for p in half.parameters())


def test_a_model_that_trains_is_not_reparameterised() -> None:
    with pytest.raises(ValueError, match=r"eval mode.*call model\.eval\(\)"):
        mobileclip.reparameterize(FastVit(**TINY).train())
    with pytest.raises(TypeError, match="nn.Module"):
        mobileclip.reparameterize({})  # type: ignore[arg-type]


def without(state: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize("fault, expected", [
    ({}, "not a MobileCLIP"),
    (lambda state: without(state, "image_encoder.model.network.7.1."), "not a MobileCLIP .its image tower has 19 blocks"),
    (lambda state: without(state, "text_encoder.transformer.3.convffn.fc1"), "lacks text_encoder.*3.convffn.fc1.weight"),
    (lambda state: without(state, "text_encoder.transformer.2.pre_norm_mha.0"), "text tower is not that of MobileCLIP-S0"),
    (lambda state: without(state, "image_encoder.model.conv_exp.se"), "image tower is not timm"),
    (lambda state: without(state, "logit_scale"), "lacks logit_scale"),
    (lambda state: state | {"head.weight": torch.ones(1)}, "has head.weight too"),
    (lambda state: state | {"epoch": 3}, "expected tensors, got int at epoch"),
    (lambda state: state | {"visual.trunk.stem.0.reparam_conv.weight": torch.ones(1)}, "is reparameterised already"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(s0: Any, fault: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        mobileclip.load(fault(s0[2]) if callable(fault) else fault)
    assert "\n" not in str(caught.value)


def test_clipfast_load_says_what_loads_it(s0: Any, tmp_path: Path) -> None:
    torch.save(s0[2], tmp_path / "mobileclip_s0.pt")
    with pytest.raises(ValueError, match=r"loaded by clipfast\.interop\.mobileclip\.load\(path\)"):
        clipfast.load(tmp_path / "mobileclip_s0.pt")


def test_names_and_files(s0: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a name of MobileCLIP-B, .*got 'S0'"):
        mobileclip.load(s0[2], "S0")
    with pytest.raises(ValueError, match="expected MobileCLIP2-S0, got a checkpoint of MobileCLIP-S0"):
        mobileclip.load(s0[2], "MobileCLIP2-S0")
    with pytest.raises(FileNotFoundError, match="expected one file of weights"):
        mobileclip.load(tmp_path)
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged\.pt: expected"):
        mobileclip.load(tmp_path)
    model = mobileclip.load(s0[2])
    with pytest.raises(ValueError, match=r"expected floating images \[B, 3, 256, 256\], got \[3, 8, 8\]"):
        model.encode_image(torch.ones(3, 8, 8))
    with pytest.raises(TypeError, match="expected a tensor of integer token ids"):
        model.encode_text(torch.ones(1, 77))
