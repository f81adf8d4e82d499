"""A folder or repository of open_clip, transformers or sentence-transformers -> sizes, state, the transform, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch

from clipfast.files import first_line, read_parsed
from clipfast.inputs import Preprocess
from clipfast.weights.files import read
from clipfast.weights.hub import Find
from clipfast.weights.names import Sizes, State
from clipfast.weights.open_clip import from_open_clip
from clipfast.weights.transformers import from_transformers


class Found(NamedTuple):
    """What a checkpoint holds; see names.py for the first two."""

    sizes: Sizes
    state: State
    preprocess: Preprocess | None = None  # None: OpenAI's
    tokenizer: str | None = None  # None: OpenAI's; else what the checkpoint says of it


def from_folder(where: str, find: Find) -> Found:
    """ValueError in one line, whatever the configurations in it hold."""
    try:
        return _from_folder(where, find)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        fault = f"a field of its configuration has another type or value than its library writes ({first_line(error)})"
        raise ValueError(f"{where}: {fault}: download or copy it again") from error


def _from_folder(where: str, find: Find) -> Found:
    where, find = inner(where, find)
    if path := find("open_clip_config.json"):
        return _open_clip(where, find, read_parsed(path))
    if path := find("config.json"):
        return _transformers(where, find, read_parsed(path))
    raise FileNotFoundError(
        f"{where}: found neither open_clip_config.json nor config.json: without a network place in a folder, and load "
        "it, open_clip_config.json and open_clip_model.safetensors (or open_clip_pytorch_model.bin), or config.json and "
        "model.safetensors (or pytorch_model.bin) of a transformers model"
    )


def inner(where: str, find: Find) -> tuple[str, Find]:
    """Where the files of the model are: of sentence-transformers, CLIP stands alone, in a folder of its own or at the top."""
    if find("open_clip_config.json") or find("config.json") or not (path := find("modules.json")):
        return where, find
    kinds = (".CLIPModel", ".Transformer")
    modules = [module for module in read_parsed(path, list) if isinstance(module, dict)]
    folders = [str(module.get("path", "")) for module in modules if str(module.get("type", "")).endswith(kinds)]
    if len(folders) != 1 or not folders[0] or not _inside(folders[0]) or not find(f"{folders[0]}/config.json"):
        return where, find
    return f"{where}/{folders[0]}", lambda file: find(f"{folders[0]}/{file}")


def _open_clip(where: str, find: Find, config: dict[str, Any]) -> Found:
    model = config.get("model_cfg", config)
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    sizes, state = from_open_clip(where, model, lambda: _weights(where, find, *names))
    told = {**(config.get("preprocess_cfg") or {}), "size": sizes["image_resolution"]}  # open_clip, too, takes the model's
    text = model.get("text_cfg") or {}
    other = {name: text[name] for name in ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode") if text.get(name)}
    return Found(sizes, state, _preprocess(f"{where}/preprocess_cfg", told, sizes), _tokenizer(other, sizes))


def _transformers(where: str, find: Find, config: dict[str, Any]) -> Found:
    names = ("model.safetensors", "pytorch_model.bin")
    sizes, state = from_transformers(where, config, lambda: _weights(where, find, *names))
    preprocess = None
    for file in ("preprocessor_config.json", "processor_config.json"):
        if preprocess is None and "image_resolution" in sizes and (path := find(file)):
            told, side = read_parsed(path), sizes["image_resolution"]
            told = {"size": {"shortest_edge": side}, "crop_size": side} | (told.get("image_processor") or told)
            preprocess = _preprocess(f"{where}/{file}", told, sizes)
    kind = (read_parsed(path).get("tokenizer_class") if (path := find("tokenizer_config.json")) else None) or "CLIPTokenizer"
    other = {} if str(kind).startswith("CLIPTokenizer") else {"tokenizer_class": kind}
    return Found(sizes, state, preprocess, _tokenizer(other, sizes))


def _preprocess(where: str, told: Mapping[str, Any], sizes: Sizes) -> Preprocess:
    make = Preprocess.from_open_clip if where.endswith("preprocess_cfg") else Preprocess.from_transformers
    try:
        made = make(told)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: {first_line(error)}") from error
    if made.resolution != (side := sizes["image_resolution"]):
        raise ValueError(f"{where}: makes images of {made.resolution} pixels, where the model takes {side}: mend one of them")
    return made


def _tokenizer(other: dict[str, Any], sizes: Sizes) -> str | None:
    if other:
        return ", ".join(f"{name} = {value!r}" for name, value in other.items())
    # Fewer ids than OpenAI's are told when a text is encoded: those beyond are no ids of the model.
    return f"{sizes['vocab_size']:,} token ids" if sizes.get("vocab_size", 0) > 49408 else None


def _weights(where: str, find: Find, *names: str) -> State:
    """All tensors of the first file that is there, or of the shards that its index lists; floating ones in fp32."""
    for name in names:
        if path := find(name):
            return read(path, torch.float32).state
        if index := find(f"{name}.index.json"):
            state: State = {}
            for shard in sorted(set(read_parsed(index).get("weight_map", {}).values())):
                if not _inside(shard):
                    raise ValueError(f"{where}: {index.name} lists {shard!r}, expected a file beside it")
                if not (path := find(shard)):
                    raise FileNotFoundError(f"{where}: {index.name} lists {shard}, which is not there: place it beside")
                state |= read(path, torch.float32).state
            return state
    raise FileNotFoundError(f"{where}: lacks {' and '.join(names)}: place one of them beside the configuration")


def _inside(path: str) -> bool:
    """Whether a path of a configuration stays within its folder."""
    parts = PurePosixPath(path.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts and ":" not in path and "\0" not in path
