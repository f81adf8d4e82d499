"""Apple's MobileCLIP and MobileCLIP2: loaded, reparameterised, with timm's image towers and our text towers.

    model = clipfast.interop.mobileclip.load("mobileclip_s0.pt")
    images, texts = model.preprocess([...]), model.tokenizer([...])
    features = model.encode_image(images, normalize=True)

``reparameterize`` does the same to a model of open_clip's or timm's that is there already.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

try:
    import timm
    from timm.layers import ConvNormAct
    from timm.models import fastvit, vision_transformer_hybrid
except ImportError as error:
    raise ImportError(f"MobileCLIP's image towers are timm's: pip install 'timm>=1.0.20' ({error})") from error

from clipfast.inputs import Preprocess
from clipfast.inputs.hf_tokenizer import Truncating
from clipfast.interop.accelerate import accelerate
from clipfast.interop.mobileclip_text import MixerText, State, renamed
from clipfast.model import CLIP
from clipfast.weights import files, from_tensors

_PLAIN = Preprocess(256, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
_PLAIN_224 = Preprocess(224, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")


class Architecture(NamedTuple):
    """What a checkpoint holds; models of one architecture have one transform too."""

    names: tuple[str, ...]
    trunk: str  # timm's name
    stem: int  # channels that the image tower's first convolution gives
    depth: int  # blocks of the image tower
    heads: int  # of the text tower
    preprocess: Preprocess
    causal: bool = False
    mixers: bool = False  # whether the text tower is 'mct'


ARCHITECTURES = (
    Architecture(("MobileCLIP-S0",), "fastvit_mci0", 64, 20, 8, _PLAIN, mixers=True),
    Architecture(("MobileCLIP2-S0",), "fastvit_mci0", 64, 20, 8, _PLAIN),
    Architecture(("MobileCLIP-S1",), "fastvit_mci1", 64, 40, 8, _PLAIN),
    Architecture(("MobileCLIP-S2", "MobileCLIP2-S2"), "fastvit_mci2", 80, 44, 8, _PLAIN),
    Architecture(("MobileCLIP-B", "MobileCLIP2-B"), "vit_base_mci_224", 192, 12, 8, _PLAIN_224, causal=True),
    Architecture(("MobileCLIP2-S3", "MobileCLIP-S3"), "fastvit_mci3", 96, 44, 12, Preprocess(256, interpolation="bilinear")),
    Architecture(("MobileCLIP2-S4", "MobileCLIP-S4"), "fastvit_mci4", 128, 46, 12, Preprocess(256, interpolation="bilinear")),
    Architecture(("MobileCLIP2-L-14", "MobileCLIP-L-14"), "vit_large_patch14_clip_224", 1024, 24, 12, Preprocess(224)),
)  # fmt: skip
_ALL = ", ".join(sorted(name for one in ARCHITECTURES for name in one.names))
_FIRST = "image_encoder.model."  # of Apple's first layout


class Trunk(nn.Module):
    """An image tower of timm under open_clip's name for it."""

    def __init__(self, trunk: Any, resolution: int) -> None:
        super().__init__()
        self.trunk, self.input_resolution, self.output_dim = trunk, resolution, trunk.num_classes

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(image)


class MobileCLIP(nn.Module):
    """Two towers and a temperature. The keys are open_clip's, but where branches became one convolution.

    Attributes:
        preprocess: images -> what ``encode_image`` takes.
        tokenizer: texts -> what ``encode_text`` takes: 77 token ids, padded with zeros; what is too long is cut.
    """

    def __init__(self, architecture: Architecture, trunk: nn.Module, text: CLIP | MixerText) -> None:
        super().__init__()
        self.names, self.preprocess = architecture.names, architecture.preprocess
        self.visual, self.text = Trunk(trunk, self.preprocess.size[0]), text
        self.context_length: int = text.context_length
        self.tokenizer = Truncating(self.context_length)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    @property
    def dtype(self) -> torch.dtype:
        return self.text.token_embedding.weight.dtype

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """image [B, 3, R, R] -> [B, D], of unit length when ``normalize``. The towers S0 to S4 take other sizes too."""
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 4 or image.shape[1] != 3:
            got = f"{list(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            side = self.visual.input_resolution
            raise ValueError(f"encode_image: expected floating images [B, 3, {side}, {side}], got {got}; see model.preprocess")
        features = self.visual(image.to(self.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False, lengths: Tensor | list[int] | None = None) -> Tensor:
        """text [B, L] of token ids, padded with zeros -> [B, D], of unit length when ``normalize``.

        lengths: B counts of tokens up to and including the one that is read; None: up to the largest id of each row.
        """
        return self.text.encode_text(text, normalize, lengths)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_per_image [B_image, B_text], logits_per_text), as of ``clipfast.CLIP``: scaled cosine similarities."""
        scale = self.logit_scale.exp()
        logits = scale * self.encode_image(image, normalize=True) @ self.encode_text(text, normalize=True).t()
        return logits, logits.t()


# ---- loading


@torch.inference_mode(False)
def load(source: str | os.PathLike[str] | Mapping[str, Tensor], name: str | None = None) -> MobileCLIP:
    """A MobileCLIP in eval mode and float32, reparameterised for inference and accelerated.

    Args:
        source: a checkpoint in Apple's first layout (``mobileclip_s0.pt`` … ``mobileclip_blt.pt``) or open_clip's, a folder
            with one, which come on the CPU; or a state dict, whose tensors are copied.
        name: what it must be (MobileCLIP-S0, MobileCLIP2-L-14, …); None: whatever it is, which its tensors tell.

    Raises:
        ValueError: it is no MobileCLIP, another than ``name``, or damaged.
        OSError: the file cannot be read.
    """
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    if name is not None and name not in _ALL.split(", "):
        raise ValueError(f"expected a name of {_ALL}, got {name!r}")
    state = dict(source) if isinstance(source, Mapping) else files.read(_file(Path(where))).state
    state = {str(key).removeprefix("module."): tensor for key, tensor in state.items()}
    architecture = _architecture(where, state)
    if isinstance(source, Mapping):
        state = {key: tensor.detach().clone() for key, tensor in state.items()}
    if name is not None and name not in architecture.names:
        raise ValueError(f"{where}: expected {name}, got a checkpoint of {' or '.join(architecture.names)}")
    first = any(key.startswith(_FIRST) for key in state)
    image, text, scale = _towers(where, architecture, state, first)
    model = MobileCLIP(architecture, image, text).eval()
    model.logit_scale = nn.Parameter(scale)
    reparameterize(model, inplace=True)
    accelerate(model)
    return model


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for pattern in ("open_clip_*.safetensors", "*.safetensors", "open_clip_*.bin", "*.pt", "*.bin"):
        if len(found := sorted(path.glob(pattern))) == 1:
            return found[0]
    raise FileNotFoundError(f"{path}: expected one file of weights (.safetensors, .bin or .pt) in the folder: name the file")


def _architecture(where: str, state: Mapping[str, Any]) -> Architecture:
    """The one whose first convolution and number of blocks these tensors have."""
    if wrong := next((key for key, tensor in state.items() if not isinstance(tensor, Tensor)), None):
        raise ValueError(f"{where}: expected tensors, got {type(state[wrong]).__name__} at {wrong}: save model.state_dict()")
    if folded := next((key for key in state if "reparam_conv" in key), None):
        raise ValueError(f"{where}: is reparameterised already ({folded}): load the checkpoint as it was published")
    stems = (
        f"{_FIRST}patch_embed.0.rbr_conv.0.conv.weight", f"{_FIRST}patch_emb.0.block.conv.weight",
        "visual.trunk.stem.0.conv_kxk.0.conv.weight", "visual.trunk.patch_embed.backbone.0.conv.weight",
        "visual.trunk.patch_embed.proj.weight",
    )  # fmt: skip
    stem = next((len(state[key]) for key in stems if key in state), None)
    blocks = {
        key[: -len(end)] for key in state for end in (".convffn.fc1.weight", ".mlp.fc1.weight", ".pre_norm_ffn.1.weight")
        if key.endswith(end) and key.startswith((_FIRST, "visual.trunk."))
    }  # fmt: skip
    mixers = any(key.startswith("text_encoder.") and ".token_mixer." in key for key in state)
    for one in ARCHITECTURES:
        if (one.stem, one.depth, one.mixers) == (stem, len(blocks), mixers):
            return one
    lacks = f"has {', '.join(list(state)[:3])}, …" if stem is None else f"its image tower has {len(blocks)} blocks, stem {stem}"
    raise ValueError(f"{where}: not a MobileCLIP ({lacks}): expected one of {_ALL}")


def _towers(where: str, one: Architecture, state: State, first: bool) -> tuple[nn.Module, CLIP | MixerText, Tensor]:
    image, text = (_FIRST, "text_encoder.") if first else ("visual.trunk.", "text.")
    trunk_state = {key: tensor for key, tensor in state.items() if key.startswith(image)}
    text_state = {key.removeprefix(text): tensor for key, tensor in state.items() if key.startswith(text)}
    others = [key for key in state if key not in ("logit_scale", "logit_bias") and not key.startswith((image, text))]
    if others or "logit_scale" not in state:
        raise ValueError(f"{where}: not {one.names[0]}: {f'has {others[0]} too' if others else 'lacks logit_scale'}")
    text_state = renamed(where, text_state) if first else text_state
    if "text_projection" not in text_state or text_state["text_projection"].ndim != 2:
        raise ValueError(f"{where}: not {one.names[0]}: lacks its text tower's projection")
    width = text_state["text_projection"].shape[1]
    trunk = _trunk(where, one, trunk_state, width, first)
    try:
        tower = _text(one, text_state)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{where}: its text tower is not that of {one.names[0]}: {_line(error)}") from error
    return trunk, tower, state["logit_scale"].detach().float().reshape(()).clone()


def _trunk(where: str, one: Architecture, state: State, width: int, first: bool) -> nn.Module:
    """timm's tower, whose classifier is the projection, with these weights."""
    vit = one.trunk.startswith("vit")
    try:
        with torch.device("meta"):
            trunk: Any = timm.create_model(one.trunk, num_classes=width, global_pool="token" if vit else "avg")
        if first:
            rename: Any = vision_transformer_hybrid if vit else fastvit
            with next(iter(state.values())).device:  # where a bias of zeros is made
                state = rename.checkpoint_filter_fn(state, trunk)
        else:
            state = {key.removeprefix("visual.trunk."): tensor for key, tensor in state.items()}
        state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        trunk.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: its image tower is not timm {timm.__version__}'s {one.trunk}: {_line(error)}") from error
    if vit and first:
        _as_apples_b(trunk)
    return trunk


def _as_apples_b(trunk: Any) -> None:
    """Apple's own code for B pads images by a pixel and has torch's eps; timm's model, which is open_clip's, has neither.
    Features of one and the same checkpoint differ by 3 % (measured on random weights)."""
    trunk.patch_embed.backbone[0].conv.padding = (1, 1)
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def _text(one: Architecture, state: State) -> CLIP | MixerText:
    if not one.mixers:
        told = {"towers": ["text"], "quick_gelu": False, "transformer_heads": one.heads, "text": {"causal": one.causal}}
        return from_tensors({key: tensor.float() for key, tensor in state.items() if key != "attn_mask"}, told)
    vocab, width = state["token_embedding.weight"].shape
    hidden, context = len(state["first.fc1.weight"]), len(state["positional_embedding"])
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    kernel, embed_dim = state["first.mix.weight"].shape[-1], state["text_projection"].shape[1]
    with torch.device("meta"):
        tower = MixerText(vocab, context, width, one.heads, layers, embed_dim, kernel, hidden)
    tower.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return tower


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ---- reparameterisation


@torch.no_grad()
def reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model for inference: in timm's FastViT and ConvStem, wherever they stand in it, the branches, batch norms and
    identities that sum up to a convolution become that convolution, and layer scales go into the layer before.

    Outputs in eval mode are equal to rounding, the keys are others, hooks on what is gone are gone. The sums are in float64.

    Args:
        model: of open_clip, timm or ``load``; one that has none of these is returned as it is.
        inplace: whether ``model`` itself changes; else a copy does.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it is in training mode, in which a batch norm is of the batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"reparameterize: expected an nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        raise ValueError("reparameterize: expected a model in eval mode, got one that trains: call model.eval() before")
    model = model if inplace else copy.deepcopy(model)
    for module in _branched(model):
        first, trains = next(module.parameters()), any(p.requires_grad for p in module.parameters())
        dtype, device = first.dtype, first.device
        with device:  # where timm then makes the convolution
            module.double().reparameterize()
        module.to(dtype).requires_grad_(trains)
    for module in model.modules():
        if type(module) is ConvNormAct and isinstance(module.bn, nn.BatchNorm2d) and module.aa is None:
            _fold_norm(module)
        elif isinstance(module, fastvit.RepMixerBlock | fastvit.AttentionBlock):
            _fold_scales(module)
    return model


def _branched(module: nn.Module) -> list[Any]:
    """The outermost modules that know how to become one convolution and are not yet."""
    if hasattr(module, "reparameterize"):
        return [module] if getattr(module, "reparam_conv", None) is None else []
    return [found for child in module.children() for found in _branched(child)]


def _fold_norm(module: Any) -> None:
    conv, norm = module.conv, module.bn
    mean, var, gain, shift = (t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    bias = None if conv.bias is None else conv.bias.double()
    kernel, offset = fuse_conv_bn_weights(conv.weight.double(), bias, mean, var, norm.eps, gain, shift)
    trains, dtype = conv.weight.requires_grad, conv.weight.dtype
    conv.weight, conv.bias = (nn.Parameter(t.detach().to(dtype), trains) for t in (kernel, offset))
    module.bn = norm.act


def _fold_scales(block: Any) -> None:
    """The layer scales of a block of FastViT, into the last layer of their branches."""
    for name in ("layer_scale", "layer_scale_1", "layer_scale_2"):
        scale = getattr(block, name, None)
        if isinstance(scale, fastvit.LayerScale2d):
            layer = block.token_mixer.proj if name == "layer_scale_1" else block.mlp.fc2
            gamma = scale.gamma.double().flatten()
            for tensor in (layer.weight, layer.bias):
                tensor.copy_(gamma.reshape(-1, *[1] * (tensor.ndim - 1)) * tensor)
            setattr(block, name, nn.Identity())
