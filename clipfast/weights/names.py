"""Tensors under OpenAI's names, and the sizes of the model that they tell: what every other layout is brought to.

`State` has OpenAI's parameter names, `Sizes` the keyword arguments of `CLIP`, and two more: `towers`, where there is one alone,
and `folded`, where a ResNet's batch norms went into its convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Sizes = dict[str, Any]

TOWERS = ("image", "text")
ELSEWHERE = "load it with its own library and call clipfast.accelerate(model)"
DEEPEST = 1000  # blocks of a tower: far above any model, and built in a second
LONGEST = 4096  # tokens: a causal mask takes their square
# What torch.compile, FSDP and activation checkpointing put in the middle of names; DistributedDataParallel's stands in front.
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SIGN = "visual.conv1.weight"  # a model begins where this name does


def require(where: str, field: str, got: Any, *supported: Any, instead: str = "") -> None:
    if got not in supported:
        instead = f": {instead}" if instead else ""
        raise ValueError(f"{where}: {field} = {got!r} is not supported: expected {' or '.join(map(repr, supported))}{instead}")


def number(where: str, field: str, got: Any) -> float:
    if not isinstance(got, int | float) or not abs(got) < 1e6:
        raise ValueError(f"{where}: {field} = {str(got)[:60]!r}: expected a number")
    return float(got)


def merged(sizes: Sizes, *others: Mapping[str, Any]) -> Sizes:
    """The later say wins, field by field of `vision` and `text` too."""
    out = dict(sizes)
    for other in others:
        for key, value in other.items():
            out[key] = {**out.get(key, {}), **value} if key in ("vision", "text") else value
    return out


_USUAL = {  # what OpenAI's towers have, and no file says
    **{"ln_pre": True, "pool": "token", "channels": 3, "layer_scale": False, "eps": 1e-5, "dropout": 0.0},
    **{"causal": True, "end_token": None, "bag": False},
}


def settled(sizes: Sizes) -> Sizes:
    """Without the options that have the usual value, and without a tower's options where it has none."""
    widths = {"vision": sizes.get("vision_width"), "text": sizes.get("transformer_width")}
    out = dict(sizes)
    for tower, width in widths.items():
        usual = _USUAL | {"mlp_width": 4 * width if width else None}
        options = {name: value for name, value in sizes.get(tower, {}).items() if name not in usual or value != usual[name]}
        out |= {tower: options}
        if not options:
            del out[tower]
    return out


def openai_names(where: str, tensors: Any, ignore: Collection[str] = (), towers: Collection[str] = TOWERS) -> State:
    """The state of OpenAI's CLIP, or open_clip's CLIP or CustomTextCLIP, perhaps saved from what wraps it: OpenAI's names.

    ignore: beginnings of names, as in the file or without what all names of the model begin with, that are left out.
    """
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        got = {n: type(t).__name__ for n, t in tensors.items()} if isinstance(tensors, Mapping) else type(tensors)
        raise ValueError(f"{where}: expected names with tensors, got {str(got)[:200]}: save model.state_dict()")
    left_out = tuple(ignore)
    state = {_WRAPPERS.sub(r"\1", str(name)): t for name, t in tensors.items() if not str(name).startswith(left_out)}
    if towers == TOWERS:
        state = _without_prefix(where, state)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    if "text.positional_embedding" in state and "positional_embedding" not in state:  # CustomTextCLIP
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(())  # open_clip's nonscalar_logit_scale has shape [1]
    mask = state.get("attn_mask")  # traced from open_clip: a constant, which is CLIP's if it is causal
    if mask is not None and mask.equal(torch.full_like(mask, float("-inf")).triu(1)):
        del state["attn_mask"]
    return state


def _without_prefix(where: str, state: State) -> State:
    """What a Lightning module, DistributedDataParallel and the like put before all names of the model, taken off."""
    found = [name.removesuffix(_SIGN) for name in state if name == _SIGN or name.endswith(f".{_SIGN}")]
    if not found or "" in found:
        return state
    if len(found) > 1:
        raise ValueError(
            f"{where}: holds {len(found)} models, under {', '.join(found)}: leave out all but one: ignore=({found[-1]!r},)"
        )
    prefix = found[0]
    out: State = {}
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        if short in out:
            raise ValueError(f"{where}: {short} is there twice, with and without {prefix}: leave one out: ignore=({short!r},)")
        out[short] = tensor
    return out


def beside(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """Beginnings of names that no name of the model has: a head, a loss, another model."""
    own = {name.split(".")[0] for name in expected}
    return sorted({f"{name.split('.')[0]}{'.' if '.' in name else ''}" for name in names} - {f"{o}." for o in own} - own)


def from_state(where: str, tensors: Any, ignore: Collection[str] = (), towers: Collection[str] = TOWERS) -> tuple[Sizes, State]:
    """Sizes as OpenAI's `build_model` reads them from shapes: all but quick_gelu and the heads of wide image towers.

    towers: which there are; of one alone the projection may be missing.
    """
    state = openai_names(where, tensors, ignore, towers)
    vit = "visual.layer1.0.conv1.weight" not in state
    grid = "visual.positional_embedding" if vit else "visual.attnpool.positional_embedding"
    ranks = {_SIGN: 4, grid: 2} if "image" in towers else {}
    if "text" in towers:
        ranks |= {"text_projection": 2} if towers == TOWERS else {}
        ranks |= {"positional_embedding": 2, "token_embedding.weight": 2}
    if any(name.startswith(("image_encoder.model.", "visual.trunk.")) for name in state):
        serves = "clipfast.interop.mobileclip.load(path) if it is a MobileCLIP, else open_clip and clipfast.accelerate(model)"
        raise ValueError(f"{where}: has an image tower of timm's ({next(iter(state))}, ...), which is loaded by {serves}")
    if lacking := [name for name, rank in ranks.items() if name not in state or state[name].ndim != rank]:
        what = "the two towers of CLIP" if towers == TOWERS else f"the {towers[0]} tower of CLIP"  # type: ignore[index]
        raise ValueError(
            f"{where}: not {what}: lacks {', '.join(lacking)}; has {', '.join(list(state)[:5])}, ...; a model "
            "of transformers is loaded with its config.json, by its folder"
        )
    sizes: Sizes = {} if towers == TOWERS else {"towers": list(towers)}
    sizes |= _image_sizes(state, vit, len(state[grid])) if "image" in towers else {}
    sizes |= _text_sizes(state) if "text" in towers else {}
    if "logit_bias" in state:
        sizes["logit_bias"] = 0.0
    for head, predicts in (("words.weight", "words"), ("prefix.weight", "caption")):
        sizes |= {"predicts": predicts} if head in state else {}
    marks = {"input_resolution": "image_resolution", "context_length": "context_length", "vocab_size": "vocab_size"}
    there = marks.keys() & state.keys()
    for mark in sorted(there):
        require(where, mark, int(state.pop(mark)), sizes[marks[mark]])
    if there == marks.keys():  # only OpenAI's archives carry them all
        sizes["quick_gelu"] = True
    return sizes, state


def _image_sizes(state: State, vit: bool, places: int) -> Sizes:
    stem, side = state[_SIGN], (places - 1) ** 0.5
    sizes: Sizes = {
        "embed_dim": state["visual.proj"].shape[-1] if "visual.proj" in state else len(stem),
        "image_resolution": round(side) * (stem.shape[-1] if vit else 32),
        "vision_layers": _depth(state, "visual.transformer.resblocks."),
        "vision_width": len(stem) if vit else 2 * len(stem),
        "vision_patch_size": stem.shape[-1] if vit else None,
    }
    options = {} if stem.shape[1] == 3 else {"channels": stem.shape[1]}
    if vit:
        options |= _block_options(state, "visual.transformer.resblocks.0.", len(stem))
        options |= {} if "visual.ln_pre.weight" in state else _without_ln_pre(state)
        if len(stem) <= 1024 and len(stem) % 64 == 0:
            sizes["vision_heads"] = len(stem) // 64
    else:
        sizes["vision_layers"] = tuple(_depth(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        sizes["vision_heads"] = sizes["vision_width"] * 32 // 64
        sizes |= {"folded": True} if "visual.conv1.bias" in state else {}
    return sizes | ({"vision": options} if options else {})


def _without_ln_pre(state: State) -> dict[str, Any]:
    """A norm that lost one of its weights is a fault, not a tower without that norm."""
    return {} if "visual.ln_pre.bias" in state else {"ln_pre": False}


def _text_sizes(state: State) -> Sizes:
    width = state["token_embedding.weight"].shape[1]
    sizes: Sizes = {
        "embed_dim": state["text_projection"].shape[-1] if "text_projection" in state else width,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": width,
        "transformer_heads": width // 64,
        "transformer_layers": _depth(state, "transformer.resblocks."),
    }
    options = _block_options(state, "transformer.resblocks.0.", width)
    return sizes | ({"text": options} if options else {})


def _block_options(state: State, block: str, width: int) -> dict[str, Any]:
    fc = state.get(f"{block}mlp.c_fc.weight")
    options: dict[str, Any] = {} if fc is None or fc.ndim != 2 or len(fc) == 4 * width else {"mlp_width": len(fc)}
    return options | ({"layer_scale": True} if f"{block}ls_1.gamma" in state else {})


def _depth(state: State, prefix: str) -> int:
    """How many blocks there are: their count, which no number in a name can blow up."""
    numbers = {name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    return sum(number.isdigit() for number in numbers)
