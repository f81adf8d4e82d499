"""A checkpoint of `clipfast.train`, read: torch.distributed.checkpoint's files, of which nothing is executed.

Its index is a pickle, of which only descriptions of tensors are made; each must lie in the files, in a place of its own, before
memory is taken for it. What differs in any way is a ValueError in one line.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import warnings
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from clipfast.files import first_line, read_parsed
from clipfast.weights.archive import Archive, Stored

ABOUT = "about.json"  # what is not a tensor, and the sizes and checksums of the files
INDEX = ".metadata"
DATA = re.compile(r"__\d+_\d+\.distcp")
NUMBER = int | float
TOLD: dict[str, Any] = {"step": int, "seconds": NUMBER, "config": dict, "model_config": dict, "scaler": dict, "files": dict}
# What earlier versions did not write.
MORE: dict[str, Any] = {"world": int, "order": dict, "checksum": int, "precision": str, "device": str}
PRECISIONS = ("fp32", "bf16", "fp16")
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


# ---- what a checkpoint says of itself ----------------------------------------------------------------------------------------


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


def sealed(about: dict[str, Any]) -> dict[str, Any]:
    """What is said, as JSON holds it, with its own checksum."""
    about = json.loads(json.dumps(about))
    return about | {"checksum": _checksum(about)}


def _checksum(about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in about.items() if k != "checksum"}, sort_keys=True).encode())


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, each field of its type; ValueError names the one that is not."""
    if not (path / ABOUT).is_file():  # a pipe would be waited for
        raise ValueError(f"{ABOUT} is missing, or no file")
    about = read_parsed(path / ABOUT)
    if missing := TOLD.keys() - about.keys():
        raise ValueError(f"{ABOUT} says nothing of {', '.join(sorted(missing))}")
    for name, value in about.items():
        kind = (TOLD | MORE).get(name)
        if kind is None or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{ABOUT} says {name}: {str(value)[:60]!r}, expected {kind or 'nothing of that name'}")
    if about["step"] < 0 or not 0 <= about["seconds"] < math.inf:
        raise ValueError(f"{ABOUT} says {about['step']} steps in {about['seconds']} s, expected numbers from 0 on")
    if (named := re.fullmatch(r"step_(\d+)", path.name)) and int(named[1]) != about["step"]:
        raise ValueError(f"{ABOUT} says step {about['step']}, expected {int(named[1])} by the folder's name")
    scaler = about["scaler"]
    if scaler and (scaler.keys() != SCALER or not all(isinstance(v, NUMBER) and 0 <= v < math.inf for v in scaler.values())):
        raise ValueError(f"{ABOUT} says scaler: {str(scaler)[:60]}, expected numbers for {', '.join(sorted(SCALER))}")
    if (precision := about.get("precision", "fp32")) not in PRECISIONS:
        raise ValueError(f"{ABOUT} says precision: {precision[:60]!r}, expected {', '.join(PRECISIONS)}")
    if INDEX not in about["files"] or not all(name == INDEX or DATA.fullmatch(name) for name in about["files"]):
        raise ValueError(f"{ABOUT} lists files {', '.join(about['files'])[:200]}, expected {INDEX} and those of {DATA.pattern}")
    if "checksum" in about and about["checksum"] != (got := _checksum(about)):
        raise ValueError(f"{ABOUT} has checksum {got}, expected {about['checksum']}")
    return about


def verify(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; ValueError where not all of its files are there and unharmed, it names what is not."""
    try:
        about = read_about(path)
        for name, expected in about["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"{name} is missing, or no file")
            size = (path / name).stat().st_size  # first: a file of another size need not be read
            if not isinstance(expected, list) or size != expected[0] or (got := fingerprint(path / name)) != expected:
                got = [size] if size != expected[0] else got
                raise ValueError(f"{name} has size and checksum {got}, expected {expected}")
        if unchecked := {chunk.file for entry in read_index(path).values() for chunk in entry.chunks} - about["files"].keys():
            raise ValueError(f"{ABOUT} says nothing of {', '.join(sorted(unchecked))}")
        return about
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        told = first_line(error).removeprefix(f"{path}/")
        raise ValueError(f"{path}: expected a whole checkpoint: {told}; take another, or remove it") from error


# ---- its index ---------------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Rows of a tensor, and where in the files they lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Entry(NamedTuple):
    """A tensor in a checkpoint: all of its rows, by the rank that wrote them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


class _Bag:
    """An instance of a class that is only named: its state, as it was pickled."""

    kind = ""
    state: Any = None

    def __new__(cls, *_: Any) -> _Bag:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


def _size(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 16 or not all(type(value) is int and value >= 0 for value in values):
        raise pickle.UnpicklingError(f"a tensor has the sizes or offsets {str(values)[:60]}")
    return values


class _TensorsOnly(pickle._Unpickler):  # type: ignore[name-defined]
    """The index of a checkpoint is a pickle: it may hold descriptions of tensors and nothing that could run.

    Python's unpickler: C's takes memory for 2**32 memos on a single instruction. What is not in `dispatch` is unknown.
    """

    MODULES = (
        "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
        "torch.distributed.tensor._dtensor_spec", "pathlib",
    )  # fmt: skip
    CODES = (
        "PROTO FRAME MARK STOP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1"
        " BINFLOAT SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT"
        " SETITEM SETITEMS STACK_GLOBAL GLOBAL NEWOBJ REDUCE BUILD"
    )
    dispatch = {
        code: call
        for name in CODES.split()
        for code, call in [(getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]])]  # type: ignore[attr-defined]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return _size
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in self.MODULES or (module, name) in (("torch.serialization", "_get_layout"), ("torch", "device")):
            return type("_Bag", (_Bag,), {"kind": name})
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no description of tensors")

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(made, _Bag):
            raise pickle.UnpicklingError(f"it gives attributes to a {type(made).__name__}")
        made.state = state

    def load_setitems(self) -> None:
        """Keys are names or single objects: a tuple could take for ever to hash."""
        items, made = self.pop_mark(), self.stack[-1]  # type: ignore[attr-defined]
        self._set(made, items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set(self.stack[-1], [key, value])  # type: ignore[attr-defined]

    def _set(self, made: Any, items: list[Any]) -> None:
        if not isinstance(made, dict) or not all(isinstance(key, str | _Bag) for key in items[::2]) or len(items) % 2:
            raise pickle.UnpicklingError("a mapping has keys that are no names")
        made.update(zip(items[::2], items[1::2], strict=True))

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem}  # type: ignore[dict-item]


def read_index(path: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint by name; ValueError where its index is damaged, or is more than a description of tensors."""
    try:
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if DATA.fullmatch(file.name)}
        data = (path / INDEX).read_bytes() if (path / INDEX).stat().st_size <= sum(sizes.values()) else b""
        tree = _TensorsOnly(io.BytesIO(data)).load()
        named, places = _field(tree, "Metadata", "state_dict_metadata"), _field(tree, "Metadata", "storage_data")
        where = {}
        for index, place in places.items():
            key = _field(index, "MetadataIndex", "fqn"), _size(_field(index, "MetadataIndex", "offset"))
            file, *span = (_field(place, "_StorageInfo", name) for name in ("relative_path", "offset", "length"))
            where[key] = (file, *_size(tuple(span)))
        entries = {name: _entry(name, described, where) for name, described in named.items()}
        _check_places(entries, sizes)
        return entries
    except Exception as error:  # a damaged pickle makes its reader raise nearly anything
        told = f"expected the index of a checkpoint, got a file that is none: {first_line(error)}"
        raise ValueError(f"{path / INDEX}: {told}; take another checkpoint") from error


def _field(bag: Any, kind: str, name: str) -> Any:
    if not isinstance(bag, _Bag) or bag.kind != kind or not isinstance(bag.state, dict) or name not in bag.state:
        raise ValueError(f"expected {kind}.{name}")
    return bag.state[name]


def _entry(name: Any, described: Any, where: Mapping[Any, tuple[Any, ...]]) -> Entry:
    if isinstance(described, _Bag) and described.kind != "TensorStorageMetadata":
        raise ValueError("it holds Python objects besides tensors")
    kind = _field(described, "TensorStorageMetadata", "properties").state[0]
    shape = _size(_field(described, "TensorStorageMetadata", "size"))
    chunks, end = [], 0
    if not isinstance(name, str) or not isinstance(kind, torch.dtype):
        raise ValueError("it describes a tensor without name or type")
    for chunk in _field(described, "TensorStorageMetadata", "chunks"):
        offsets, sizes = (_size(_field(chunk, "ChunkStorageMetadata", field)) for field in ("offsets", "sizes"))
        # In the order of the ranks, each has some whole rows.
        if len(offsets) != len(shape) or sizes[1:] != shape[1:] or offsets != (end, *[0] * (len(shape) - 1))[: len(shape)]:
            raise ValueError(f"parts of {name} do not make up its shape {list(shape)}")
        end += sizes[0] if sizes else 1
        chunks.append(Chunk(offsets, sizes, *where[name, offsets]))
    if end != (shape[0] if shape else 1):
        raise ValueError(f"parts of {name} do not make up its shape {list(shape)}")
    return Entry(kind, shape, chunks)


def _check_places(entries: Mapping[str, Entry], sizes: Mapping[str, int]) -> None:
    """ValueError unless each part lies in a file, large enough for it, and in no other's place."""
    parts = [(chunk, entry.dtype.itemsize, name) for name, entry in entries.items() for chunk in entry.chunks]
    ends: dict[str, int] = {}
    for chunk, itemsize, name in sorted(parts, key=lambda part: (str(part[0].file), part[0].start)):
        inside = chunk.file in sizes and ends.get(chunk.file, 0) <= chunk.start <= sizes[chunk.file] - chunk.length
        if not inside or math.prod(chunk.sizes) * itemsize > chunk.length:
            raise ValueError(f"{name} does not lie in {chunk.file} at [{chunk.start}, {chunk.start + chunk.length})")
        ends[chunk.file] = chunk.start + chunk.length


# ---- its tensors -------------------------------------------------------------------------------------------------------------


class Reader(dcp.FileSystemReader):
    """torch's reader, but nothing in the files is executed."""

    @cached_property
    def index(self) -> dict[str, Entry]:
        return read_index(Path(self.path))

    def shapes(self) -> dict[str, torch.Size]:
        return {name: torch.Size(entry.shape) for name, entry in self.index.items()}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[Entry, Chunk]] = {}
        for name, entry in self.index.items():
            chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
            described[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
            places |= {MetadataIndex(name, chunk.offsets): (entry, chunk) for chunk in entry.chunks}
        return Metadata(described, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            tensor = self._part(*self.storage_data[item.storage_index])
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dim, offset, length)
            planner.resolve_tensor(item).detach().copy_(tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, entry: Entry, chunk: Chunk) -> Tensor:
        with open(Path(self.path, chunk.file), "rb") as file:
            file.seek(chunk.start)
            with Archive(io.BytesIO(file.read(chunk.length))) as archive:
                stored = archive.tree
                if not isinstance(stored, Stored) or (stored.dtype, stored.shape) != (entry.dtype, chunk.sizes):
                    raise ValueError(f"{chunk.file} holds another tensor at {chunk.start} than the index says")
                return stored.read()


def fill(reader: Reader, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors (FSDP's parts too) from a checkpoint that has them all, in these shapes."""
    hush()
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is none of Exception's
        causes = getattr(error, "failures", None) or {0: error}
        cause = next(iter(causes.values()))
        told = first_line(cause[0] if isinstance(cause, tuple) else cause)
        raise ValueError(
            f"{reader.path}: expected the tensors of a checkpoint, got damaged ones: {told}; take another"
        ) from error


def weights(path: str | Path) -> dict[str, Any]:
    """The weights in a checkpoint, averaged ones where it has them, as `model.pt` holds them: for `clipfast.load`."""
    about, reader = verify(Path(path)), Reader(path)
    own = {name: entry for name, entry in reader.index.items() if name.startswith(("model.", "ema."))}
    model = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in own.items()}
    fill(reader, model)
    average = {name.removeprefix("ema."): tensor for name, tensor in model.items() if name.startswith("ema.")}
    state = {name.removeprefix("model."): tensor for name, tensor in model.items() if name.startswith("model.")} | average
    return {"state_dict": state, "model_config": about["model_config"]}
