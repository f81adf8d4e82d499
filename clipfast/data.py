"""Shards, tables and folders of images -> batches.

A source gives samples as they are stored (encoded image, caption, key). `training_batches` shuffles, crops and tokenises them
without end for `clipfast.train`; `read_images` decodes them once and in order for `clipfast.evaluate`. What cannot be read is
counted, logged and skipped, up to a share.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import random
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle as shuffled
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from .image import Preprocess, read_image
from .tokenizer import tokenize

log = logging.getLogger(__name__)
UNREADABLE = (ValueError, OSError, Image.DecompressionBombError)  # what reading one image can raise
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class Batch(NamedTuple):
    """B image-text pairs. Rows with equal labels are positives of each other; None: only row i of image and text is."""

    pixels: Tensor  # [B, 3, R, R] float32, normalised
    tokens: Tensor  # [B, L] int32, padded with 0
    lengths: Tensor  # [B] int64 on the CPU, tokens up to and including the end token
    labels: Tensor | None = None  # [B] int64


class Sample(NamedTuple):
    """One image as stored, not yet decoded."""

    key: str
    image: bytes | Path | None
    caption: str | None
    meta: dict[str, Any]  # a shard's .json, and "class" from its .cls or from the image's folder


class Source(Protocol):
    """Where samples come from."""

    @property
    def parts(self) -> int: ...  # how many workers can share it

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """One pass over the samples of this worker, always the same ones, in stored order or shuffled."""
        ...


class Shards:
    """WebDataset tars: per sample `<key>.png` (jpg, webp, ...) with `.txt` (caption), `.json` (metadata) or `.cls` (class).

    `urls`: paths, `pipe:` commands or URLs; a string may hold braces (`data/{000..009}.tar`) and several joined by `::`.
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


def _read_shard(url: str) -> Iterator[Sample]:
    try:
        with closing(gopen(url)) as stream:  # closing a pipe reports the exit status of its command
            files = tar_file_expander([{"url": url, "stream": stream}])
            yield from map(_shard_sample, group_by_keys(files))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"shard {url}: expected a readable tar, got {type(error).__name__}: {error.args[0]}; write or fetch it again"
        ) from error


def _shard_sample(fields: dict[str, Any]) -> Sample:
    try:
        meta = dict(json.loads(fields["json"])) if "json" in fields else {}
        if "cls" in fields:
            meta["class"] = int(fields["cls"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"sample {fields['__key__']}: expected a JSON object and an integer class, got {error}") from error
    caption = fields["txt"].decode("utf-8", "replace") if "txt" in fields else meta.get("caption")
    return Sample(fields["__key__"], next((fields[kind] for kind in IMAGES if kind in fields), None), caption, meta)


class Rows:
    """Samples whose images are files of their own, listed in memory."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self.rows, self.parts = rows, len(rows)

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        rows = list(self.rows[worker::workers])
        if shuffle:
            shuffle.shuffle(rows)
        return iter(rows)


def read_table(path: str | Path, images: str | Path = "", image_column: str = "path", caption_column: str = "caption") -> Rows:
    """A .csv (comma) or .tsv (tab) with a header; image paths are relative to `images`, by default the table's own folder."""
    folder = Path(images or Path(path).parent)
    if not folder.is_dir():
        raise NotADirectoryError(f"expected the folder of the table's images at {folder}; give `images`")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t" if str(path).endswith(".tsv") else ",")
        if missing := {image_column, caption_column} - set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}: expected the columns {image_column} and {caption_column}, got {', '.join(reader.fieldnames or ())}; "
                f"{' and '.join(sorted(missing))} is missing: name the columns"
            )
        rows = ((row[image_column] or f"line {reader.line_num}", row) for row in reader)
        return Rows([Sample(key, folder / (row[image_column] or ""), row[caption_column], {}) for key, row in rows])


def read_folder(path: str | Path) -> Rows:
    """Every image below a folder, in sorted order. The folder that holds an image is its class; there are no captions."""
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.suffix[1:].lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"expected images ({', '.join(IMAGES)}) below the folder {path}, found none")
    return Rows([Sample(file.relative_to(root).as_posix(), file, None, {"class": file.parent.name}) for file in files])


@dataclass
class DataConfig:
    """Where pairs come from and how they are read."""

    data: Annotated[str, "shards ('data/{000..009}.tar', also pipe: and https:), a .csv or .tsv table, or a folder of images"]
    images: Annotated[str, "folder that a table's image paths are relative to; default: the table's own"] = ""
    image_column: Annotated[str, "column of a table that holds the image's path"] = "path"
    caption_column: Annotated[str, "column of a table that holds the caption"] = "caption"
    workers: Annotated[int, "processes that read and decode for training, at most one a shard; threads elsewhere"] = 2
    shuffle_buffer: Annotated[int, "samples of a worker's shards that are shuffled in memory"] = 1000
    caption_labels: Annotated[bool, "equal captions within a batch count as positives"] = False
    max_bad: Annotated[float, "share of unreadable samples that is skipped before it is an error"] = 0.1

    def open(self) -> Source:
        """The source that `data` names."""
        if self.data.endswith((".csv", ".tsv")):
            return read_table(self.data, self.images, self.image_column, self.caption_column)
        return read_folder(self.data) if Path(self.data).is_dir() else Shards(self.data, self.shuffle_buffer)


class Tally:
    """Counts samples, logs each that cannot be used, and gives up when more than the share `allowed` cannot."""

    def __init__(self, allowed: float = 0.1) -> None:
        self.allowed, self.seen, self.bad, self.last = allowed, 0, 0, ""

    def skip(self, key: str, reason: object) -> None:
        self.bad, self.last = self.bad + 1, f"{key}: {reason}"
        log.warning("skipped %s", self.last)
        self.check(at_least=100)  # one bad sample among the first few proves nothing

    def check(self, at_least: int = 0) -> None:
        if self.bad > self.allowed * max(self.seen, at_least):
            raise ValueError(
                f"expected at most {self.allowed:.0%} unreadable samples, got {self.bad} of {self.seen}, last {self.last}; "
                "repair the data or raise max_bad"
            )


def random_square(image: Image.Image, resolution: int, rng: random.Random) -> Image.Image:
    """Shorter side to `resolution`, bicubic, then a square at a random place: the paper's only augmentation."""
    width, height = (int(resolution * side / min(image.size)) for side in image.size)
    left, top = rng.randint(0, width - resolution), rng.randint(0, height - resolution)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + resolution, top + resolution))


def training_batches(
    config: DataConfig, resolution: int, batch_size: int, *, context_length: int = 77, seed: int = 0
) -> Callable[[int], Iterator[Batch]]:
    """`batches(step)`: the endless sequence of batches from `step` on, fixed by the seed and the number of workers.

    A sample that cannot be used leaves its batch one row smaller, so that what follows does not depend on it: a resumed run
    sees the same batches without decoding those it passes over.
    """
    source = config.open()
    workers = min(config.workers, source.parts)

    def batches(step: int) -> Iterator[Batch]:
        stream = _BatchStream(source, config, resolution, batch_size, context_length, seed, step)
        pin = torch.cuda.is_available()
        own = torch.Generator()  # the loader draws a number: taken from the global one, a resumed run would go on differently
        for batch in DataLoader(stream, None, num_workers=workers, pin_memory=pin, generator=own):
            if isinstance(
                batch, Exception
            ):  # sent as a value: raised in the worker, its message would hold the worker's whole traceback
                raise batch
            yield batch

    return batches


class _BatchStream(IterableDataset[Batch | Exception]):
    """Worker w of W makes every W-th batch, out of its own part of the source."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        resolution: int,
        batch_size: int,
        context_length: int,
        seed: int,
        start: int,
    ) -> None:
        self.source, self.config, self.batch_size, self.context_length = source, config, batch_size, context_length
        self.seed, self.start, self.preprocess = seed, start, Preprocess(resolution)
        self.resolution = resolution

    def __iter__(self) -> Iterator[Batch | Exception]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        step = self.start + worker  # the loader asks worker 0 first, whatever `start` is
        tally = Tally(self.config.max_bad)
        samples = self._endless(step % workers, workers, skip=step // workers * self.batch_size)
        try:
            while True:
                chosen = list(islice(samples, self.batch_size))
                yield self._batch(chosen, random.Random(f"{self.seed} {step}"), tally)
                step += workers
        except (ValueError, OSError) as error:
            yield error

    def _endless(self, part: int, parts: int, skip: int) -> Iterator[Sample]:
        """This part's samples, epoch after epoch, without the first `skip`."""
        epoch = 0
        while True:
            count = 0
            for sample in self.source.samples(random.Random(f"{self.seed} {epoch} {part}"), part, parts):
                count += 1
                if skip > 0:
                    skip -= 1
                else:
                    yield sample
            if count == 0:
                raise ValueError(f"expected samples in part {part + 1} of {parts} of the data, found none; check the data")
            epoch += 1 + skip // count  # every epoch has the same count: only the first is read to be skipped
            skip %= count

    def _batch(self, samples: Sequence[Sample], rng: random.Random, tally: Tally) -> Batch:
        pixels, captions = [], []
        for sample in samples:
            tally.seen += 1
            square = random.Random(rng.random())  # each sample its own, so that a bad one changes no other
            if not (sample.caption or "").strip():
                tally.skip(sample.key, "no caption")
                continue
            try:
                pixels.append(self.preprocess(random_square(_decode(sample).convert("RGB"), self.resolution, square)))
            except UNREADABLE as error:
                tally.skip(sample.key, error)
                continue
            captions.append(sample.caption or "")
        if not pixels:
            raise ValueError(f"expected a usable sample in a batch of {len(samples)}, got none, last {tally.last}")
        tokens, lengths = tokenize(captions, self.context_length, truncate=True, return_lengths=True)
        return Batch(torch.stack(pixels), tokens, lengths, _labels(captions) if self.config.caption_labels else None)


def _labels(captions: Iterable[str]) -> Tensor:
    """[B] int64, equal for equal captions on every rank and in every process, which Python's own salted hash is not."""
    digests = (hashlib.blake2b(caption.strip().encode(), digest_size=8).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def _decode(sample: Sample) -> Image.Image:
    if sample.image is None:
        raise ValueError(f"expected an image ({', '.join(IMAGES)}), found none")
    return read_image(sample.image)


def read_images(
    samples: Iterable[Sample],
    preprocess: Callable[[Image.Image], Tensor],
    batch_size: int,
    tally: Tally,
    threads: int = 2,
) -> Iterator[tuple[list[Sample], Tensor]]:
    """(samples, pixels [B, 3, R, R]) in the order given, decoded by threads one batch ahead; the bad ones are tallied."""

    def load(sample: Sample) -> Tensor | Exception:
        try:
            return preprocess(_decode(sample))
        except UNREADABLE as error:
            return error

    def finish(chosen: Sequence[Sample], loaded: Iterable[Tensor | Exception]) -> Iterator[tuple[list[Sample], Tensor]]:
        good: list[tuple[Sample, Tensor]] = []
        for sample, result in zip(chosen, loaded, strict=True):
            tally.seen += 1
            if isinstance(result, Exception):
                tally.skip(sample.key, result)
            else:
                good.append((sample, result))
        if good:
            yield [sample for sample, _ in good], torch.stack([pixels for _, pixels in good])

    iterator = iter(samples)
    ahead: deque[tuple[list[Sample], Iterator[Tensor | Exception]]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:  # Pillow decodes and resizes without the interpreter's lock
        while chosen := list(islice(iterator, batch_size)):
            ahead.append((chosen, pool.map(load, chosen)))
            if len(ahead) > 1:
                yield from finish(*ahead.popleft())
        while ahead:
            yield from finish(*ahead.popleft())


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write to, made if need be, and gone again when nothing was written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no write permission")
    except OSError as error:
        raise type(error)(
            f"expected a folder that can be written at {folder}, got: {error.strerror}; choose another"
        ) from error
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all of it is on the disk, or is gone when writing fails."""
    aside = Path(f"{path}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
