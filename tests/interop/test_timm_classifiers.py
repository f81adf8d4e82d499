"""Classifiers from MMPretrain's and timm's files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipfast.inputs import Preprocess
from clipfast.inputs.processors import IMAGENET_MEAN, IMAGENET_STD
from clipfast.interop import restore
from clipfast.interop.timm_classifiers import class_names, from_mmpretrain, load_classifier, mmpretrain_model

# patch, side -> parameters in M and multiply-adds in G of MMPretrain's table, and timm's tags of the weights: 14 classifiers.
LAION, LAION12K, OPENAI, OPENAI12K = "laion2b_ft_in1k", "laion2b_ft_in12k_in1k", "openai_ft_in1k", "openai_ft_in12k_in1k"
TABLE = {
    (32, 224): (88.22, 4.36, (LAION12K, LAION, OPENAI)),
    (32, 384): (88.22, 12.66, (LAION12K, OPENAI12K)),
    (32, 448): (88.22, 17.20, (LAION12K,)),
    (16, 224): (86.57, 16.86, (LAION12K, LAION, OPENAI12K, OPENAI)),
    (16, 384): (86.57, 49.37, (LAION12K, LAION, OPENAI12K, OPENAI)),
}
TINY: dict[str, Any] = dict(embed_dim=64, depth=2, num_heads=1, num_classes=7, img_size=64)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's keys -> MMPretrain's."""
    inner = {"norm1": "ln1", "norm2": "ln2", "attn": "attn", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    found = {}
    for key, tensor in state.items():
        key = re.sub(r"^norm_pre\.", "pre_norm.", key)
        key = re.sub(r"^norm\.", "ln1.", key).replace("patch_embed.proj.", "patch_embed.projection.")
        key = re.sub(r"^blocks\.(\d+)\.(norm1|norm2|attn|mlp\.fc.)", lambda m: f"layers.{m[1]}.{inner[m[2]]}", key)
        found[f"head.layers.{key}" if key.startswith("head.") else f"backbone.{key}"] = tensor
    return found


def tiny() -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch32_clip_224", **TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def mmpretrain_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """MMPretrain's VisionTransformer and its head, written out: pre_norm, eps 1e-6, exact GELU, the class token after ln1."""

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"backbone.{key}.weight"], state[f"backbone.{key}.bias"], 1e-6)

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, state[f"{key}.weight"], state[f"{key}.bias"])

    weight = state["backbone.patch_embed.projection.weight"]
    x = F.conv2d(x, weight, stride=weight.shape[2]).flatten(2).transpose(1, 2)
    x = torch.cat([state["backbone.cls_token"].expand(len(x), -1, -1), x], 1) + state["backbone.pos_embed"]
    x = norm(x, "pre_norm")
    for i in range(2):
        layer = f"layers.{i}"
        q, k, v = linear(norm(x, f"{layer}.ln1"), f"backbone.{layer}.attn.qkv").chunk(3, -1)  # one head
        y = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(y, f"backbone.{layer}.attn.proj")
        y = F.gelu(linear(norm(x, f"{layer}.ln2"), f"backbone.{layer}.ffn.layers.0.0"))
        x = x + linear(y, f"backbone.{layer}.ffn.layers.1")
    return linear(norm(x, "ln1")[:, 0], "head.layers.head")


def pixels() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mmpretrains_file(tmp_path, suffix: str) -> None:
    file, timms = tmp_path / f"clip-vit-base-p32{suffix}", tiny()
    with torch.no_grad():  # small states, which tell one eps from another
        for parameter in (timms.patch_embed.proj.weight, timms.cls_token, timms.pos_embed):
            parameter.mul_(1e-3)
    state = renamed(timms.state_dict())
    if suffix == ".pth":
        torch.save({"meta": {"dataset_meta": {"classes": ["a"]}}, "state_dict": state}, file)
    else:
        save_file(state, file)
    model, preprocess = load_classifier(file, "cpu")
    with torch.no_grad():
        expected = mmpretrain_logits(state, pixels())
        assert (model(pixels()) - expected).norm() < 1e-5 * expected.norm()
        assert (timms(pixels()) - expected).norm() > 1e-3 * expected.norm()  # the other eps
    assert not model.training and type(model).__module__ == "timm.models.vision_transformer"
    assert preprocess == Preprocess(64, mean=IMAGENET_MEAN, std=IMAGENET_STD, rgb_first=True)
    assert "forward" in model.__dict__
    model.train()(pixels()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("form", ["folder", "file beside its config", "half", "pth"])
def test_timms_files(tmp_path, form: str) -> None:
    saved = tiny()
    save_for_hf(saved, tmp_path, safe_serialization=True, model_args=TINY)
    file = tmp_path / "model.safetensors"
    if form == "half":
        save_file({k: t.half() for k, t in saved.state_dict().items()}, file)
        saved = saved.half().float()
    if form == "pth":
        file.unlink()
        file = tmp_path / "model_best.pth"
        torch.save({"epoch": 1, "state_dict": saved.state_dict()}, file)
    model, preprocess = load_classifier(tmp_path if form == "folder" else file, "cpu")
    with torch.no_grad():
        expected = saved(pixels())
        assert (model(pixels()) - expected).norm() < 1e-5 * expected.norm()
    told = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert preprocess == Preprocess.from_timm(told) and preprocess.size == (64, 64)
    restore(model)
    assert torch.equal(model(pixels()), saved(pixels()))


def test_a_file_named_as_timm_names_it(tmp_path, monkeypatch) -> None:
    """The model and the transform are those of the name, of which no other file tells."""
    name = f"vit_base_patch32_clip_384.{OPENAI12K}"
    made, create = list[tuple](), timm.create_model
    save_file(tiny().state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(timm, "create_model", lambda name, **o: made.append((name, o)) or create(name, **o | TINY))
    model, preprocess = load_classifier(tmp_path / f"{name}.safetensors", "cpu")
    assert made == [(name, dict(num_classes=1000))]
    assert (preprocess.size, preprocess.resize, preprocess.crop) == ((384, 384), "squash", 0.95)
    assert preprocess.mean == Preprocess(1).mean and model(pixels()).shape == (3, 7)


@pytest.mark.parametrize(("patch", "side"), TABLE)
def test_the_tables_sizes(patch: int, side: int) -> None:
    """Parameters and multiply-adds of the 14 fine-tuned classifiers, of MMPretrain's keys and of timm's names.

    The table counts the products with weights, and not attention's own, L² · C each; and at any size the positions of 224.
    """
    parameters, flops, tags = TABLE[patch, side]
    with torch.device("meta"):
        known = [timm.create_model(f"vit_base_patch{patch}_clip_{side}.{tag}") for tag in tags]
        image = torch.empty(1, 3, side, side)
    made = mmpretrain_model(from_mmpretrain(renamed(known[0].state_dict())))
    for model in (*known, made):
        beyond = 768 * ((side // patch) ** 2 - (224 // patch) ** 2)
        assert round((sum(p.numel() for p in model.parameters()) - beyond) / 1e6, 2) == parameters
        assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in known[0].state_dict().items()}
    assert {b.attn.num_heads for b in made.blocks} == {12} and made.norm.eps == 1e-6 and known[0].norm.eps == 1e-5
    for model in (known[0], made):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(image)
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if op in (torch.ops.aten.addmm, torch.ops.aten.convolution)) / 2
        assert products == pytest.approx(1e9 * flops, rel=1e-3)
        scores = (counter.get_total_flops() / 2) - products
        assert scores == 12 * 2 * ((side // patch) ** 2 + 1) ** 2 * 768


def test_the_14_are_timms() -> None:
    names = [f"vit_base_patch{p}_clip_{s}.{tag}" for (p, s), (*_, tags) in TABLE.items() for tag in tags]
    assert len(names) == 14
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == 1000 and Preprocess.from_timm(cfg.to_dict()).size == tuple(cfg.input_size[1:])


def test_names_of_the_outputs() -> None:
    assert class_names(tiny()) == []
    model = torch.nn.Identity()
    model.num_classes = 1000
    names = class_names(model)
    assert len(names) == 1000 and names == sorted(names) and names[0] == "n01440764"


@pytest.mark.parametrize(
    "case", ["absent", "unknown key", "no pre_norm", "lacking", "other shape", "nameless", "oblong", "damaged"]
)
def test_what_is_no_classifier_is_refused(tmp_path, case: str) -> None:
    state, file = renamed(tiny().state_dict()), tmp_path / "weights.pth"
    message = {
        "absent": "expected a file or folder of weights, or timm's name",
        "unknown key": "got 'backbone.layers.0.attn.gamma1.weight'",
        "no pre_norm": "norm_pre.weight",
        "lacking": r"blocks.1.attn.qkv.bias \[192\], got None \(1 keys differ\)",
        "other shape": r"norm.bias \[64\], got \[63\] \(1 keys differ\)",
        "nameless": "config.json beside it or from the file's name",
        "oblong": "square images",
        "damaged": "download or copy the file again",
    }[case]
    if case == "unknown key":
        state["backbone.layers.0.attn.gamma1.weight"] = torch.ones(1)
    if case == "no pre_norm":
        del state["backbone.pre_norm.weight"], state["backbone.pre_norm.bias"]
    if case == "lacking":
        del state["backbone.layers.1.attn.qkv.bias"]
    if case == "other shape":
        state["backbone.ln1.bias"] = torch.ones(63)
    if case == "oblong":
        state["backbone.pos_embed"] = torch.ones(1, 4, 64)
    torch.save(tiny().state_dict() if case == "nameless" else state, file)
    if case == "damaged":
        Path(file).write_bytes(b"no weights")
    with pytest.raises(FileNotFoundError if case == "absent" else ValueError, match=message):
        load_classifier(tmp_path / "nothing.pth" if case == "absent" else file)
