"""Image classifiers that were fine-tuned from CLIP's image towers, as timm's models: from MMPretrain's and timm's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    import timm
except ImportError as error:
    raise ImportError("expected timm, of which the classifiers are models: pip install timm") from error
from timm.data import ImageNetInfo
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clipfast.files import read_parsed
from clipfast.inputs import Preprocess
from clipfast.inputs.processors import IMAGENET_MEAN, IMAGENET_STD
from clipfast.interop.accelerate import accelerate
from clipfast.weights.files import read
from clipfast.weights.hub import check_repository

LOADING = ("pretrained", "checkpoint", "cache", "pruned")  # beginnings of arguments by which timm would read other files
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of timm's
# MMPretrain's keys -> timm's.
_BLOCK = {"ln1": "norm1", "ln2": "norm2", "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
_NAMES = [
    (re.compile(r"backbone\.layers\.(\d+)\.(ln1|ln2|ffn\.layers\.0\.0|ffn\.layers\.1|attn\.qkv|attn\.proj)\.(\w+)"),
     lambda m: f"blocks.{m[1]}.{_BLOCK.get(m[2], m[2])}.{m[3]}"),
    (re.compile(r"backbone\.(cls_token|pos_embed)"), lambda m: m[1]),
    (re.compile(r"backbone\.patch_embed\.projection\.(\w+)"), lambda m: f"patch_embed.proj.{m[1]}"),
    (re.compile(r"backbone\.pre_norm\.(\w+)"), lambda m: f"norm_pre.{m[1]}"),
    (re.compile(r"backbone\.ln1\.(\w+)"), lambda m: f"norm.{m[1]}"),
    (re.compile(r"head\.layers\.head\.(\w+)"), lambda m: f"head.{m[1]}"),
]  # fmt: skip


def load_classifier(source: str | Path, device: str | torch.device | None = None) -> tuple[nn.Module, Preprocess]:
    """A classifier, images [B, 3, R, R] -> logits [B, classes], accelerated, in float32 and eval mode; and its transform.

    source: a file of MMPretrain's (``backbone.*`` and ``head.layers.head.*``), whose layer norms have an eps of 1e-6 and whose
        images ImageNet's mean and deviation, the shorter side as long as the crop: what MMPretrain's configurations say.
        Or of timm's: a folder or file with timm's config.json beside it, or a file named as timm names the model
        (vit_base_patch32_clip_224.openai_ft_in1k.safetensors). Or such a name alone, or hf-hub:timm/..., which is downloaded.
    device: default: cuda if there is one.

    Raises:
        FileNotFoundError: neither a file nor a name that timm knows weights of.
        ValueError: the file is damaged, or holds something else; what it lacks is named.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in WEIGHTS if (path / name).is_file()), path / WEIGHTS[0])
    if path.is_file():
        model, preprocess = _from_file(path)
    elif str(source).startswith("hf-hub:") or timm.is_model_pretrained(str(source)):
        if str(source).startswith("hf-hub:"):
            check_repository(str(source).removeprefix("hf-hub:"))
        model = timm.create_model(str(source), pretrained=True)
        preprocess = Preprocess.from_timm(model.pretrained_cfg)  # type: ignore[arg-type]
    else:
        expected = "expected a file or folder of weights, or timm's name of a model that has some (timm.list_pretrained())"
        raise FileNotFoundError(f"{expected}, got {str(source)!r}")
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).float().eval()
    accelerate(model)
    return model, preprocess


def class_names(model: nn.Module) -> list[str]:
    """Of a classifier of 1,000 outputs the names of ImageNet-1k's folders in their order, of another none."""
    return ImageNetInfo("imagenet-1k").label_names() if getattr(model, "num_classes", 0) == 1000 else []


def from_mmpretrain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MMPretrain's state dict of a classifier with timm's keys; ValueError names a key that is none of such a model's."""
    found = {}
    for key, tensor in state.items():
        new = next((name(match) for pattern, name in _NAMES if (match := pattern.fullmatch(key))), None)
        if new is None:
            raise ValueError(f"expected the keys of MMPretrain's VisionTransformer with pre_norm and its head, got {key!r}")
        found[new] = tensor
    return found


def _from_file(path: Path) -> tuple[nn.Module, Preprocess]:
    state = read(path).state
    if any(key.startswith("backbone.") for key in state):
        try:
            state = from_mmpretrain(state)
            model: nn.Module = mmpretrain_model(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        size = model.patch_embed.img_size  # type: ignore[union-attr]
        preprocess = Preprocess(size, mean=IMAGENET_MEAN, std=IMAGENET_STD, rgb_first=True)  # type: ignore[arg-type]
    else:
        model, preprocess = _timm_model(path)
    expected = model.state_dict()
    if wrong := sorted(k for k in state.keys() | expected.keys() if _shape(state.get(k)) != _shape(expected.get(k))):
        told = f"{wrong[0]} {_shape(expected.get(wrong[0]))}, got {_shape(state.get(wrong[0]))}"
        raise ValueError(f"{path}: expected the weights of a {type(model).__name__}, {told} ({len(wrong)} keys differ)")
    model.load_state_dict(state, assign=True)
    return model, preprocess


def _shape(tensor: Any) -> list[int] | None:
    return list(tensor.shape) if isinstance(tensor, Tensor) else None


def mmpretrain_model(state: Mapping[str, Tensor]) -> VisionTransformer:
    """The model of a state dict with timm's keys, without its weights (on the meta device): MMPretrain's VisionTransformer.

    Heads are 64 wide and the activation is the exact GELU, as in all of MMPretrain's towers of CLIP; neither can be read from
    the weights.
    """
    lacking = [key for key in ("patch_embed.proj.weight", "pos_embed", "norm_pre.weight", "blocks.0.mlp.fc1.weight",
                               "head.weight") if key not in state]  # fmt: skip
    if lacking:
        raise ValueError(f"expected a classifier fine-tuned from CLIP, {', '.join(lacking)} (timm's names) missing")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    if width % 64 or side**2 + 1 != state["pos_embed"].shape[1]:
        raise ValueError(
            f"expected heads 64 wide and square images, got a width of {width}, {state['pos_embed'].shape[1]} tokens"
        )
    with torch.device("meta"):
        return VisionTransformer(
            img_size=side * patch, patch_size=patch, in_chans=channels, num_classes=len(state["head.weight"]), embed_dim=width,
            depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")), num_heads=width // 64,
            mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width, pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-6),
        )  # fmt: skip


def _timm_model(path: Path) -> tuple[nn.Module, Preprocess]:
    """The model whose weights a file of timm's has, without them, and its transform."""
    beside = path.parent / "config.json"
    config = read_parsed(beside) if beside.is_file() else {}
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        name, config = path.stem, {}
        if not timm.is_model_pretrained(name):
            raise ValueError(
                f"{path}: expected to learn which model and transform this is, from timm's config.json beside it or from the "
                "file's name: call it as timm does, e.g. vit_base_patch32_clip_224.openai_ft_in1k.safetensors"
            )
    known: Any = timm.get_pretrained_cfg(name)
    cfg = config.get("pretrained_cfg") or (config if "input_size" in config else known.to_dict())
    given = config.get("model_args") or {}
    if not isinstance(given, dict) or (wrong := [field for field in given if field.startswith(LOADING)]):
        told = wrong if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{beside}: model_args: expected arguments of the model's shape, got {told}; leave them out")
    options = {"num_classes": config.get("num_classes", known.num_classes)} | given
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    if dict(model.named_buffers()).keys() - model.state_dict().keys():  # numbers that no file has
        model = timm.create_model(name, **options)
    return model, Preprocess.from_timm(cfg)
