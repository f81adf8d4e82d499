"""Samples of a source -> batches.

`training_batches` shuffles, crops and tokenises them without end for `clipfast.train`; `read_images` decodes them once and in
order for `clipfast.evaluate`. What cannot be read is counted, logged and skipped, up to a share.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from clipfast.data.sources import TABLES, Sample, Shards, Source, no_caption, read_folder, read_table, stored, tars_in
from clipfast.files import first_line
from clipfast.inputs.image import read_rgb
from clipfast.inputs.tokenizer import tokenize

log = logging.getLogger(__name__)
UNREADABLE = (ValueError, OSError, Image.DecompressionBombError)  # what reading one image can raise
DRAFT = 2  # a JPEG is scaled down as it is decoded to no less than so many times the size that it is resized to


class Batch(NamedTuple):
    """B image-text pairs. Rows with equal labels are positives of each other; None: only row i of image and text is."""

    pixels: Tensor  # [B, 3, R, R] float32, normalised; or uint8, channels last in memory, which the training step normalises
    tokens: Tensor  # [B, L] int32, padded with 0
    lengths: Tensor  # [B] int64 on the CPU, tokens up to and including the end token
    labels: Tensor | None = None  # [B] int64
    keys: list[str] | None = None  # of the samples, for messages


@dataclass
class DataConfig:
    """Where pairs come from and how they are read."""

    data: Annotated[str, "shards ('data/{000..9}.tar', 'data/*.tar', a folder of them, pipe:, https:, s3:, ...), a .csv, .tsv,"
                         " .txt, .jsonl or .parquet, or a folder"]  # fmt: skip
    images: Annotated[str, "folder that a table's image paths are relative to; default: the table's own"] = ""
    image_column: Annotated[str, "column of a table that holds the image's path"] = "path"
    caption_column: Annotated[str, "column of a table, or key of a shard's .json, that holds the caption"] = "caption"
    separator: Annotated[str, "character between a table's columns; default: found in its header"] = ""
    image_field: Annotated[str, "field of a shard's samples that holds the image, as input.jpg; default: jpg, png, ..."] = ""
    caption_field: Annotated[str, "field of a shard's samples that holds the caption; default: txt"] = ""
    max_member: Annotated[int, "MB of one file in a shard, beyond which it is refused"] = 256
    max_unpacked: Annotated[int, "MB that a compressed shard may unpack to"] = 65536
    workers: Annotated[int, "processes of a rank that read and decode for training, at most one a shard; threads elsewhere"] = 2
    worker_timeout: Annotated[float, "seconds after which a worker that does nothing ends the run; 0: no limit"] = 600.0
    streams: Annotated[int, "parts of a batch that are read apart; 0: one a rank. On any number of ranks that divides it, a run"
                            " sees the same batches"] = 0  # fmt: skip
    shuffle_buffer: Annotated[int, "samples of a worker's shards that are shuffled in memory"] = 1000
    caption_labels: Annotated[bool, "equal captions within a batch count as positives"] = False
    max_bad: Annotated[float, "share of unreadable samples that is skipped before it is an error"] = 0.1

    def open(self, captions: bool = False) -> Source:
        """The source that `data` names; of a folder, where `captions` are needed, the one table in it."""
        path, folder = self.data, Path(self.data).is_dir()
        tars = tars_in(path) if folder else []
        if folder and (captions or tars):
            # A list of addresses that img2dataset leaves beside each shard is no table of images.
            own = {Path(tar).name.partition(".")[0] for tar in tars}
            kinds = [kind for kind in TABLES if kind != ".txt"]
            tables = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in kinds and file.stem not in own)
            if len(tables) + bool(tars) != 1:
                found = ", ".join([file.name for file in tables] + [Path(tar).name for tar in tars[:1]]) or "none"
                raise ValueError(f"expected a table of captions ({', '.join(kinds)}) in {path}, found {found}; name one")
            path = path if tars else str(tables[0])
        if path.lower().endswith(TABLES) and not Path(path).is_dir():
            return read_table(path, self.images, self.image_column, self.caption_column, self.separator)
        if folder and not tars and Path(path).is_dir():
            return read_folder(path)
        return Shards(
            path,
            self.shuffle_buffer,
            image_field=self.image_field,
            caption_field=self.caption_field,
            caption_key=self.caption_column,
            max_member=self.max_member,
            max_unpacked=self.max_unpacked,
        )


class Tally:
    """Counts samples, logs each that cannot be used, and gives up when more than the share `allowed` cannot.

    Of a broken shard nobody knows how many samples it had: of `shards` no more than that share, or one, may break.
    """

    def __init__(self, allowed: float = 0.1, shards: int = 0) -> None:
        self.allowed, self.shards, self.seen, self.bad, self.last = allowed, shards, 0, 0, ""
        self.broken: set[str] = set()

    def skip(self, sample: Sample, reason: object) -> None:
        self.bad, self.last = self.bad + 1, f"{sample.key}: {reason}" if sample.meta.get("shard") is None else str(reason)
        log.warning("skipped %s", self.last)
        if shard := sample.meta.get("shard"):
            self.broken.add(shard)
        self.check(at_least=100)  # one bad sample among the first few proves nothing

    def check(self, at_least: int = 0) -> None:
        if self.bad > self.allowed * max(self.seen, at_least):
            self._give_up(f"unreadable samples, got {self.bad} of {self.seen}")
        if len(self.broken) > max(1, self.allowed * self.shards) and self.shards:
            self._give_up(f"unreadable shards, got {len(self.broken)} of {self.shards}")

    def _give_up(self, told: str) -> None:
        raise ValueError(f"expected at most {self.allowed:.0%} {told}, last {self.last}; repair the data or raise max_bad")


def random_square(image: np.ndarray, resolution: int, rng: random.Random) -> np.ndarray:
    """A square of the whole shorter side at a random place, resized by the bicubic filter: the paper's only augmentation.

    [H, W, 3] uint8 -> [R, R, 3] uint8. Cut first, then resized: a quarter less work than a window of the resized photo, and no
    picture of 1 x 60,000 pixels grows to gigabytes. torch's filter is Pillow's to 1/255, and vectorised: 0.2 ms for 500 x 375,
    Pillow's takes 1.0 (measured).
    """
    height, width, _ = image.shape
    if not (side := min(height, width)):
        raise ValueError(f"expected an image with pixels, got {width} x {height}")
    place = rng.random()  # not a pixel: a photo that is scaled as it is decoded keeps its place
    left, top = int(place * (width - side + 1)), int(place * (height - side + 1))
    square = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side == resolution:
        return square
    pixels = torch.from_numpy(square)[None].permute(0, 3, 1, 2)  # channels last: a planar result would take 0.06 ms more
    pixels = F.interpolate(pixels, size=(resolution, resolution), mode="bicubic", antialias=True)
    return pixels.permute(0, 2, 3, 1)[0].numpy()


def training_batches(
    config: DataConfig,
    resolution: int,
    batch_size: int,
    *,
    context_length: int = 77,
    seed: int = 0,
    source: Source | None = None,
    rank: int = 0,
    world: int = 1,
) -> Callable[[int], Iterator[Batch]]:
    """`batches(step)`: the endless sequence of this rank's batches from `step` on, fixed by the seed and the number of workers.

    batch_size: pairs over all ranks, `batch_size / world` of them here. A batch is made of `config.streams` parts, each from
        shards of its own, so that ranks and workers share no file, and another number of ranks shares out the same parts.
    source: in place of the one that the config names, e.g. `from_arrays(...)`.

    A sample that cannot be used leaves its batch one row smaller, so that what follows does not depend on it: a resumed run
    sees the same batches without decoding those it passes over.
    """
    source = source or config.open(captions=True)
    streams = config.streams or world
    if streams % world or batch_size % streams:
        raise ValueError(
            f"expected streams that {world} ranks can share evenly, and a batch_size that the streams can, "
            f"got streams {streams} and batch_size {batch_size}"
        )
    if source.parts < streams:
        kind = "shards" if isinstance(source, Shards) else "samples"
        raise ValueError(f"expected {kind} for each of {streams} streams, got {source.parts}; write the data in more parts")
    workers = min(config.workers, source.parts // streams)
    own = range(rank * streams // world, (rank + 1) * streams // world)

    def batches(step: int) -> Iterator[Batch]:
        stream = _BatchStream(source, config, resolution, batch_size, context_length, seed, step, own, streams, workers)
        pin = torch.cuda.is_available()
        drawn = torch.Generator()  # the loader draws a number: taken from the global one, a resumed run would go on differently
        init = _outlive_signals if workers else None
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "generator": drawn, "worker_init_fn": init}
        iterator: Any = iter(DataLoader(stream, None, **options))
        processes = getattr(iterator, "_workers", [])
        watch = _Watchdog(processes, stream.done, config.worker_timeout)
        try:
            for count in itertools.count():
                batch = watch.await_batch(iterator, count)
                if isinstance(batch, Exception):
                    raise batch  # sent as a value: raised in the worker, its message would hold the worker's whole traceback
                yield batch
        finally:
            watch.ended.set()
            _continue(processes)
            del iterator  # which asks its workers to end, and waits for them a while
            _end(processes)  # Python would wait for the others at its own end

    # What the sequence depends on beside the seed: kept in checkpoints, so that a resumed run can tell when it is another one.
    batches.order = {"data": config.data, "shuffle_buffer": config.shuffle_buffer, "streams": streams, "workers": workers}  # type: ignore[attr-defined]
    return batches


class _Watchdog(threading.Thread):
    """Ends the wait for workers that do nothing. The loader's own time-out does not see those that are stopped while they hand
    over what they have read, and would count the time in which all of the job is stopped."""

    def __init__(self, processes: Sequence[Any], done: Sequence[int], limit: float) -> None:
        super().__init__(name="watch data workers", daemon=True)
        self.processes, self.done, self.limit = processes, done, limit
        self.waiting: int | None = None  # for which batch
        self.told = ""
        self.ended = threading.Event()
        if processes and limit:
            self.start()

    def await_batch(self, iterator: Iterator[Batch | Exception], count: int) -> Batch | Exception:
        """The next batch, of which `count` came before; RuntimeError names the worker that gave none."""
        self.waiting = count
        try:
            batch = next(iterator)
        except (RuntimeError, OSError, EOFError):  # of a worker that was ended
            if not self.told:
                raise
        finally:
            self.waiting = None
        if self.told:
            raise RuntimeError(self.told)
        return batch

    def run(self) -> None:
        tick = min(1.0, self.limit / 4)
        idle, before = 0.0, None
        while not self.ended.wait(tick):
            now = self.waiting, *self.done
            idle, before = idle + tick if now == before and self.waiting is not None else 0.0, now
            if idle >= self.limit:
                return self._end_the_wait(now[0] or 0)

    def _end_the_wait(self, count: int) -> None:
        number, why = count % len(self.processes), "waits for its data: see to that, or raise worker_timeout"
        if stopped := _continue(self.processes):  # it may keep others waiting, and holds what it has read
            number, why = stopped[0], "was stopped: see what stopped it"
        told = f"expected a sample within {self.limit:g} s of data worker {number} (process {self.processes[number].pid})"
        self.told = f"{told}, got none: it {why}"
        if not stopped or not self.ended.wait(1.0):  # when it has handed that over, the wait is over
            self.processes[number].kill()


def _continue(processes: Sequence[Any]) -> list[int]:
    """Let go on what SIGSTOP has stopped; which ones these are, as far as the system tells."""
    stopped = []
    for number, process in enumerate(processes):
        with suppress(OSError):
            if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                stopped.append(number)
        if hasattr(signal, "SIGCONT") and process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
    return stopped


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        with suppress(RuntimeError):  # the loader's own word on a worker that was killed
            process.kill()
            process.join(5)


def _outlive_signals(worker: int) -> None:
    """torchrun and schedulers signal all processes of a rank, so that it saves and ends: its last steps need its workers."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _BatchStream(IterableDataset[Batch | Exception]):
    """Worker w of W makes every W-th batch, out of its own shares of the source: one for each of this rank's streams."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        resolution: int,
        batch_size: int,
        context_length: int,
        seed: int,
        start: int,
        own: Sequence[int] = (0,),
        streams: int = 1,
        workers: int = 0,
    ) -> None:
        self.source, self.config, self.context_length = source, config, context_length
        self.rows = batch_size // streams  # of a stream in a batch
        self.seed, self.start, self.resolution = seed, start, resolution
        self.own, self.streams = own, streams
        self.worker, self.done = 0, RawArray("q", max(1, workers))  # steps of each worker, for the process that waits for it

    def __iter__(self) -> Iterator[Batch | Exception]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self.worker = worker
        step = self.start + worker  # the loader asks worker 0 first, whatever `start` is
        shards = self.source.parts * len(self.own) // (self.streams * workers) if isinstance(self.source, Shards) else 0
        tally = Tally(self.config.max_bad, shards)
        places = [(stream, step % workers * self.streams + stream) for stream in self.own]
        skip = step // workers * self.rows
        sources = [(stream, self._endless(part, self.streams * workers, skip)) for stream, part in places]
        try:
            while True:
                chosen = [
                    (sample, random.Random(f"{self.seed} {step} {stream} {row}"))
                    for stream, samples in sources
                    for row, sample in enumerate(islice(samples, self.rows))
                ]
                yield self._batch(chosen, tally)
                step += workers
        except (ValueError, OSError, ImportError) as error:
            yield error
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            told = f"expected room for batches of {self.rows * len(self.own)} in /dev/shm, got: {first_line(error)}"
            yield OSError(f"{told}; give it more (docker run --shm-size=8g), or read without workers (workers 0)")

    def _endless(self, part: int, parts: int, skip: int) -> Iterator[Sample]:
        """This part's samples, epoch after epoch, without the first `skip`."""
        epoch = 0
        while True:
            count = 0
            for sample in self.source.samples(random.Random(f"{self.seed} {epoch} {part}"), part, parts):
                count += 1
                self.done[self.worker] += 1
                if skip > 0:
                    skip -= 1
                else:
                    yield sample
            if count == 0:
                raise ValueError(f"expected samples in part {part + 1} of {parts} of the data, found none; check the data")
            epoch += 1 + skip // count  # every epoch has the same count: only the first is read to be skipped
            skip %= count

    def _batch(self, samples: Sequence[tuple[Sample, random.Random]], tally: Tally) -> Batch:
        pixels, captions, keys = [], [], []
        for sample, square in samples:  # a random generator each, so that a bad one changes no other
            tally.seen += 1
            self.done[self.worker] += 1
            try:
                if not sample.error and not (sample.caption or "").strip():
                    raise ValueError(no_caption(sample))
                pixels.append(random_square(read_rgb(stored(sample), DRAFT * self.resolution), self.resolution, square))
            except UNREADABLE as error:
                tally.skip(sample, error)
                continue
            captions.append(sample.caption or "")
            keys.append(sample.key)
        if not pixels:
            raise ValueError(f"expected a usable sample in a batch of {len(samples)}, got none, last {tally.last}")
        tokens, lengths = tokenize(captions, self.context_length, truncate=True, return_lengths=True)
        labels = _labels(captions) if self.config.caption_labels else None
        whole = default_collate([torch.from_numpy(square) for square in pixels])  # in a worker: straight into shared memory
        return Batch(whole.permute(0, 3, 1, 2), tokens, lengths, labels, keys)


def _labels(captions: Iterable[str]) -> Tensor:
    """[B] int64, equal for equal captions on every rank and in every process, which Python's own salted hash is not."""
    digests = (hashlib.blake2b(caption.strip().encode(), digest_size=8).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


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
            return preprocess(stored(sample))
        except UNREADABLE as error:
            return error

    def finish(chosen: Sequence[Sample], loaded: Iterable[Tensor | Exception]) -> Iterator[tuple[list[Sample], Tensor]]:
        good: list[tuple[Sample, Tensor]] = []
        for sample, result in zip(chosen, loaded, strict=True):
            tally.seen += 1
            if isinstance(result, Exception):
                tally.skip(sample, result)
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
