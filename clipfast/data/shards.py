"""WebDataset tars: samples out of shards, wherever they lie."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import logging
import lzma
import math
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from webdataset.filters import shuffle as shuffled
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from clipfast.data.samples import IMAGES, Sample, text_of
from clipfast.files import first_line

log = logging.getLogger(__name__)
# What an address out of a file may be: neither a command nor one of fsspec's protocols that run programs or read other files.
REMOTE = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "oss", "hdfs", "webhdfs")
TEXT = 4 << 20  # bytes of a sample's caption, metadata or class: parsed they take up to thirty times as much
MOST = 2_000_000  # shards that braces may stand for
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and field: a file's name is cut at its first dot


class FromFile(str):
    """An address that was read out of a file: nobody has typed it, so it runs no command."""


class Shards:
    """WebDataset tars: per sample `<key>.png` (jpg, webp, ...) with `.txt` (caption), `.json` (metadata) or `.cls` (class).

    `urls`: paths, folders of tars (as img2dataset leaves them), `pipe:` commands, http(s): or what fsspec reads (s3://, gs://,
    hf://, ...); a string may hold braces (`data/{000..009}.tar`), wildcards (`data/*.tar`) and several joined by `::`.
    A `FromFile` may be a path or an address of `REMOTE`, and no command.
    image_field, caption_field: other names of these fields, as `input.jpg` of `<key>.input.jpg`; several are joined by `;`.
    caption_key: where in the metadata the caption is, if it has no field.
    label_field: field of a NumPy array of labels, as clip_benchmark's npy of images with several; it becomes meta["labels"].
    max_member, max_unpacked: MB of a file in a shard, and of all those of a sample; of all that a compressed shard unpacks to.
        More is refused.

    A shard that breaks off gives what it has, then a sample with the error. A file that comes twice within a sample begins
    another one, as in open_clip; it is told, and where it has no image it has the error.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        buffer: int = 1000,
        *,
        image_field: str = "",
        caption_field: str = "",
        caption_key: str = "caption",
        label_field: str = "",
        max_member: int = 256,
        max_unpacked: int = 65536,
    ) -> None:
        given = _expanded(urls) if isinstance(urls, str) else [*urls]
        for url in given:
            if isinstance(urls, FromFile) or isinstance(url, FromFile):
                check_address(url)
        self.urls = list(chain.from_iterable(map(_found, map(str, given))))
        self.parts = len(self.urls)
        self.buffer = buffer  # samples held in memory to be shuffled
        self.images = tuple(image_field.lower().split(";")) if image_field else IMAGES
        self.captions = tuple(caption_field.lower().split(";")) if caption_field else ("txt",)
        self.label_field = label_field.lower()
        self.caption_key, self.limits = caption_key, (max_member << 20, max_unpacked << 20)
        missing = [url for url in self.urls if not _scheme(url) and not Path(url).is_file()]
        if missing or not self.urls:
            raise FileNotFoundError(
                f"expected tar shards at {urls!r}, but {len(missing)} are missing: {', '.join(missing[:3])}; check the path"
            )

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        urls = self.urls[worker::workers]
        if shuffle:
            shuffle.shuffle(urls)
        samples = chain.from_iterable(map(self._read, urls))
        return shuffled(self.buffer, rng=shuffle)(samples) if shuffle else samples

    def _read(self, url: str) -> Iterator[Sample]:
        try:
            with closing(_open_url(url)) as stream:  # closing a pipe reports the exit status of its command
                for key, fields, twice in _grouped(_members(stream, *self.limits), self.limits[0]):
                    yield self._sample(url, key, fields, twice)
        except ImportError:  # fsspec names the package that this kind of URL needs
            raise
        except _TooLarge as error:
            yield Sample(url, None, None, {"shard": url}, f"shard {url}: {error}")
        except Exception as error:  # besides tarfile's and zlib's, whatever the client of a remote store raises
            reason = getattr(error, "strerror", "") or (error.args[0] if error.args else "")
            told = f"shard {url}: expected a readable tar, got {type(error).__name__}: {reason}; write or fetch it again"
            yield Sample(url, None, None, {"shard": url}, told)

    def _sample(self, url: str, key: str, fields: dict[str, bytes], twice: str) -> Sample:
        image = next((fields[kind] for kind in self.images if kind in fields), None)
        if twice:
            told = f"shard {url}: expected each file once, got {twice} again within {key}"
            if image is None:
                return Sample(key, None, None, {}, f"{told}; what belongs to the first one is kept")
            log.warning("%s; both are kept as samples", told)
        for kind in ("json", "cls", *self.captions):
            if len(fields.get(kind, b"")) > TEXT:
                told = (
                    f"expected a text of at most {TEXT >> 20} MB as {kind}, got {len(fields[kind]) >> 20}; is it another file?"
                )
                return Sample(key, None, None, {}, told)
        try:
            meta = dict(json.loads(fields["json"])) if "json" in fields else {}
            if "cls" in fields:
                meta["class"] = int(fields["cls"])
            if self.label_field in fields:
                meta["labels"] = np.load(io.BytesIO(fields[self.label_field]), allow_pickle=False).tolist()
        except Exception as error:  # whatever damaged fields make their readers raise: it costs no other sample
            told = f"{type(error).__name__}: {first_line(error)}"
            return Sample(key, None, None, {}, f"expected a JSON object, an integer class and an array of labels, got {told}")
        written = next((fields[kind].decode("utf-8", "replace") for kind in self.captions if kind in fields), None)
        caption = text_of(meta.get(self.caption_key)) if written is None else written
        return Sample(key, image, caption, meta, fields=tuple(sorted(fields)))


def tars_in(folder: str | Path) -> list[str]:
    """The tars of a folder, in order."""
    names = sorted(path for path in Path(folder).iterdir() if re.search(r"\.tar(\.(gz|bz2|xz))?$", path.name.lower()))
    return [_local(str(path)) for path in names]


def _local(path: str) -> str:
    """A path that nobody takes for an address: a file may be called pipe:, too."""
    return f"./{path}" if _scheme(path) else path


def _scheme(url: str) -> str:
    return (re.match(r"([A-Za-z0-9+.-]+):", url) or ["", ""])[1].lower()


def check_address(url: str) -> None:
    """ValueError where an address that was read out of a file may not be one."""
    if _scheme(url) and (_scheme(url) not in REMOTE or "::" in url):
        told = f"expected a path or an address of {', '.join(REMOTE)} in a file"
        raise ValueError(f"{told}, got {url[:200]!r}; a command (pipe:) and other addresses are typed in the command line")


def _choices(braces: str) -> int:
    if span := re.match(r"(-?\d{1,18})\.\.(-?\d{1,18})(\.|$)", braces):
        return abs(int(span[2]) - int(span[1])) + 1
    return braces.count(",") + 1


def _expanded(urls: str) -> list[str]:
    """What braces stand for, counted before they are spelt out."""
    count = sum(math.prod(map(_choices, re.findall(r"\{([^{}]*)\}", part))) for part in urls.split("::"))
    if count > MOST:
        raise ValueError(f"expected braces that stand for at most {MOST:,} shards, got {count:,}: {urls[:200]}")
    try:
        return expand_urls(urls)
    except AssertionError as error:  # webdataset's: ${NAME} is the environment's WDS_NAME
        raise ValueError(f"{urls[:200]}: expected variables that are set, got {error}") from error


def _found(url: str) -> list[str]:
    """The shards that a path means: those of a folder, or those that match."""
    if _scheme(url) or Path(url).is_file():
        return [url]
    if Path(url).is_dir():
        return tars_in(url) or [url]
    return (list(map(_local, sorted(glob.glob(url)))) if glob.has_magic(url) else []) or [url]


def _open_url(url: str) -> IO[bytes]:
    if not _scheme(url):
        return open(url, "rb")
    if _scheme(url) in ("pipe", "http", "https"):
        return gopen(url)
    import fsspec

    return fsspec.open(url, "rb").open()


# ---- the files of a tar, with a limit on what is taken into memory and on what is unpacked


class _TooLarge(ValueError):
    pass


class _Member(tarfile.TarInfo):
    """Python takes a tar for ended where it is cut between two files or a header is damaged: here it must have its end mark."""

    limit = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        return super().frombuf(buf, encoding, errors).small()  # before tarfile reads a long name or a pax header of that size

    def small(self) -> _Member:
        """Itself, if its size is within the limit."""
        if self.size > self.limit:
            raise _TooLarge(
                f"expected files of at most {self.limit >> 20} MB, got {self.name} of {self.size >> 20}; raise max_member"
            )
        return self

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it breaks off before its end mark") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged: {error}") from error  # type: ignore[attr-defined]


class _Counted:
    """A stream behind its first bytes, and no more of it than the limit."""

    def __init__(self, head: bytes, stream: Any, limit: int = 0) -> None:
        self.head, self.stream, self.limit, self.count = head, stream, limit, 0

    def read(self, size: int = -1) -> bytes:
        first, self.head = (self.head, b"") if size < 0 else (self.head[:size], self.head[size:])
        data = first + self.stream.read(size if size < 0 else size - len(first)) if len(first) != size else first
        self.count += len(data)
        if self.limit and self.count > self.limit:
            raise _TooLarge(f"expected a compressed shard to unpack to at most {self.limit >> 20} MB; raise max_unpacked")
        return data


def _members(stream: IO[bytes], max_member: int, max_unpacked: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each file."""
    head = stream.read(6)
    whole: Any = _Counted(head, stream)
    for magic, unpacker in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if head.startswith(magic):
            whole = _Counted(b"", unpacker(whole, "rb"), max_unpacked)  # type: ignore[operator]
    kind = type("Member", (_Member,), {"limit": max_member})
    with tarfile.open(fileobj=whole, mode="r|", bufsize=1 << 16, tarinfo=kind) as tar:
        for member in tar:
            if member.isreg():
                cast(_Member, member).small()  # a pax header or a sparse file may have made it larger
                yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
            tar.members = []  # type: ignore[attr-defined]  # it would keep the description of every file


def _grouped(members: Iterator[tuple[str, bytes]], most: int) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """(key, field -> bytes, the file that came a second time and so began it) of neighbours with the same key.

    most: bytes of a sample's files together, each of which counts a kilobyte more: of zeros a small shard holds any number.
    """
    key, fields, twice, held = "", dict[str, bytes](), "", 0
    for name, data in members:
        if not (match := MEMBER.fullmatch(name)):
            continue
        prefix, field = match[1], match[2].lower()
        if prefix != key or field in fields:
            if fields:
                yield key, fields, twice
            key, fields, twice, held = prefix, {}, name if prefix == key else "", 0
        held += len(data) + 1024
        if held > most + 1024 * 100:
            raise _TooLarge(f"expected files of at most {most >> 20} MB in a sample, got more with {name}; raise max_member")
        fields[field] = data
    if fields:
        yield key, fields, twice
