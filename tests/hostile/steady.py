"""`python -m tests.hostile.steady CALLS SECONDS`: many calls of everything in a process, whose memory must stay what it was."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import itertools
import math
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from clipfast import clip_loss, export, load, siglip_loss, tokenize
from clipfast.cli import USER_ERRORS, main
from clipfast.data import DataConfig, Tally, read_images, training_batches
from clipfast.evaluate import classify, embed
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from tests.data.test_data import png, write_shards, write_table
from tests.hostile.harness import mutated
from tests.hostile.weights import SIZES

MODEL = SIZES | {"vocab_size": 49408, "context_length": 16}
BIAS = torch.tensor(-10.0)
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # glibc's
GROWTH = 1 << 20  # bytes that a soak may leave: a leak of 300 in each of its calls is seen
OBJECTS = 100  # of Python's


def everything(folder: Path) -> dict[str, Callable[[random.Random], object]]:
    """Name -> a call of each part of clipfast, of good and of damaged inputs."""
    torch.manual_seed(0)
    model, transform = CLIP(**MODEL).eval(), Preprocess(32)
    shards = write_shards(folder / "s", shards=2)
    write_table(folder / "t", 4)
    torch.save({"state_dict": model.state_dict(), "model_config": {"quick_gelu": True}}, folder / "tiny.pt")
    weights, images = (folder / "tiny.pt").read_bytes(), torch.rand(4, 3, 32, 32)
    texts, broken, counter = tokenize(["a dog", "two cats", "x", "yes"], 16), folder / "broken.pt", itertools.count()

    def trained(rng: random.Random) -> None:
        features = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
        (clip_loss(*features, model.logit_scale.exp()) + siglip_loss(*features, model.logit_scale.exp(), BIAS)).backward()
        model.zero_grad(set_to_none=True)

    def damaged(rng: random.Random) -> None:
        broken.write_bytes(mutated(weights, rng))
        with contextlib.suppress(*USER_ERRORS):
            load(broken, "cpu")
        with contextlib.suppress(*USER_ERRORS):
            transform(mutated(png(1), rng))

    def embedded(rng: random.Random) -> None:
        out = folder / f"out{next(counter) % 3}"
        source = DataConfig(shards).open()
        with contextlib.redirect_stderr(io.StringIO()):
            embed(model, transform, source, out, part_size=4, batch_size=4)
        shutil.rmtree(out)

    def commanded(rng: random.Random) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(["classify", str(folder / "t" / "1.png"), "a", "b", "--model", str(folder / "tiny.pt"), "--device", "cpu"])

    def read(rng: random.Random) -> None:
        [*read_images(DataConfig(str(folder / "t" / "pairs.csv")).open().samples(), transform, 4, Tally(0.5))]
        next(training_batches(DataConfig(shards, workers=0), 32, 4, context_length=16)(rng.randrange(5)))

    return {
        "train": trained,
        "encode": lambda rng: (model.encode_image(images), model.encode_text(texts), model(images, texts)),
        "classify": lambda rng: classify(model, images, ["a", "b", "c"]),
        "tokenize": lambda rng: tokenize([str(rng.randrange(1000)) for _ in range(50)]),
        "load": lambda rng: load(folder / "tiny.pt", "cpu"),
        "export": lambda rng: export(model, folder / "e.safetensors", "safetensors").unlink(),
        "damaged": damaged,
        "embed": embedded,
        "command": commanded,
        "read": read,
    }


def measured() -> tuple[int, int, int, int]:
    """What must stay as it is: bytes in memory, Python's objects, open files, threads.

    Of the bytes those that glibc holds though they are free are given back first: how much that is hangs on the order of calls.
    """
    gc.collect()
    TRIM(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), threading.active_count()


def samples(calls: int, until: float = math.inf) -> tuple[int, list[tuple[int, int, int, int]]]:
    """(calls made, what was measured after each round of all parts)."""
    rng, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        parts = [*everything(Path(folder)).values()]
        for number in range(calls):
            parts[number % len(parts)](rng)
            if (number + 1) % len(parts) == 0:
                found.append(measured())
            if time.monotonic() > until:
                break
    return number + 1, found


def grown(found: list[tuple[int, int, int, int]]) -> list[int]:
    """By how much each measure is larger in the last fifth than in the second: in the first what is imported late is."""
    fifth = max(1, len(found) // 5)
    return [
        int(statistics.median(own[-fifth:]) - statistics.median(own[fifth : 2 * fifth])) for own in zip(*found, strict=True)
    ]


def report(calls: int, seconds: float) -> int:
    begun = time.monotonic()
    made, found = samples(calls, begun + seconds)
    memory, objects, files, threads = grown(found)
    cut = "" if made == calls else " (cut short)"
    told = f"{memory / 2**20:+.2f} MB, {objects:+} objects, {files:+} open files, {threads:+} threads"
    print(f"memory          {made:,} calls of everything{cut}: {told}; {time.monotonic() - begun:.0f} s", flush=True)
    return int(memory > GROWTH or objects > OBJECTS or files > 0 or threads > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(report(int(sys.argv[1]), float(sys.argv[2])))
