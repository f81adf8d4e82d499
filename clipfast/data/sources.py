"""Where samples come from: shards, tables, folders, arrays. An image stays as it is stored, to be decoded by who needs it."""

from __future__ import annotations

import csv
import json
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from webdataset.filters import shuffle as shuffled
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


class Sample(NamedTuple):
    """One image as stored, not yet decoded."""

    key: str
    image: Any  # bytes, a path, an array that `read_image` takes, or None
    caption: str | None
    meta: dict[str, Any]  # a shard's .json, and "class" from its .cls or from the image's folder
    error: str = ""  # why there is nothing to read: this stands for a sample or, at the end of it, for the rest of a shard


class Source(Protocol):
    """Where samples come from."""

    @property
    def parts(self) -> int: ...  # how many workers can share it

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """One pass over the samples of this worker, always the same ones, in stored order or shuffled."""
        ...


class Shards:
    """WebDataset tars: per sample `<key>.png` (jpg, webp, ...) with `.txt` (caption), `.json` (metadata) or `.cls` (class).

    `urls`: paths, `pipe:` commands, http(s): or what fsspec reads (s3://, gs://, hf://, ...); a string may hold braces
    (`data/{000..009}.tar`) and several joined by `::`. A shard that breaks off gives what it has, then a sample with the error.
    """

    def __init__(self, urls: str | Sequence[str], buffer: int = 1000) -> None:
        self.urls = expand_urls(urls) if isinstance(urls, str) else [str(url) for url in urls]
        self.parts = len(self.urls)
        self.buffer = buffer  # samples held in memory to be shuffled
        missing = [url for url in self.urls if not re.match(r"[a-z0-9]+:", url) and not Path(url).is_file()]
        if missing or not self.urls:
            raise FileNotFoundError(
                f"expected tar shards at {urls!r}, but {len(missing)} are missing: {', '.join(missing[:3])}; check the path"
            )

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        urls = self.urls[worker::workers]
        if shuffle:
            shuffle.shuffle(urls)
        samples = chain.from_iterable(map(_read_shard, urls))
        return shuffled(self.buffer, rng=shuffle)(samples) if shuffle else samples


def _open_url(url: str) -> IO[bytes]:
    scheme = (re.match(r"([a-z0-9]+):", url) or ["", ""])[1]
    if scheme in ("", "pipe", "http", "https"):
        return gopen(url)
    import fsspec

    return fsspec.open(url, "rb").open()


def _read_shard(url: str) -> Iterator[Sample]:
    try:
        with closing(_open_url(url)) as stream:  # closing a pipe reports the exit status of its command
            yield from map(_shard_sample, group_by_keys(_members(stream, url)))
    except ImportError:  # fsspec names the package that this kind of URL needs
        raise
    except Exception as error:  # besides tarfile's and zlib's, whatever the client of a remote store raises
        reason = error.args[0] if error.args else ""
        told = f"shard {url}: expected a readable tar, got {type(error).__name__}: {reason}; write or fetch it again"
        yield Sample(url, None, None, {"shard": url}, told)


class _Member(tarfile.TarInfo):
    """Python takes a tar for ended where it is cut between two files or a header is damaged: here it must have its end mark."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it breaks off before its end mark") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged: {error}") from error  # type: ignore[attr-defined]


def _members(stream: IO[bytes], url: str) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 16, tarinfo=_Member) as tar:
        for member in tar:
            if member.isreg():
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}  # type: ignore[union-attr]
            tar.members = []  # type: ignore[attr-defined]  # it would keep the description of every file


def _shard_sample(fields: dict[str, Any]) -> Sample:
    key = fields["__key__"]
    try:
        meta = dict(json.loads(fields["json"])) if "json" in fields else {}
        if "cls" in fields:
            meta["class"] = int(fields["cls"])
    except (ValueError, TypeError) as error:
        return Sample(key, None, None, {}, f"expected a JSON object and an integer class, got {error}")
    caption = fields["txt"].decode("utf-8", "replace") if "txt" in fields else _text(meta.get("caption"))
    return Sample(key, next((fields[kind] for kind in IMAGES if kind in fields), None), caption, meta)


def _text(caption: Any) -> str | None:
    """JSON, Parquet and memory may hold anything as a caption: what is no text, a list of them or NaN, counts as missing."""
    return caption if isinstance(caption, str) else None


class Rows:
    """Samples whose images are files of their own, listed in memory."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self.rows, self.parts = rows, len(rows)

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        rows = list(self.rows[worker::workers])
        if shuffle:
            shuffle.shuffle(rows)
        return iter(rows)


def from_arrays(images: Sequence[Any], captions: Sequence[str]) -> Rows:
    """Pairs in memory: images as `read_image` takes them (arrays [H, W, 3] of uint8, PIL images, encoded bytes)."""
    if len(images) != len(captions):
        raise ValueError(f"expected as many captions as images, got {len(images)} images and {len(captions)} captions")
    pairs = zip(images, captions, strict=True)
    return Rows([Sample(str(row), image, _text(caption), {}) for row, (image, caption) in enumerate(pairs)])


def read_table(path: str | Path, images: str | Path = "", image_column: str = "path", caption_column: str = "caption") -> Rows:
    """A .csv (comma) or .tsv (tab) with a header, a .jsonl (an object a line) or a .parquet (which needs pyarrow).

    Image paths are relative to `images`, by default the table's own folder.
    """
    folder = Path(images or Path(path).parent)
    if not folder.is_dir():
        raise NotADirectoryError(f"expected the folder of the table's images at {folder}; give `images`")
    columns, rows = _table(Path(path), [image_column, caption_column])
    if missing := {image_column, caption_column} - set(columns):
        raise ValueError(
            f"{path}: expected the columns {image_column} and {caption_column}, got {', '.join(columns)}; "
            f"{' and '.join(sorted(missing))} is missing: name the columns"
        )
    named = ((str(row[image_column] or ""), line, row) for line, row in rows)
    return Rows([Sample(name or f"line {line}", folder / name, _text(row[caption_column]), {}) for name, line, row in named])


def _table(path: Path, wanted: list[str]) -> tuple[Sequence[str], list[tuple[int, dict[str, Any]]]]:
    """Names of the columns, and (line, row) of each row."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ImportError(f"{path}: expected pyarrow to read Parquet: pip install pyarrow, or give a .csv") from error
        try:
            columns = parquet.read_schema(path).names
            rows = parquet.read_table(path, columns=[name for name in wanted if name in columns]).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{path}: expected a Parquet table: {error}") from error
        return columns, list(enumerate(rows, 1))
    line, found = 0, []
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a byte order mark
        try:
            if path.suffix != ".jsonl":
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                for row in reader:
                    found.append((line := reader.line_num, row))
                return reader.fieldnames or (), found
            for line, text in enumerate(file, 1):
                if text.strip():
                    found.append((line, dict.fromkeys(wanted) | dict(json.loads(text))))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}, after line {line}: expected rows of UTF-8, got {error}; mend or remove it") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {line}: expected a JSON object, got {error}; mend or remove it") from error
    named = {name: None for _, row in found for name, value in row.items() if value is not None}
    return list(named) if found else wanted, found


def read_folder(path: str | Path) -> Rows:
    """Every image below a folder, in sorted order. The folder that holds an image is its class; there are no captions."""
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.suffix[1:].lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"expected images ({', '.join(IMAGES)}) below the folder {path}, found none")
    return Rows([Sample(file.relative_to(root).as_posix(), file, None, {"class": file.parent.name}) for file in files])


def stored(sample: Sample) -> Any:
    """Its image, or an error that says why there is none."""
    if sample.error:
        raise ValueError(sample.error)
    if sample.image is None:
        raise ValueError(f"expected an image ({', '.join(IMAGES)}), found none")
    return sample.image
