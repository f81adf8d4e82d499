"""One checkpoint file -> the tensors of a model, and what the file says of it. Nothing in a file is executed.

Zips of PyTorch and TorchScript are read by archive.py, older pickles by torch's own `weights_only` reader. Only the tensors of
the model are read, each once and into memory of its own: a file that was loaded may be written again, or removed.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from clipfast.files import first_line, parsed
from clipfast.weights import archive
from clipfast.weights.archive import Archive, Stored

_CALLS: tuple[set[str], ...] = ({"quick_gelu"}, {"gelu"})
HEADER = 16 << 20  # bytes of a safetensors file's: 100,000 tensors; parsed they take up to thirty times as much
PLACES = 10_000  # in a model_config
HOMES = ("state_dict", "model_state_dict", "model", "module")  # where training programs put the weights


# numpy's scalars, which metrics beside the weights often are.
_NUMBERS: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, *{type(np.dtype(kind)) for kind in "bhilqefdBHILQ?"}]


class Checkpoint(NamedTuple):
    state: dict[str, Any]  # tensors, where it is what it should be: the caller checks
    model_config: dict[str, Any]  # arguments of CLIP that the file tells


def read(path: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint in a file, on the CPU; ValueError where it is none or damaged, OSError where it cannot be read.

    dtype: what floating tensors become as they are read, so that two copies of a model are never there.
    """
    path.open("rb").close()  # if it may not be read, Python's own error says so
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path, dtype)
        if zipfile.is_zipfile(path):
            return _zip(path, dtype)
        with path.open("rb") as file:
            archive.scan(file)
        with torch.serialization.safe_globals(_NUMBERS):
            return _chosen(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or "Python objects" in str(error)):
            fault = "the file holds Python objects besides tensors, and clipfast runs no code from a checkpoint"
            named = f" ({first_line(error).split(': ')[-1]})" if "Python objects" in str(error) else ""
            raise ValueError(f"{path}: {fault}{named}: save model.state_dict() alone, or safetensors") from error
        if isinstance(error, _NoMappingError):
            raise ValueError(f"{path}: {error}") from error
        expected = "expected a TorchScript archive, PyTorch checkpoint or safetensors file"
        got = f"got {path.stat().st_size} bytes that are none, or cut short ({first_line(error)})"
        raise ValueError(f"{path}: {expected}, {got}: download or copy the file again") from error


class _NoMappingError(ValueError):
    """A whole file that holds something else."""


def _zip(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    with Archive(path) as held:
        if held.is_torchscript:
            state: Any = held.state()
            called = held.activations()
            # Its code tells the activation, where it calls one: what OpenAI's archives and traced models of open_clip do.
            chosen = Checkpoint(state, {"quick_gelu": called == {"quick_gelu"}} if called in _CALLS else {})
        else:
            chosen = _chosen(held.tree)
        state = {n: t.read(dtype) if isinstance(t, Stored) else t for n, t in chosen.state.items()}
        return Checkpoint(state, chosen.model_config)


def _chosen(tree: Any) -> Checkpoint:
    """The weights in what a training program saved."""
    if isinstance(tree, nn.Module) or not isinstance(tree, Mapping):
        got = "Tensor" if isinstance(tree, Tensor | Stored) else type(tree).__name__
        raise _NoMappingError(f"expected a mapping of names to tensors, got {got}: save model.state_dict()")
    home = next((tree[home] for home in HOMES if isinstance(tree.get(home), Mapping)), tree)
    told = tree.get("model_config", {})  # clipfast's own files carry it
    if not isinstance(told, Mapping):
        raise _NoMappingError(f"expected model_config to be a mapping, got {type(told).__name__}")
    _check_size(told)
    return Checkpoint(dict(home), dict(told))


def _check_size(told: Any) -> None:
    """Of what may be printed: a few lists that hold each other twice would be spelt out without end."""
    due, count = [told], 0
    while due:
        value, count = due.pop(), count + 1
        if count > PLACES:
            raise _NoMappingError(f"expected a model_config of at most {PLACES:,} values, got more")
        if isinstance(value, Mapping):
            due += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            due += value


_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def _safetensors(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    """Read, not mapped: tensors of a mapped file change or fault when somebody writes that file again."""
    with open(path, "rb") as stream:
        if (size := int.from_bytes(stream.read(8), "little")) > HEADER:
            raise ValueError(f"its header has {size:,} bytes, expected at most {HEADER:,}")
    with safetensors.safe_open(path, "pt") as file:  # it checks that sizes and places fit each other and the file
        told = (file.metadata() or {}).get("model_config")
    state = {}
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                stored = _TYPES[entry["dtype"]]
                stream.seek(8 + size + start)
                state[name] = archive.read(stream, (end - start) // stored.itemsize, stored, dtype).reshape(entry["shape"])
    return Checkpoint(state, parsed(told, "its model_config") if told else {})
