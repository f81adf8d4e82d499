"""A checkpoint of `clipfast.train`, read: torch.distributed.checkpoint's files, of which nothing is executed."""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

ABOUT = "about.json"  # what is not a tensor, and the sizes and checksums of the files
TOLD = {"step", "seconds", "config", "model_config", "scaler", "files"}


def hush() -> None:
    """torch.distributed.checkpoint warns at every call that there is one process, where one is meant."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def fingerprint(file: Path) -> list[int]:
    """Size and CRC-32: at 2 GB/s in a thread of its own, it costs the training nothing."""
    crc = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return [file.stat().st_size, crc]


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return json.loads((path / ABOUT).read_text())


def verify(path: Path) -> None:
    """ValueError where not all of a checkpoint's files are there and unharmed; it names what is not."""
    try:
        about = read_about(path)
        if missing := TOLD - about.keys():
            raise ValueError(f"{ABOUT} says nothing of {', '.join(sorted(missing))}")
        for name, expected in about["files"].items():
            if (got := fingerprint(path / name)) != expected:
                raise ValueError(f"{name} has size and checksum {got}, expected {expected}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a whole checkpoint: {error}; take another, or remove it") from error


class _TensorsOnly(pickle.Unpickler):
    """The index of a checkpoint is a pickle: it may hold descriptions of tensors and nothing that could run."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    OTHERS = {
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        ("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in self.MODULES or module == "torch" else None
        if (module, name) in self.OTHERS:
            return super().find_class(module, name)
        if isinstance(found, torch.dtype) or (isinstance(found, type) and found.__module__ == module and module != "torch"):
            return found
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no description of tensors")


class Reader(dcp.FileSystemReader):
    """torch's reader, but nothing in the files is executed."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path, ".metadata")
        try:
            with open(path, "rb") as file:
                metadata = _TensorsOnly(file).load()
            if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
                raise pickle.UnpicklingError("it holds Python objects besides tensors")
        except Exception as error:
            raise ValueError(f"{path}: expected the index of a checkpoint, got a file that is none: {error}") from error
        return metadata

    def shapes(self) -> dict[str, torch.Size]:
        entries = self.read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def weights(path: str | Path) -> dict[str, Any]:
    """The weights in a checkpoint, averaged ones where it has them, as `model.pt` holds them: for `clipfast.load`."""
    verify(Path(path))
    about, reader = read_about(Path(path)), Reader(path)
    model = {name: torch.empty(shape) for name, shape in reader.shapes().items() if name.startswith(("model.", "ema."))}
    dtypes = {n: e.properties.dtype for n, e in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    model = {name: tensor.to(dtypes[name]) for name, tensor in model.items()}
    hush()
    dcp.load(model, storage_reader=reader, no_dist=True)
    average = {name.removeprefix("ema."): tensor for name, tensor in model.items() if name.startswith("ema.")}
    state = {name.removeprefix("model."): tensor for name, tensor in model.items() if name.startswith("model.")} | average
    return {"state_dict": state, "model_config": about["model_config"]}
