"""Shards of odd or damaged tars against Python's own reader of tars: the same samples, none lost without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import random
import tarfile
from pathlib import Path

from clipfast.data import Shards
from clipfast.data.samples import IMAGES
from clipfast.data.shards import MEMBER
from tests.hostile.harness import Attempt, mutated

PACKED = {
    "": bytes,
    "gz": lambda data: gzip.compress(data, 1),
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}
UNPACK = {"gz": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}
FIELDS = ("jpg", "png", "JPG", "txt", "json", "cls", "npy", "input.jpg", "webp")
KEYS = ("a", "b", "01", "dir/x", "./y", "dir.with.dots/z", "ü", "k" * 120, "päth/" + "q" * 300, "..", "a b", "-", "\U0001f600")
CLAIM = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }" + b" " * 40 + b"\n"
NASTY = (
    *(b'{"caption": "x"}', b'{"caption": ["x"]}', b"[" * 50_000, b"{", b"null", b"7", b"-1", b"1.5", b"9" * 5000),
    *(b"\xff\xfe", b"", CLAIM),
)
FILE, OTHERS = tarfile.REGTYPE, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.AREGTYPE)


def a_tar(rng: random.Random) -> bytes:
    """A tar of a few samples: doubled files, links, folders, long names, sparse ends and every header format that there is."""
    buffer = io.BytesIO()
    kind = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
        for key in rng.choices(KEYS, k=rng.randrange(0, 6)):
            for field in rng.choices(FIELDS, k=rng.randrange(1, 5)):
                info = tarfile.TarInfo(f"{key}.{field}" if rng.random() < 0.95 else key)
                nasty = field in ("json", "cls", "npy", "txt")
                content = rng.choice(NASTY) if nasty else rng.randbytes(rng.choice((0, 1, 511, 512, 2000)))
                info.type = rng.choice((FILE,) * 12 + OTHERS)
                info.size = len(content) if info.isreg() else 0
                info.linkname = "/etc/passwd" if info.issym() or info.islnk() else ""
                info.mtime, info.pax_headers = rng.choice((0, 1.5, 2**33)), rng.choice(({}, {}, {"comment": "ü" * 600}))
                try:
                    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
                except ValueError:  # a name that this format has no place for
                    continue
    return buffer.getvalue()


def plain(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """What Python's tarfile reads of a tar that is not packed, and whether it is whole: with its end mark where it stops."""
    found, whole = [], False
    stream = io.BytesIO(data)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if len(content) != member.size:
                        return found, False
                    found.append((member.name, content))
            whole = data[tar.offset : tar.offset + 512] == bytes(512) and tar.offset < len(data)  # type: ignore[attr-defined]
    except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError, UnicodeError, RecursionError):
        pass
    return found, whole


def grouped(files: list[tuple[str, bytes]]) -> list[tuple[str, dict[str, bytes]]]:
    """Neighbours of one key; a field that comes again begins another sample."""
    groups: list[tuple[str, dict[str, bytes]]] = []
    for name, content in files:
        if match := MEMBER.fullmatch(name):
            key, field = match[1], match[2].lower()
            if not groups or groups[-1][0] != key or field in groups[-1][1]:
                groups.append((key, {}))
            groups[-1][1][field] = content
    return groups


def prepare(folder: Path) -> Attempt:
    logging.disable(logging.WARNING)

    def attempt(rng: random.Random) -> str:
        data, packing = a_tar(rng), rng.choice((*PACKED, "", ""))
        inside = mutated(data, rng) if rng.random() < 0.6 else data
        packed = PACKED[packing](inside)
        broken = bool(packing) and rng.random() < 0.4
        packed = mutated(packed, rng) if broken else packed
        path = folder / f"x.tar{packing and f'.{packing}'}"
        path.write_bytes(packed)
        found = list(Shards(str(path), label_field=rng.choice(("", "npy"))).samples())
        shard_errors = [sample for sample in found if sample.meta.get("shard")]
        if len(shard_errors) > 1 or (shard_errors and found[-1] is not shard_errors[0]):
            return f"{len(shard_errors)} errors of one shard, or not at its end"
        if any(len(sample.error.splitlines()) > 1 for sample in found):
            return f"an error of more than one line: {[sample.error for sample in found if sample.error]}"
        if broken:
            if not shard_errors:
                try:
                    again = UNPACK[packing](packed)
                except Exception as error:
                    if packed[:2] == b"\x1f\x8b" or packed[:3] == b"BZh" or packed[:6] == b"\xfd7zXZ\0":
                        # What follows the tar's end mark is not read, and so not found to be broken.
                        return "" if len(found) >= len(grouped(plain(inside)[0])) else f"{error} is not told"
                    again = packed  # no longer a packed file to anybody
                inside = again
            else:
                return ""
        files, whole = plain(inside)
        expected, got = grouped(files), [sample for sample in found if not sample.meta.get("shard")]
        if not shard_errors and not whole:
            return f"an end that is none is not told: {len(files)} files, {len(inside)} bytes"
        if shard_errors and whole and "raise max" not in shard_errors[0].error:
            return f"a whole tar is refused: {shard_errors[0].error}"
        if [sample.key for sample in got] != [key for key, _ in expected][: len(got)]:
            return f"expected {[key for key, _ in expected]}, got {[sample.key for sample in got]}"
        if len(got) < len(expected) - (1 if shard_errors else 0):
            return f"expected {len(expected)} samples, got {len(got)}; {[s.error for s in shard_errors]}"
        for number, (sample, (key, fields)) in enumerate(zip(got, expected, strict=False)):
            if sample.error:
                if not (fields.keys() & {"json", "cls", "npy"}) and "again" not in sample.error:
                    return f"{key} is refused: {sample.error}"
                continue
            if number == len(got) - 1 and shard_errors:
                continue  # broken off within it
            image = next((fields[kind] for kind in IMAGES if kind in fields), None)
            caption = fields["txt"].decode("utf-8", "replace") if "txt" in fields else None
            if "txt" not in fields and "json" in fields:
                told = json.loads(fields["json"])
                caption = told.get("caption") if isinstance(told, dict) and isinstance(told.get("caption"), str) else None
            if sample.image != image or sample.caption != caption:
                return f"{key}: expected {image!r:.40} and {caption!r:.40}, got {sample.image!r:.40} and {sample.caption!r:.40}"
        return ""

    return attempt
