"""The tensors of a zip that PyTorch or TorchScript wrote, of which nothing is executed: no code of either kind.

Such a file is a zip with an index, `data.pkl`, and one entry of plain bytes for each storage. Whatever the index may say, only
tensors, containers and numbers come of it; a TorchScript class becomes a bag of attributes, any other class is refused.
Sizes are checked against the file before memory is taken, and only the tensors that are asked for are read.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import reprlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

INDEX = 8 << 20  # bytes of a pickle: one byte of it takes up to 60 of memory
UNPACKED = 256 << 20  # bytes of all compressed entries: TorchScript compresses its code, storages are never compressed
_PIECE = 1 << 15  # elements converted at a time: of 2**20 the allocator kept what they took, a quarter of the model
UNFOLDED = 10_000  # places in a tuple and the tuples in it: a hash visits each of them, however often one is shared
NAMES = 100_000  # of tensors: modules that hold each other could spell out any number


class Stored(NamedTuple):
    """A tensor that still lies in the file."""

    archive: Archive
    entry: str
    dtype: torch.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Its own part of its storage, in memory of its own, as ``dtype`` if it is floating."""
        self.archive.seek(self.entry, self.offset * self.dtype.itemsize)
        file = _Summed(self.archive.file)
        made = read(file, _extent(self.shape, self.stride), self.dtype, dtype).as_strided(self.shape, self.stride)
        self.archive.verify(self.entry, file)
        return made


class _Summed:
    """A file, and the count and the checksum of what was read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.crc = file, 0, 0

    def readinto(self, buffer: Any) -> int:
        got = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.count, self.crc = self.count + got, zlib.crc32(memoryview(buffer)[:got], self.crc)
        return got


def read(file: IO[bytes] | _Summed, count: int, stored: torch.dtype, dtype: torch.dtype | None) -> Tensor:
    """The next elements of a file, [count], as ``dtype`` if they are floating: then in pieces, without a second whole copy."""
    if not dtype or dtype == stored or not stored.is_floating_point:
        return _next(file, count, stored)
    out = torch.empty(count, dtype=dtype)
    for piece in out.split(_PIECE):
        piece.copy_(_next(file, len(piece), stored))
    return out


def _next(file: IO[bytes] | _Summed, count: int, dtype: torch.dtype) -> Tensor:
    data = torch.empty(count, dtype=dtype)
    if count and file.readinto(data.view(torch.uint8).numpy()) != data.nbytes:  # type: ignore[union-attr]
        raise ValueError("a tensor ends too early")
    return data


class Object:
    """An instance of a TorchScript class, as its attributes."""

    module = name = ""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *_: Any) -> Object:
        made = super().__new__(cls)
        made.attributes = {}
        return made


class Archive:
    """`with Archive(file) as archive`: the tree that the index describes, tensors as `Stored`.

    Raises ValueError, pickle.UnpicklingError, zipfile.BadZipFile or whatever a damaged index makes its reader raise.
    """

    def __init__(self, file: Path | IO[bytes]) -> None:
        self.file: IO[bytes] = open(file, "rb") if isinstance(file, Path) else file  # noqa: SIM115 - closed by __exit__
        try:
            self.zip = zipfile.ZipFile(self.file)
            self.entries = _checked(self.zip)
            self.verified: set[str] = set()
            index = next((name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")), None)
            if index is None:
                raise ValueError("the zip holds no data.pkl")
            self.root = index.removesuffix("data.pkl")
            self.is_torchscript = f"{self.root}constants.pkl" in self.entries
            if f"{self.root}byteorder" in self.entries and self._small(f"{self.root}byteorder") != b"little":
                raise ValueError("its bytes are in the order of a big-endian machine")
            self.sources: dict[str, str] = {}
            self.tree: Any = _Index(self, io.BytesIO(self._small(index))).load()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()

    def _small(self, entry: str) -> bytes:
        if (size := self.entries[entry].file_size) > INDEX:
            raise ValueError(f"{entry} has {size:,} bytes, expected at most {INDEX:,}")
        info = self.entries[entry]
        if not info.CRC:  # torch.serialization.set_crc32_options(False)
            info.CRC = None  # type: ignore[assignment]
        return self.zip.read(info)

    def seek(self, entry: str, start: int) -> None:
        """To that byte of an entry that is not compressed."""
        self.file.seek(self.entries[entry].header_offset + 26)  # the local header: 30 bytes, the name, an extra field
        name, extra = (int.from_bytes(self.file.read(2), "little") for _ in range(2))
        self.file.seek(name + extra + start, io.SEEK_CUR)

    def verify(self, entry: str, read: _Summed) -> None:
        """ValueError where an entry is damaged: PyTorch looks at no checksum, and takes what a disk has made of a weight."""
        info = self.entries[entry]
        if entry in self.verified or not info.CRC:  # without: torch.serialization.set_crc32_options(False)
            return
        if read.count != info.file_size:  # tensors that share a storage
            self.seek(entry, 0)
            read, left = _Summed(self.file), info.file_size
            block = memoryview(bytearray(min(left, 1 << 20)))
            while left and (got := read.readinto(block[:left])):
                left -= got
        if read.crc != info.CRC:
            raise ValueError(f"{entry} has the checksum {read.crc:08x}, expected {info.CRC:08x}")
        self.verified.add(entry)

    # ---- what TorchScript's classes say of themselves

    def state(self) -> dict[str, Stored]:
        """The state dict of the TorchScript module that the archive holds."""
        state: dict[str, Stored] = {}
        for name, tensor in self._named(self.tree, "", ()):
            state[name] = tensor
            if len(state) > NAMES:
                raise ValueError(f"its modules hold more than {NAMES:,} tensors")
        return state

    def _named(self, module: Object, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Stored]]:
        if id(module) in above:
            raise ValueError(f"the module {prefix[:-1]} holds itself")
        members = self._members(module.module, module.name) if isinstance(module, Object) else None
        if members is None:
            return
        for member in members:
            if isinstance(tensor := module.attributes.get(member), Stored):
                yield prefix + member, tensor
        for name, value in module.attributes.items():
            if isinstance(value, Object):
                yield from self._named(value, f"{prefix}{name}.", (*above, id(module)))

    def _members(self, module: str, name: str) -> list[str] | None:
        """The parameters and buffers of a class; None if it is no module."""
        if module not in self.sources:
            self.sources[module] = self._source(module)
        source = self.sources[module]
        found = re.search(rf"^class {re.escape(name)}\(Module\):\n((?:  __\w+__ = \[.*\]\n)*)", source, re.MULTILINE)
        lists = dict(re.findall(r"  (__\w+__) = \[(.*)\]\n", found[1])) if found else {}
        named = [re.findall(r'"([^"]*)"', lists.get(kind, "")) for kind in ("__parameters__", "__buffers__")]
        return sum(named, []) if found else None

    def _source(self, module: str) -> str:
        """The text of the classes of a TorchScript module, never run."""
        entry = f"{self.root}code/{module.replace('.', '/')}.py"
        return self._small(entry).decode() if entry in self.entries else ""

    def activations(self) -> set[str]:
        """The activations of MLPs that the code of its classes calls; call `state` first."""
        calls = {call for text in self.sources.values() for call in re.findall(r"torch\.(gelu\(.*|sigmoid\()", text)}
        return {"quick_gelu" if call == "sigmoid(" else "gelu_tanh" if '"tanh"' in call else "gelu" for call in calls}


def _checked(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name; ValueError where they cannot all be in the file, each in its own place."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    unpacked = 0
    for entry, end in zip(entries, ends, strict=True):
        if entry.header_offset + 30 + len(entry.orig_filename.encode()) + entry.compress_size > end:
            raise ValueError(f"{entry.filename} overlaps what follows it")
        if entry.compress_type == zipfile.ZIP_STORED:
            if entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} claims {entry.file_size:,} bytes and has {entry.compress_size:,}")
        else:
            unpacked += entry.file_size
    if unpacked > UNPACKED:
        raise ValueError(f"its compressed entries would take {unpacked:,} bytes, expected at most {UNPACKED:,}")
    named = {entry.filename: entry for entry in entries}
    if len(named) != len(entries):
        raise ValueError("two of its entries have one name")
    return named


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class _Storage(NamedTuple):
    entry: str
    dtype: torch.dtype | None  # None: bytes
    size: int  # bytes


class _Index(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's unpickler, not C's: that one takes memory for 2**32 memos on a single instruction."""

    # An instruction that is not here is an unknown one. BYTEARRAY8 would take as much memory as it claims.
    dispatch = {
        code: call
        for code, call in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ)
        and bytes([code]) != pickle.FROZENSET
    }

    def __init__(self, archive: Archive, data: IO[bytes]) -> None:
        super().__init__(data, encoding="utf-8")
        self.archive, self.places = archive, dict[int, int]()  # id of a tuple -> what UNFOLDED bounds

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        """Refused where its hash would take for ever, as of one that holds one twice that holds one twice, or all the stack."""
        made = tuple(items)
        self.places[id(made)] = count = 1 + sum(self.places.get(id(item), 1) if type(item) is tuple else 1 for item in items)
        if count > UNFOLDED and any(type(item) is tuple for item in items):
            raise pickle.UnpicklingError(f"it holds a tuple of tuples with more than {UNFOLDED:,} places")
        return made

    def load_tuple(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.stack.append(self._tuple(items))  # type: ignore[attr-defined]

    def load_tuple1(self) -> None:
        self.stack[-1:] = [self._tuple(self.stack[-1:])]  # type: ignore[attr-defined]

    def load_tuple2(self) -> None:
        self.stack[-2:] = [self._tuple(self.stack[-2:])]  # type: ignore[attr-defined]

    def load_tuple3(self) -> None:
        self.stack[-3:] = [self._tuple(self.stack[-3:])]  # type: ignore[attr-defined]

    dispatch |= {pickle.TUPLE[0]: load_tuple, pickle.TUPLE1[0]: load_tuple1}  # type: ignore[dict-item]
    dispatch |= {pickle.TUPLE2[0]: load_tuple2, pickle.TUPLE3[0]: load_tuple3}  # type: ignore[dict-item]

    def load_build(self) -> None:
        """An object takes its state; an ordered dict does without its attributes; nothing else is changed."""
        state, made = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(made, Object):
            made.attributes = state if isinstance(state, dict) else {}
        elif not isinstance(made, collections.OrderedDict):
            raise pickle.UnpicklingError(f"it gives attributes to a {type(made).__name__}")

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__" or (module.split(".")[0], name) in _NUMBERS:
            return type(name, (Object,), {"module": module, "name": name})
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if builder := _BUILDERS.get((module, name)):
            return getattr(self, builder)
        if module == "torch" and (dtype := _STORAGES.get(name)):
            return dtype
        if module in ("torch", "torch.storage") and name == "UntypedStorage":
            return torch.UntypedStorage
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it holds Python objects besides tensors: {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError(f"expected a storage, got {reprlib.repr(pid)}")
        entry = f"{self.archive.root}data/{key}"
        info = self.archive.entries.get(entry)
        size = count * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)
        if info is None or info.compress_type != zipfile.ZIP_STORED or size > info.file_size:
            raise ValueError(f"{entry} should hold {size:,} bytes as they are and does not")
        return _Storage(entry, dtype if isinstance(dtype, torch.dtype) else None, size)

    def tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Stored:
        """`_rebuild_tensor_v2`, and v3 whose last argument but one is the dtype."""
        dtype = storage.dtype or next((value for value in rest if isinstance(value, torch.dtype)), torch.uint8)
        shape, stride = tuple(shape), tuple(stride)
        numbers = [offset, *shape, *stride]
        if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"a tensor of {storage.entry} has shape {shape} and strides {stride}")
        extent, count = _extent(shape, stride), 1
        for size in shape:
            count *= size
        if (offset + extent) * dtype.itemsize > storage.size or count > extent:
            raise ValueError(f"a tensor of shape {list(shape)} does not fit {storage.entry} of {storage.size:,} bytes")
        return Stored(self.archive, storage.entry, dtype, offset, shape, stride)

    def sizes(self, values: Any = ()) -> tuple[Any, ...]:
        return self._tuple([*values])

    def first(self, value: Any, *_: Any) -> Any:
        """A parameter is its tensor; a list with its TorchScript type is the list."""
        return value

    def rebuilt(self, function: Any, _: Any, arguments: tuple[Any, ...], *__: Any) -> Any:
        """A tensor that has attributes, without them."""
        if function not in (self.tensor, self.first):
            raise pickle.UnpicklingError("it holds a tensor of an unknown kind")
        return function(*arguments)


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{"Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64},
        **{"Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64},
        "Bool": torch.bool,
    }.items()
}
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,
    ("torch", "device"): str,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch.nn.parameter", "Parameter"): None,  # named beside a tensor with attributes, never called
}
_BUILDERS = {
    ("torch", "Size"): "sizes",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "first",
    ("torch._utils", "_rebuild_parameter_with_state"): "first",
    ("torch._tensor", "_rebuild_from_type_v2"): "rebuilt",
    **{("torch.jit._pickle", name): "first" for name in ("restore_type_tag", "build_intlist", "build_tensorlist")},
    **{("torch.jit._pickle", name): "first" for name in ("build_doublelist", "build_boollist")},
}
# numpy's scalars among metadata: they are not used, and so not made.
_NUMBERS = {("numpy", "scalar"), ("numpy", "dtype"), ("_codecs", "encode")} | {
    ("numpy", f"{kind}DType") for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Int8", "UInt8", "Bool", "Str")
}


class _Scan(_Index):
    """The index of an older pickle, which torch reads: made of the same objects, to see that it holds nothing else."""

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage("", pid[1] if isinstance(pid[1], torch.dtype) else None, 0)

    def tensor(self, storage: _Storage, *_: Any) -> Stored:
        return Stored(self.archive, "", torch.uint8, 0, (), ())


def scan(file: IO[bytes]) -> None:
    """pickle.UnpicklingError, or whatever a damaged index raises, for an older pickle that torch's reader would run out of time
    or stack on: its four parts before the storages."""
    for _ in range(4):  # a magic number, the version, the system, the tree
        _Scan(None, file).load()  # type: ignore[arg-type]
