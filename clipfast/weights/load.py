"""Checkpoints of OpenAI's clip, open_clip and transformers -> `clipfast.CLIP`.

Every source is brought to one form: `state`, tensors under OpenAI's parameter names, and `sizes`, the keyword arguments
of `CLIP` (names.py). `_assemble` then builds the model and accepts no missing, unexpected or mis-shaped key.

Nothing in a checkpoint is executed; of TorchScript archives, the published format, the code is not even loaded (files.py).
"""

from __future__ import annotations

import copy
import difflib
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.model.resnet import ModifiedResNet
from clipfast.weights import files
from clipfast.weights.folder import Found, from_folder
from clipfast.weights.hub import URLS, download, hub_finder
from clipfast.weights.names import (
    DEEPEST,
    ELSEWHERE,
    LONGEST,
    TOWERS,
    Sizes,
    State,
    beside,
    from_state,
    merged,
    settled,
)  # fmt: skip
from clipfast.weights.open_clip import from_open_clip, live_config
from clipfast.weights.transformers import from_transformers

_TOLD = {  # what a file of clipfast's own says beside its weights, and of which type
    **{"quick_gelu": bool, "image_resolution": int, "vision_heads": int, "transformer_heads": int},
    **{"vision": dict, "text": dict, "towers": list, "preprocess": dict},
}


def available_models() -> list[str]:
    """Names that `load` downloads: the nine models that OpenAI published."""
    return list(URLS)


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    quick_gelu: bool | None = None,
    vision_heads: int | None = None,
    ignore: Collection[str] = (),
) -> tuple[CLIP, Preprocess]:
    """A model in eval mode, and the transform that makes its input from an image, as the checkpoint says.

    name: one of `available_models()`; a TorchScript archive, state dict, open_clip checkpoint or safetensors file; a
      folder of open_clip, transformers or sentence-transformers, or its `hf-hub:organisation/name[@revision]`; a checkpoint
      of clipfast.train. A saved tower of transformers alone gives a CLIP whose other tower is None.
    device: default "cuda" if there is one, else "cpu". Weights are float32 on the CPU, else as by `convert_weights`.
    jit: accepted for OpenAI's callers; clipfast has no TorchScript model and returns the same eager one, with a warning.
    download_root: where downloads are kept: default ~/.cache/clip, and the Hugging Face cache for `hf-hub:`.
    quick_gelu, vision_heads: what a bare state dict cannot tell: its activation, and the heads of an image tower wider
      than ViT-L (up to there width / 64, OpenAI's rule, is taken). When given they override what the source says.
    ignore: beginnings of names in a file that are no part of the model: ("head.", "loss.").

    Warns where `clipfast.tokenize` is not the checkpoint's tokenizer: `clipfast.get_tokenizer(name)` is.

    Raises RuntimeError for an unknown name or a wrong checksum, OSError when there is no network or a file cannot be
    read, ValueError when the file does not hold a CLIP that clipfast computes.
    """
    if jit:
        warnings.warn("jit=True: clipfast has no TorchScript model; the eager one computes the same", stacklevel=2)
    where = os.fspath(name)
    found = _found(where, download_root, (ignore,) if isinstance(ignore, str) else tuple(ignore))
    if found.tokenizer:
        serves = f"clipfast.get_tokenizer({where!r}) gives the tokenizer"
        warnings.warn(f"{where}: clipfast.tokenize is not for this model, which has {found.tokenizer}: {serves}", stacklevel=2)
    told = {"quick_gelu": quick_gelu, "vision_heads": vision_heads}
    sizes = merged(found.sizes, {field: value for field, value in told.items() if value is not None})
    model = _assemble(where, sizes, found.state, torch.float32).eval()
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if target.type != "cpu":
        convert_weights(model)
    visual: Any = model.visual
    if found.preprocess:
        visual.preprocess = found.preprocess
    return model.to(target), Preprocess(224) if visual is None else visual.preprocess


def _found(where: str, download_root: str | None, ignore: tuple[str, ...]) -> Found:
    if where in URLS:
        return _from_file(download(URLS[where], Path(download_root or "~/.cache/clip").expanduser()), ignore)
    if where.startswith("hf-hub:"):
        return from_folder(where, hub_finder(where.removeprefix("hf-hub:"), download_root))
    if any(os.path.isfile(os.path.join(where, name)) for name in (".metadata", "about.json")):  # a checkpoint of clipfast.train
        from clipfast.weights.distributed import weights  # here, as it brings in torch.distributed

        held = weights(where)
        return _from_checkpoint(where, files.Checkpoint(held["state_dict"], held["model_config"]), ignore)
    if os.path.isdir(where):
        return from_folder(where, lambda file: path if (path := Path(where, file)).is_file() else None)
    if os.path.isfile(where):
        return _from_file(Path(where), ignore)
    near = difflib.get_close_matches(where, URLS, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    expected = f"a file, a folder, hf-hub:organisation/name, or one of {', '.join(URLS)}"
    raise RuntimeError(f"model {where!r} not found: expected {expected}{hint}")


def _from_file(path: Path, ignore: tuple[str, ...]) -> Found:
    return _from_checkpoint(str(path), files.read(path, torch.float32), ignore)


def _from_checkpoint(where: str, checkpoint: files.Checkpoint, ignore: tuple[str, ...]) -> Found:
    told = checkpoint.model_config
    for field, value in told.items():
        if field not in _TOLD or not isinstance(value, _TOLD[field]):
            expected = f"expected {', '.join(_TOLD)}, each of its type"
            raise ValueError(f"{where}: model_config.{field} = {str(value)[:60]!r}: {expected}")
    if (towers := tuple(told.get("towers", TOWERS))) not in (TOWERS, TOWERS[:1], TOWERS[1:]):
        raise ValueError(f"{where}: model_config.towers = {towers}: expected one or both of {TOWERS}")
    sizes, state = from_state(where, checkpoint.state, ignore, towers)
    if sizes.get("vision", {}).get("ln_pre") is False and not told.get("vision"):
        raise ValueError(
            f"{where}: weights alone do not tell how a tower without ln_pre pools its tokens, nor where a text is read: load "
            "the folder that has open_clip_config.json beside them"
        )
    large = f"{sizes['vocab_size']:,} token ids" if sizes.get("vocab_size", 0) > 49408 else None
    return Found(merged(sizes, told), state, None, large)


def build_model(state_dict: Mapping[str, Tensor] | nn.Module, quick_gelu: bool = True) -> CLIP:
    """OpenAI's `build_model`: sizes read from the keys, eval mode, weights as `convert_weights` leaves them.

    state_dict: or the module that has it, a ScriptModule say.
    """
    tensors = state_dict.state_dict() if isinstance(state_dict, nn.Module) else state_dict
    sizes, state = from_state("state_dict", tensors)
    model = _assemble("state_dict", sizes | {"quick_gelu": quick_gelu}, state, torch.float32, copies=True)
    convert_weights(model)
    return model.eval()


def convert_weights(model: nn.Module) -> None:
    """OpenAI's half precision, in place: convolutions, linear layers, attention and the two projections in float16;
    layer and batch norms, embeddings and logit_scale stay as they are."""
    for module in model.modules():
        halved = list(module.parameters(recurse=False)) if isinstance(module, nn.Conv2d | nn.Linear) else []
        own = dict(module.named_parameters(recurse=False))
        halved += [own[name] for name in ("in_proj_weight", "in_proj_bias", "text_projection", "proj") if name in own]
        for parameter in halved:
            parameter.data = parameter.data.half()


def beyond_shapes(model: CLIP) -> Sizes:
    """Arguments of CLIP that the shapes of its weights do not tell, as `model_config` in clipfast's own files."""
    visual: Any = model.visual
    transformer: Any = model.transformer
    told: Sizes = {"quick_gelu": model.quick_gelu}
    if visual is not None:
        first = visual.transformer.resblocks[0].attn if hasattr(visual, "transformer") else visual.attnpool
        told |= {"image_resolution": visual.input_resolution, "vision_heads": first.num_heads}
        told |= {"preprocess": changed} if (changed := visual.preprocess.changed) else {}
    if transformer is not None:
        told |= {"transformer_heads": transformer.resblocks[0].attn.num_heads if len(transformer.resblocks) else 1}
    if None in (visual, transformer):
        told["towers"] = ["text"] if visual is None else ["image"]
    for tower, options in (("vision", model.vision_options), ("text", model.text_options)):
        told |= {tower: dict(options)} if options else {}
    return told


def from_tensors(state: Mapping[str, Tensor], model_config: Sizes) -> CLIP:
    """A model in eval mode that holds copies of these tensors, whose device and dtypes it has."""
    sizes, named = from_state("the model", state, towers=tuple(model_config.get("towers", TOWERS)))
    return _assemble("the model", merged(sizes, model_config), named, copies=True).eval()


@torch.enable_grad()  # so that requires_grad survives joining and transposing
def convert(module: nn.Module) -> CLIP:
    """A live CLIP of OpenAI's clip, open_clip (CLIP or CustomTextCLIP) or transformers (CLIPModel) as ours.

    A tower of transformers alone (CLIPTextModel, CLIPVisionModel, with or without projection) gives a CLIP whose other tower
    is None. Features are equal; the weights are copied, with the source's dtypes, device, frozen parameters and training flag.
    ValueError names the feature of the source that clipfast does not compute.
    """
    if isinstance(module, CLIP):
        return copy.deepcopy(module)
    where = f"{type(module).__module__}.{type(module).__qualname__}"
    source: Any = module
    tensors = source.state_dict(keep_vars=True)  # keep_vars: requires_grad travels with each tensor
    try:
        if hasattr(source, "config") and hasattr(source.config, "to_dict"):
            config = source.config.to_dict() | {"architectures": [type(source).__name__]}
            sizes, state = from_transformers(where, config, lambda: tensors)
        else:
            sizes, state = from_open_clip(where, live_config(where, source), lambda: tensors)
            if told := getattr(source.visual, "preprocess_cfg", None):  # open_clip's, of a model that its factory made
                sizes["preprocess"] = Preprocess.from_open_clip(told).changed
    except AttributeError as error:
        expected = "expected a CLIP of OpenAI's clip, open_clip or transformers"
        raise TypeError(f"{where}: {expected}: {error}; of another model try clipfast.accelerate(model)") from error
    frozen = {name for name, tensor in state.items() if not tensor.requires_grad}
    model = _assemble(where, sizes, state, copies=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.train(module.training)


def _assemble(where: str, sizes: Sizes, state: State, dtype: torch.dtype | None = None, copies: bool = False) -> CLIP:
    """The model of these sizes with these tensors in `dtype`, or each in its own (None). It empties `state`.

    copies: whether it holds copies of them all, not only of those of another dtype or layout.
    """
    model = _empty(where, sizes, state)
    expected = model.state_dict()
    # Unused by CLIP, and absent from some archives.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    for name in counters - state.keys():
        state[name] = torch.zeros((), dtype=torch.long)
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} (expected {list(expected[name].shape)}, got {list(tensor.shape)})"
            for name, tensor in state.items()
            if name in expected and expected[name].shape != tensor.shape
        ],
        "not of floating point": [n for n, t in state.items() if n not in counters and not t.is_floating_point()],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        others = beside(faults["unexpected"], expected)
        hint = f"; to leave out what is beside the towers: ignore={tuple(others)}" if others else ""
        raise ValueError(f"{where}: expected weights that fit the model of sizes {sizes}, got {listed}{hint}")
    taken: set[int] = set()
    for name in list(state):
        tensor = state.pop(name).detach()
        own = tensor.dtype if dtype is None or name in counters else dtype
        if copies or not _fits(tensor, expected[name], own) or tensor.data_ptr() in taken:
            tensor = torch.empty_like(expected[name], dtype=own, device=tensor.device).copy_(tensor)
        taken.add(tensor.data_ptr())
        expected[name] = tensor
    model.load_state_dict(expected, assign=True)
    return model


def _fits(tensor: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor can be the parameter: of that dtype and layout, and no window into something larger."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
    return tensor.dtype == dtype and tensor.stride() == expected.stride() and whole


def _empty(where: str, sizes: Sizes, state: State) -> CLIP:
    """The model of these sizes on the meta device: no memory, no initialisation, as every tensor comes from `state`."""
    arguments = settled(sizes)
    towers, folded = tuple(arguments.pop("towers", TOWERS)), arguments.pop("folded", False)
    pixels = arguments.pop("preprocess", {})
    if "quick_gelu" not in arguments:
        raise ValueError(
            f"{where}: weights alone do not tell the activation: pass quick_gelu=True (OpenAI's models, and what was "
            "trained from them or as *-quickgelu in open_clip) or quick_gelu=False (open_clip's default)"
        )
    if "image" in towers and "vision_heads" not in arguments:
        raise ValueError(
            f"{where}: weights alone do not tell the number of heads of an image tower of width "
            f"{sizes['vision_width']}: pass vision_heads= (open_clip's ViT-H, -g, -bigG and -e have 16)"
        )
    _bounded(where, arguments, state)
    absent = {} if "image" in towers else _NO_IMAGE
    absent |= {} if "text" in towers else _NO_TEXT
    try:
        with torch.device("meta"), _Shapes():
            model = CLIP(**(arguments | absent))
        model.visual.preprocess = Preprocess(model.visual.input_resolution, **pixels)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(f"{where}: there is no model of sizes {sizes}: {files.first_line(error)}: {ELSEWHERE}") from error
    if folded and isinstance(model.visual, ModifiedResNet):
        model.visual.fold_batch_norms()
    _without_towers(model, towers, state)
    return model


class _Shapes(TorchFunctionMode):
    """Nothing is drawn or computed: on the meta device torch does that in Python, and imports torch._dynamo and sympy (2 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        if func in (Tensor.mul, Tensor.log) and args[0].is_meta:
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


_NO_IMAGE = {"image_resolution": 1, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 1, "vision_heads": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}


def _without_towers(model: Any, towers: tuple[str, ...], state: State) -> None:
    """A CLIP whose absent tower, and whose absent projection and temperature, are None."""
    if towers == TOWERS:
        return
    gone = ["logit_scale"] if "logit_scale" not in state else []
    if "image" not in towers:
        gone += ["visual"]
    elif "visual.proj" not in state:
        model.visual.proj = None
    if "text" not in towers:
        gone += ["transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"]
    elif "text_projection" not in state:
        gone += ["text_projection"]
    for name in gone:
        setattr(model, name, None)


def _bounded(where: str, sizes: Sizes, state: State) -> None:
    """ValueError for sizes at which building the model alone would take memory or time, whatever its file holds."""
    depth = sizes.get("vision_layers", 0)
    for name, got, most in (
        ("vision_layers", max(depth) if isinstance(depth, tuple) and depth else depth or 0, DEEPEST),
        ("transformer_layers", sizes.get("transformer_layers", 0), DEEPEST),
        ("context_length", sizes.get("context_length", 0), LONGEST),
    ):
        if not isinstance(got, int) or got > most:
            raise ValueError(f"{where}: expected {name} to be a number of at most {most}, got {str(got)[:60]}")
