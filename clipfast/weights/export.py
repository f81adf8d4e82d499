"""Our weights in the layout of other libraries: OpenAI's clip, open_clip, transformers, or one safetensors file."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clipfast.files import replacing
from clipfast.inputs.image import Preprocess
from clipfast.inputs.processors import FILTERS
from clipfast.inputs.tokenizer import END, START, SimpleTokenizer
from clipfast.model import CLIP
from clipfast.weights.load import beyond_shapes
from clipfast.weights.transformers import NAMES


def export(model: CLIP, out: str | Path, layout: str = "safetensors") -> Path:
    """Write `model` so that another library loads it with equal features; -> the file or folder.

    layout: "openai", a TorchScript archive for `clip.load`; "open_clip", a folder for `open_clip.create_model("local-dir:…")`;
        "transformers", a folder for `CLIPModel`, `CLIPProcessor` and their kin; "safetensors", one file for `clipfast.load`.
    How images are made, `model.visual.preprocess`, is told by all but OpenAI's; of that a warning tells what it was.

    Raises ValueError where that library has no such model, FileExistsError where `out` exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"expected a layout of {', '.join(LAYOUTS)}, got {layout!r}")
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"expected nothing at {target} yet, but it exists; choose another place")
    if model.frozen:
        got = f"got {model.frozen} ones; export the model that they come from"
        raise ValueError(f"{layout}: expected a model of fp32 weights, {got}")
    if None in (model.visual, model.transformer) and layout != "safetensors":
        raise ValueError(f"{layout} gets both towers, and this model has one tower alone: export to safetensors")
    if model.objective in ("words", "caption") and layout != "safetensors":
        raise ValueError(f"{layout} has no model that predicts its {model.objective}: export to safetensors")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    write = LAYOUTS[layout]
    if layout in ("open_clip", "transformers"):
        aside = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # whole or not at all
        try:
            write(model, state, aside)
            (_open_clip_pixels if layout == "open_clip" else _transformers_pixels)(model.visual.preprocess, aside)
            aside.chmod(0o755)
            aside.replace(target)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, safetensors.SafetensorError):  # of a full disk
                raise OSError(f"expected room for the model at {target}, got: {error}; make some, or choose another") from error
            raise
    else:
        write(model, state, target)
    return target


def _openai(model: CLIP, state: dict[str, Tensor], path: Path) -> None:
    told = beyond_shapes(model)
    vit, width = hasattr(model.visual, "transformer"), model.visual.conv1.out_channels
    theirs: dict[str, Any] = {"quick_gelu": True, "transformer_heads": model.transformer.width // 64}
    theirs["vision_heads"] = width // 64 if vit else 2 * width * 32 // 64
    theirs |= {name: {} for name in ("vision", "text") if name in told}
    if differ := {name: told[name] for name, value in theirs.items() if told[name] != value}:
        raise ValueError(f"OpenAI's clip has no such model: {differ}, where it has {theirs}; export to open_clip")
    if not _alike(model.visual.preprocess, Preprocess(model.visual.input_resolution)):
        warnings.warn(f"its images are made by {model.visual.preprocess!r}, and OpenAI's clip.load gives its own", stacklevel=3)
    marks = {
        "input_resolution": told["image_resolution"],
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
    }
    traced: Any = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name, value in marks.items():
        traced.__dict__.pop(name, None)
        traced.register_buffer(name, torch.tensor(value))
    side = told["image_resolution"]
    image = torch.zeros(1, 3, side, side, dtype=model.dtype)
    text = torch.zeros(1, model.context_length, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer remarks on shape checks, and on its own age: OpenAI's format is what it is
        calls = {"forward": (image, text), "encode_image": image, "encode_text": text}
        archive = torch.jit.trace_module(traced, calls, check_trace=False)
        with replacing(path) as file:
            torch.jit.save(archive, file)


def _safetensors(model: CLIP, state: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as file:
        file.write(safetensors.torch.save(state, {"format": "pt", "model_config": json.dumps(beyond_shapes(model))}))


def _open_clip(model: CLIP, state: dict[str, Tensor], folder: Path) -> None:
    visual: Any = model.visual
    told = beyond_shapes(model)
    vit = hasattr(visual, "transformer")
    width = visual.conv1.out_channels * (1 if vit else 2)
    layers = len(visual.transformer.resblocks) if vit else [len(getattr(visual, f"layer{i}")) for i in (1, 2, 3, 4)]
    vision = {"image_size": told["image_resolution"], "layers": layers, "width": width}
    vision |= {"patch_size": visual.conv1.kernel_size[0] if vit else None}
    vision |= {"head_width": width * (1 if vit else 32) // told["vision_heads"]}
    vision |= _open_clip_fields("vision", width, told["quick_gelu"], model.vision_options)
    text = {"context_length": model.context_length, "vocab_size": model.vocab_size, "width": model.transformer.width}
    text |= {"heads": told["transformer_heads"], "layers": model.transformer.layers}
    text |= _open_clip_fields("text", model.transformer.width, told["quick_gelu"], model.text_options)
    sizes = {"embed_dim": visual.output_dim, "quick_gelu": told["quick_gelu"], "vision_cfg": vision, "text_cfg": text}
    if not model.causal:
        sizes["custom_text"] = True  # open_clip's other class knows the mask's absence only from its text tower
    if model.logit_bias is not None:
        sizes["init_logit_bias"] = 0.0
    _write_json(folder / "open_clip_config.json", {"model_cfg": sizes})
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})


def _open_clip_pixels(preprocess: Preprocess, folder: Path) -> None:
    told: dict[str, Any] = {"size": list(preprocess.size), "mean": list(preprocess.mean), "std": list(preprocess.std)}
    told |= {"interpolation": preprocess.interpolation, "resize_mode": preprocess.resize}
    told |= {"fill_color": preprocess.fill} if preprocess.resize == "longest" else {}
    config = json.loads((folder / "open_clip_config.json").read_text()) | {"preprocess_cfg": told}
    _write_json(folder / "open_clip_config.json", config)
    _same(preprocess, Preprocess.from_open_clip(told), "open_clip")


def _transformers_pixels(preprocess: Preprocess, folder: Path) -> None:
    (height, width), resized = preprocess.size, preprocess.resized
    size = (
        {"shortest_edge": resized[0]}
        if preprocess.resize == "shortest"
        else dict(zip(("height", "width"), resized, strict=True))
    )
    told = {"do_resize": True, "size": size, "resample": FILTERS.index(preprocess.interpolation), "do_center_crop": True}
    told |= {"crop_size": {"height": height, "width": width}, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    told |= {"image_mean": list(preprocess.mean), "image_std": list(preprocess.std)}
    told |= {"image_processor_type": "CLIPImageProcessor"}
    _write_json(folder / "preprocessor_config.json", told)
    _same(preprocess, Preprocess.from_transformers(told), "transformers")


def _same(given: Preprocess, told: Preprocess, library: str) -> None:
    if not _alike(given, told):
        raise ValueError(f"{library} has no transform {given!r}: the nearest is {told!r}; export to safetensors")


def _alike(one: Preprocess, other: Preprocess) -> bool:
    """Whether two transforms are one, but for when they convert to RGB and how they round, which no file tells."""
    return replace(one, rgb_first=False, round_down=False) == replace(other, rgb_first=False, round_down=False)


def _open_clip_fields(tower: str, width: int, quick_gelu: bool, options: dict[str, Any]) -> dict[str, Any]:
    """What open_clip says of a tower that differs from OpenAI's; ValueError where it has no such tower."""
    fields: dict[str, Any] = {}
    for option, value in options.items():
        if option == "mlp_width":  # so that int(width * ratio) is the width
            fields["mlp_ratio"] = (value + 0.5) / width
        elif option == "layer_scale" and value:
            fields["ls_init_value"] = 1e-5
        elif option == "eps":
            fields["norm_kwargs"] = {"eps": value}
        elif option == "activation" and value == "gelu_tanh" and not quick_gelu:
            fields["act_kwargs"] = {"approximate": "tanh"}
        elif option == "ln_pre":
            fields["no_ln_pre"] = not value
        elif option == "pool":
            fields |= {"pool_type": "avg", "final_ln_after_pool": True} if value == "average" else {"pool_type": "tok"}
        elif option == "causal":
            fields["no_causal_mask"] = not value
        elif option == "end_token" and value is not None:
            fields |= {"pool_type": "last"} if value == -1 else {"pool_type": "eos", "eos_id": value}
        elif option not in ("layer_scale", "end_token") and value != {"channels": 3, "dropout": 0.0}.get(option):
            raise ValueError(f"open_clip has no {tower} tower with {option} = {value!r}: export to safetensors")
    return fields


def _transformers(model: CLIP, state: dict[str, Tensor], folder: Path) -> None:
    told, visual = beyond_shapes(model), model.visual
    if not hasattr(visual, "transformer"):
        raise ValueError("transformers has no CLIP with a ResNet; export to openai or open_clip")
    if model.logit_bias is not None:
        raise ValueError("transformers has no CLIP with a logit_bias; export to open_clip")
    end = model.vocab_size - 1
    common = {"projection_dim": visual.output_dim}
    text = _tower("text", model.transformer, told["quick_gelu"], model.text_options) | common
    text |= {"max_position_embeddings": model.context_length, "num_attention_heads": told["transformer_heads"]}
    text |= {"vocab_size": model.vocab_size, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text |= {} if model.end_token is None else {"eos_token_id": model.end_token}
    vision = _tower("image", visual.transformer, told["quick_gelu"], model.vision_options) | common
    vision |= {"patch_size": visual.conv1.kernel_size[0], "num_attention_heads": told["vision_heads"]}
    vision |= {"image_size": told["image_resolution"], "num_channels": visual.conv1.in_channels}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": visual.output_dim}
    _write_json(folder / "config.json", config | {"text_config": text, "vision_config": vision})
    safetensors.torch.save_file(_rename(state), folder / "model.safetensors", {"format": "pt"})
    tokenizer = SimpleTokenizer()
    if model.vocab_size == len(tokenizer.encoder):  # another vocabulary has a tokenizer that we do not know
        _write_json(folder / "vocab.json", tokenizer.encoder)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges), ""]), encoding="utf-8")
        names = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model.context_length, "bos_token": START}
        _write_json(folder / "tokenizer_config.json", names | dict.fromkeys(("eos_token", "unk_token", "pad_token"), END))


_TRANSFORMERS_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _tower(tower: str, transformer: Any, quick_gelu: bool, options: dict[str, Any]) -> dict[str, Any]:
    """transformers' fields of a tower; ValueError where it has no such tower."""
    width = transformer.width
    known = {"ln_pre": True, "pool": "token", "layer_scale": False, "causal": True, "bag": False}
    for option, value in options.items():
        if (option, value) == ("end_token", -1) or value != known.get(option, value):
            raise ValueError(f"transformers has no CLIP whose {tower} tower has {option} = {value!r}: export to open_clip")
    activation = options.get("activation", "quick_gelu" if quick_gelu else "gelu")
    fields = {"hidden_size": width, "intermediate_size": options.get("mlp_width") or 4 * width}
    fields |= {"num_hidden_layers": len(transformer.resblocks), "hidden_act": _TRANSFORMERS_ACTIVATIONS[activation]}
    return fields | {"layer_norm_eps": options.get("eps", 1e-5), "attention_dropout": options.get("dropout", 0.0)}


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names -> transformers': q, k and v apart, the projections transposed."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("text_projection", "visual.proj"):
            tensor = tensor.T
        # The text tower's names are parts of the image tower's: longest first.
        for theirs, ours in sorted(NAMES.items(), key=lambda pair: -len(pair[1])):
            if ours.startswith(".") or name.startswith(ours):
                name = name.replace(ours, theirs, 1)
        parts = tensor.chunk(3) if ".in_proj_" in name else [tensor]
        for part, letter in zip(parts, "qkv", strict=False):
            renamed[name.replace(".in_proj_", f".{letter}_proj.")] = part.contiguous()
    return renamed


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


LAYOUTS: dict[str, Callable[[CLIP, dict[str, Tensor], Path], None]] = {
    "openai": _openai,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "safetensors": _safetensors,
}
