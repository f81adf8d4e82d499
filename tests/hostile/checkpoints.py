"""Checkpoints of a training that were cut, damaged or tampered with: every one is the same load, or is refused in one line.

`python -m tests.hostile.checkpoints [COUNT [SEED [EVERY [FROM [SECONDS]]]]]` tries so many drawn ones beside the named ones (or
each EVERY-th from FROM on), within the seconds, each under a time limit and a limit of memory, and exits with 1 where one is
loaded as another, crashes, hangs, takes memory or runs anything.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from clipfast.cli import USER_ERRORS, _one_line
from clipfast.train import TrainConfig, train
from clipfast.weights import load
from tests.train.test_train import endless

SIZES = {
    "embed_dim": 8, "image_resolution": 32, "vision_layers": 1, "vision_width": 16, "vision_heads": 1, "vision_patch_size": 16,
    "context_length": 12, "vocab_size": 64, "transformer_width": 16, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip
SECONDS = 20  # for one checkpoint, of which a whole one takes 0.1
MEMORY = 1 << 30  # beyond what the process has when it begins, for a checkpoint of 200 kB
FILES = ("about.json", ".metadata", "__0_0.distcp")
Mutation = Callable[[Path], None]


def config(out: Path, **changes: Any) -> TrainConfig:
    quick: dict[str, Any] = {"model": SIZES, "batch_size": 8, "steps": 2, "precision": "fp32"}
    return TrainConfig(**quick | {"out": str(out), "tensorboard": False, "progress": False, "device": "cpu"} | changes)


# ---- what is done to one -----------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file named `executed` where the process stands."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def sealed_again(path: Path) -> None:
    """Sizes and checksums as they are now: what somebody does who means it."""
    with suppress(Exception):
        about = json.loads((path / "about.json").read_bytes())
        for name in about["files"]:
            data = (path / name).read_bytes()
            about["files"][name] = [len(data), zlib.crc32(data)]
        about.pop("checksum", None)
        (path / "about.json").write_text(json.dumps(about))


def edited(change: Callable[[dict], Any], file: str = "about.json") -> Mutation:
    def mutate(path: Path) -> None:
        about = json.loads((path / file).read_text())
        checksum = about["checksum"]
        about = change(about) or about
        if about.get("checksum") == checksum:  # of what it said before
            del about["checksum"]
        (path / file).write_text(json.dumps(about))

    return mutate


def reindexed(change: Callable[[Any], Any]) -> Mutation:
    def mutate(path: Path) -> None:
        index = pickle.loads((path / ".metadata").read_bytes())  # our own
        (path / ".metadata").write_bytes(pickle.dumps(change(index) or index))

    return mutate


def written(file: str, data: bytes) -> Mutation:
    return lambda path: (path / file).write_bytes(data) and None


def replaced(file: str, make: Callable[[Path], Any]) -> Mutation:
    def mutate(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return mutate


def part_replaced(make: Callable[[Tensor], bytes]) -> Mutation:
    """The bytes of one tensor by others, appended to the file; the index tells their place."""

    def mutate(path: Path) -> None:
        index = pickle.loads((path / ".metadata").read_bytes())
        key = next(key for key in index.storage_data if key.fqn == "model.text_projection")
        data = make(torch.zeros(index.state_dict_metadata[key.fqn].size))
        place = index.storage_data[key]
        place.offset, place.length = (path / place.relative_path).stat().st_size, len(data)
        with open(path / place.relative_path, "ab") as file:
            file.write(data)
        (path / ".metadata").write_bytes(pickle.dumps(index))

    return mutate


def as_zip(tensor: Tensor, method: int = zipfile.ZIP_STORED, more: bytes = b"", what: Any = None) -> bytes:
    """torch.save's bytes, packed in another way or with another object in them."""
    plain, made = io.BytesIO(), io.BytesIO()
    torch.save(tensor, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(made, "w", method) as target:
        for name in source.namelist():
            data = source.read(name)
            data = pickle.dumps(what, 2) if what is not None and name.endswith("data.pkl") else data
            target.writestr(name, data + more if "/data/" in name else data)
    return made.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def places(change: Callable[[Any], Any]) -> Mutation:
    """Of all tensors in the index."""

    def each(index: Any) -> None:
        for place in index.storage_data.values():
            change(place)

    return reindexed(each)


def first_entry(**fields: Any) -> Mutation:
    """Other values in the description of the text projection."""

    def change(index: Any) -> None:
        entry = index.state_dict_metadata["model.text_projection"]
        for name, value in fields.items():
            setattr(entry, name, value)

    return reindexed(change)


def set_size(*sizes: int) -> Mutation:
    def change(index: Any) -> None:
        entry = index.state_dict_metadata["model.text_projection"]
        entry.size = entry.chunks[0].sizes = torch.Size(sizes)

    return reindexed(change)


VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**70, 10**4000, float("inf"), float("nan"), -1e300, "", "x" * 100_000, "../../../etc/passwd",
    [], [[]], {}, {"a": {"b": [None]}}, [0] * 10_000, "\0", "\ud800",
]  # fmt: skip
DOUBLED = b"".join(b"h%c\x85h%c\x85\x86\x94" % (i, i) for i in range(99))  # each a pair of the one before: 2**99 in all
DEEP = '{"step": ' + "[" * 100_000 + "]" * 100_000 + "}"


def fields(about: Any, where: tuple = ()) -> Iterator[tuple]:
    """The place of every value in a tree."""
    items = about.items() if isinstance(about, dict) else enumerate(about) if isinstance(about, list) else ()
    for key, value in items:
        yield (*where, key)
        yield from fields(value, (*where, key))


def set_at(where: tuple, value: Any, remove: bool = False) -> Callable[[dict], None]:
    def change(about: dict) -> None:
        inner: Any = about
        for key in where[:-1]:
            inner = inner[key]
        if remove:
            del inner[where[-1]]
        else:
            inner[where[-1]] = value

    return change


def named(about: dict[str, Any]) -> Iterator[tuple[str, Mutation, bool]]:
    """(name, what it does, whether checksums are made right afterwards)."""
    for file in FILES:
        for seal in (False, True):
            yield f"{file} empty", written(file, b""), seal
            yield (
                f"{file} of zeros",
                lambda path, file=file: (path / file).write_bytes(bytes((path / file).stat().st_size)),
                seal,
            )
            yield f"{file} twice", lambda path, file=file: (path / file).write_bytes((path / file).read_bytes() * 2), seal
        yield f"{file} missing", lambda path, file=file: (path / file).unlink(), False
        yield f"{file} a folder", replaced(file, lambda path: path.mkdir()), False
        yield f"{file} a pipe", replaced(file, lambda path: os.mkfifo(path)), False
        yield f"{file} endless", replaced(file, lambda path: path.symlink_to("/dev/zero")), False
        yield f"{file} a circle", replaced(file, lambda path: path.symlink_to(path)), False
    for where in fields(about):
        if where[0] != "config" or len(where) < 3:
            yield f"without {where}", edited(set_at(where, None, remove=True)), False
    for where in {(key,) for key in about} | {
        ("files", ".metadata"),
        ("files", ".metadata", 0),
        ("model_config", "vision_heads"),
    }:
        for value in VALUES:
            yield f"{where} = {str(value)[:30]!r}", edited(set_at(where, value)), False
    yield "one more field", edited(lambda about: {**about, "more": 1}), False
    yield "a file elsewhere", edited(lambda about: about["files"].update({"../../log.jsonl": [0, 0]})), False
    for text in (DEEP, "[1]", "null", "{", '{"step": 1' + "0" * 10_000 + "}", "\ufeff{}", "\ud800"):
        yield f"about.json {text[:20]!r}", written("about.json", text.encode(errors="surrogatepass")), False

    for name, change in {
        "evil": lambda index: setattr(index, "planner_data", Evil()),
        "evil beside the tensors": lambda index: index.state_dict_metadata.update(more=Evil()),
        "an object": lambda index: index.state_dict_metadata.update(more=BytesStorageMetadata()),
        "no tensors": lambda index: index.state_dict_metadata.clear(),
        "no places": lambda index: index.storage_data.clear(),
        "nothing": lambda index: setattr(index, "state_dict_metadata", None),
        "a list": lambda index: [1, 2],
        "a chunk less": lambda index: index.state_dict_metadata["model.text_projection"].chunks.clear(),
        "a tensor more": lambda index: index.state_dict_metadata.update(
            {"model.more": index.state_dict_metadata["model.text_projection"]}
        ),
        "a name that is none": lambda index: index.state_dict_metadata.update(
            {7: index.state_dict_metadata["model.ln_final.bias"]}
        ),
        "a chunk twice": lambda index: index.state_dict_metadata["model.text_projection"].chunks.append(
            index.state_dict_metadata["model.text_projection"].chunks[0]
        ),
    }.items():
        yield f"index: {name}", reindexed(change), True
    for sizes in ((16,), (8, 16), (16, 8, 1), (1 << 40, 8), (1 << 62, 1 << 62), (0, 8), ()):
        yield f"index: size {sizes}", set_size(*sizes), True
    yield (
        "index: another dtype",
        first_entry(properties=torch.distributed.checkpoint.metadata.TensorProperties(torch.int64)),
        True,
    )
    yield "index: no dtype", first_entry(properties=None), True
    yield "index: chunks of another kind", first_entry(chunks="abc"), True
    for field, value in (
        ("offset", 0), ("offset", -1), ("offset", 1 << 62), ("length", 0), ("length", 1 << 50), ("length", -1), ("offset", 1.5),
        ("relative_path", "../../model.pt"), ("relative_path", "/etc/passwd"), ("relative_path", "/dev/zero"),
        ("relative_path", 7), ("relative_path", "about.json"), ("relative_path", ""), ("transform_descriptors", ["zstd"]),
    ):  # fmt: skip
        yield f"index: {field} = {value}", places(lambda place, f=field, v=value: setattr(place, f, v)), True
    for code, data in {
        "a hidden call": b"cos\nmkdir\n(Vexecuted\ntR.",
        "2**32 memos": b"\x80\x04Nr\xff\xff\xff\xff.",
        "bytes of 2**60": b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".",
        "an array of 2**60": b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".",
        "a frame of 2**60": b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b".",
        "a key that is for ever to hash": b"\x80\x04}()\x94" + DOUBLED + b"K\x01u.",
        "a value that is for ever to print": b"\x80\x04)\x94" + DOUBLED + b".",
        "a set": b"\x80\x04\x8f(K\x01K\x02\x90.",
        "a persistent one": b"\x80\x04K\x01Q.",
        "an extension": b"\x80\x04\x82\x01.",
        "nothing on the stack": b"\x80\x04R.",
        "deep": b"\x80\x04" + b"(" * 100_000 + b"l" * 100_000 + b".",
        "a module of ours": b"cclipfast.cli\nmain\n)R.",
        "a function of torch": b"ctorch\nempty\n(J\xff\xff\xff\x7ftR.",
        "an attribute of a dtype": b"\x80\x04\x8c\x05torch\x8c\x0dfloat32.__new\x93.",
    }.items():  # fmt: skip
        yield f"index: {code}", written(".metadata", data), True

    for name, make in {
        "another shape": lambda tensor: saved(tensor[:3].clone()),
        "another dtype": lambda tensor: saved(tensor.double()),
        "a list": lambda tensor: saved([tensor]),
        "nothing": lambda tensor: b"",
        "evil": lambda tensor: as_zip(tensor, what=Evil()),
        "the old format": lambda tensor: pickle.dumps(Evil()),
        "a bomb": lambda tensor: as_zip(tensor, zipfile.ZIP_DEFLATED, more=bytes(1 << 28)),
        "more than it needs": lambda tensor: as_zip(tensor, more=bytes(1 << 20)),
        "an expanded one": lambda tensor: saved(torch.zeros(1).expand(tensor.shape)),
        "a sparse one": lambda tensor: saved(tensor.to_sparse()),
        "a number": lambda tensor: saved(3),
    }.items():
        yield f"tensor: {name}", part_replaced(make), True
    yield "tensor: random numbers", lambda path: flip_in_random_numbers(path), True


def flip_in_random_numbers(path: Path) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    place = next(place for key, place in index.storage_data.items() if key.fqn.startswith("rng."))
    with open(path / place.relative_path, "r+b") as file:
        file.seek(place.offset)
        data = bytearray(file.read(place.length))
        start = data.index(b"FB") + 200
        data[start : start + 4000] = b"\xff" * 4000
        file.seek(place.offset)
        file.write(data)


def drawn(seed: int) -> tuple[str, Mutation, bool]:
    """One at random: bytes changed, cut out, put in, or the file cut, in one of the files."""
    rng = random.Random(seed)
    file, kind, seal = rng.choice(FILES), rng.choice(("flip", "cut", "remove", "insert")), rng.random() < 0.5

    def mutate(path: Path) -> None:
        data = bytearray((path / file).read_bytes())
        at = rng.randrange(len(data) if rng.random() < 0.7 else 400)
        if kind == "flip":
            for _ in range(rng.choice((1, 1, 4, 64))):
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
                at = rng.randrange(len(data))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + rng.choice((1, 8, 1000))]
        else:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
        (path / file).write_bytes(data)

    return f"{kind} {seed} in {file}", mutate, seal


# ---- what comes of it --------------------------------------------------------------------------------------------------------


class HungError(BaseException):
    pass


def ring(*_: Any) -> None:
    raise HungError


def outcome(read: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor]) -> str:
    """same, other, refused, or what is wrong."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        got = read()
    except USER_ERRORS as error:
        line = _one_line(error)
        helps = any(words in line for words in ("expected ", "pass ", "there is no model of sizes"))
        return "refused" if helps else f"a line that does not help: {line}"
    except HungError:
        return "hung"
    except BaseException as error:
        return f"{type(error).__name__}: {error}: " + "".join(traceback.format_tb(error.__traceback__)[-2:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    same = got.keys() == expected.keys() and all(torch.equal(got[name], value) for name, value in expected.items())
    return "same" if same else "other"


def make(out: Path) -> dict[str, Tensor]:
    """A run of two steps in `out`; returns its weights."""
    return train(config(out), endless).model.state_dict()


def attempts(count: int, seed: int, every: int, start: int, about: dict[str, Any]) -> Iterator[tuple[str, Mutation, bool]]:
    yield from islice(named(about), start % every, None, every)
    yield from (drawn(seed + i) for i in range(count))


def main(count: int = 200, seed: int = 0, every: int = 1, start: int = 0, seconds: float = math.inf) -> Counter[str]:
    """Try them; what is wrong is printed. Counts of outcomes."""
    end, cut = time.monotonic() + seconds, ""
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, ring)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        expected = make(Path("whole"))
        train(config(Path("whole"), resume="auto"), endless)  # what is imported late is there
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        about = json.loads(Path("whole/checkpoints/step_00000002/about.json").read_text())
        for name, mutate, seal in attempts(count, seed, every, start, about):
            if time.monotonic() > end:
                cut = f"; cut short after {seconds / 60:.1f} minutes"
                break
            for kind in ("load", "resume"):
                run = Path("run")
                shutil.copytree("whole", run)
                path = run / "checkpoints" / "step_00000002"
                mutate(path)
                if seal:
                    sealed_again(path)
                read = {
                    "load": lambda path=path: load(str(path), "cpu")[0].state_dict(),
                    "resume": lambda run=run: train(config(run, resume="auto"), endless).model.state_dict(),
                }[kind]
                found = outcome(read, expected)
                if found == "other" and not seal and "model_config" not in name:
                    found = "loaded as another"
                if Path("executed").exists():
                    Path("executed").rmdir()
                    found = "something was executed"
                counts[found if found in ("same", "other", "refused") else "WRONG"] += 1
                if found not in ("same", "other", "refused"):
                    print(f"{kind}: {name}{' (sealed again)' if seal else ''}: {found}", flush=True)
                shutil.rmtree(run)
        os.chdir("/")
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    print(f"{counts.total()} damaged checkpoints: {told}{cut}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:5]), *map(float, sys.argv[5:]))["WRONG"]))
