"""What a source holds, file by file: what its features depend on, what is shared out to ranks, and how two contents differ."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from clipfast.data.sources import Rows, Sample, Shards, Source

Entry: TypeAlias = list[Any]  # a file's or a shard's name; then what tells its content: size and time, or a digest


class Units:
    """A source in parts that can be made apart: a shard each, or `rows` rows of a folder, a table or arrays."""

    def __init__(self, source: Source, rows: int) -> None:
        self.source, self.rows = source, rows
        self.by_row = isinstance(source, Rows)

    def __len__(self) -> int:
        return -(-self.source.parts // self.rows) if self.by_row else self.source.parts

    def samples(self, unit: int) -> Iterator[Sample]:
        if isinstance(self.source, Rows):
            return iter(self.source.rows[self.span(unit)])
        return self.source.samples(worker=unit, workers=self.source.parts)

    def span(self, unit: int) -> slice:
        """Its entries in the listing."""
        return slice(unit * self.rows, (unit + 1) * self.rows) if self.by_row else slice(unit, unit + 1)


def listed(source: Source) -> list[Entry]:
    """An entry for each row, or for each shard, in the source's order."""
    if isinstance(source, Rows):
        return [_row(sample) for sample in source.rows]
    if isinstance(source, Shards):
        with ThreadPoolExecutor(16) as pool:  # a request each where they are remote
            stamps = list(pool.map(_of_url, source.urls))
        return [[name, *stamp] for name, stamp in zip(_names(source.urls), stamps, strict=True)]
    return [[f"part {part}"] for part in range(source.parts)]


def differences(before: Sequence[Entry], now: Sequence[Entry], shown: int = 3) -> str:
    """What was added, removed and changed: the first few and the count of each; empty where nothing was."""
    if list(before) == list(now):
        return ""
    then, later = _by_name(before), _by_name(now)
    found = (
        ("added", [name for name in later if name not in then]),
        ("removed", [name for name in then if name not in later]),
        ("changed", [name for name in later if name in then and then[name] != later[name]]),
    )
    told = [
        f"{len(names)} {what} ({', '.join(map(str, names[:shown]))}{', ...' if len(names) > shown else ''})"
        for what, names in found
        if names
    ]
    return ", ".join(told) or f"{len(now)} in another order"


def _by_name(entries: Sequence[Entry]) -> dict[Any, list[str]]:
    """A table may name an image several times."""
    found: dict[Any, list[str]] = {}
    for name, *stamp in entries:
        found.setdefault(name, []).append(json.dumps(stamp))
    return {name: sorted(stamps) for name, stamps in found.items()}


def _row(sample: Sample) -> Entry:
    text = {"caption": sample.caption, "meta": sample.meta} if sample.caption is not None or sample.meta else None
    return [sample.key, *_of_image(sample.image), "" if text is None else digest(json.dumps(text, sort_keys=True, default=str))]


def _of_image(image: Any) -> Entry:
    if isinstance(image, str | os.PathLike):
        try:
            return _of_file(image)
        except (OSError, ValueError):  # it will be counted as unreadable, if it is read at all
            return [None, None]
    if isinstance(image, bytes | bytearray | memoryview):
        return [len(image), digest(image)]
    if isinstance(image, Image.Image):
        return [list(image.size), digest(f"{image.mode} {image.size}".encode() + image.tobytes())]
    if isinstance(image, np.ndarray | Tensor):
        array = np.ascontiguousarray(image)
        return [list(array.shape), digest(f"{array.dtype} {array.shape}".encode() + array.tobytes())]
    return [None, None]


def _of_file(path: str | os.PathLike[str]) -> Entry:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _of_url(url: str) -> Entry:
    if os.path.isfile(url):
        return _of_file(url)
    if url.lower().startswith("pipe:"):  # what a command will print nobody knows
        return []
    try:
        if url.lower().startswith(("http:", "https:")):
            from urllib.request import Request, urlopen

            with urlopen(Request(url, method="HEAD"), timeout=60) as reply:
                return [reply.headers.get(name) for name in ("Content-Length", "ETag", "Last-Modified")]
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        about = system.info(path)
    except ImportError:  # fsspec names the package that this kind of URL needs
        raise
    except Exception as error:  # whatever the client of a remote store raises
        raise ConnectionError(f"cannot reach {url}: {type(error).__name__}: {error}") from error
    told = ("size", "ETag", "etag", "blob_id", "generation", "mtime", "LastModified", "created")  # each store's own
    own = [about.get(name) for name in told]
    return [value if isinstance(value, int | None) else str(value) for value in own]


def _names(urls: Sequence[str]) -> list[str]:
    """Shards of this machine by their names below the folder that holds them all, so that it may be moved."""
    if not all(map(os.path.isfile, urls)):
        return list(urls)
    paths = [os.path.abspath(url) for url in urls]
    root = os.path.commonpath([Path(path).parent for path in paths])
    return [os.path.relpath(path, root) for path in paths]


def digest(content: str | bytes | bytearray | memoryview) -> str:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()
