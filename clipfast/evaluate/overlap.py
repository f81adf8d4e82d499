"""Test images that training has seen, and what they are worth to the accuracy (paper, section 4; arXiv's section 5).

Near-duplicates are found by features (cosine) or by a perceptual hash (bits that differ); both are a search for each test
row's nearest training row, in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from clipfast.evaluate import metrics
from clipfast.evaluate.intervals import Interval, clopper_pearson
from clipfast.evaluate.metrics import Array, array, needed, paired

BITS = 64  # of a perceptual hash: the 8 × 8 lowest frequencies
SIDE = 32  # pixels of the image that they are taken from


class Nearest(NamedTuple):
    """Of each test row [M]: the cosine of its nearest training row, and that row's number."""

    similarity: np.ndarray
    row: np.ndarray


@torch.no_grad()
def nearest(test: np.ndarray | Tensor, train: Iterable[np.ndarray | Tensor], device: str | torch.device = "cpu") -> Nearest:
    """The nearest training row of each test row [M, D], by cosine; train in parts [N, D], memory-mapped or made one by one.

    Scores exist in blocks only, never as M × N; on a CPU FAISS makes them where it is installed. Equal cosines: the first row.
    """
    queries = unit(test, "test", device)
    best = torch.full((len(queries),), -torch.inf, device=device)
    found, start = torch.full((len(queries),), -1, dtype=torch.long, device=device), 0
    rows = max(1, min(metrics.SCORES // max(1, queries.shape[1]), 1 << 14))
    columns, faiss = max(1, metrics.SCORES // rows), _faiss() if queries.device.type == "cpu" else None
    for part in train:
        if part.ndim != 2 or part.shape[1] != queries.shape[1]:
            raise ValueError(f"expected train features [N, {queries.shape[1]}], as wide as test's, got {tuple(part.shape)}")
        for first in range(0, len(part), rows):
            block = unit(part[first : first + rows], "train", device)
            if faiss is not None:
                highest, place = (torch.from_numpy(own[:, 0]) for own in _by_faiss(faiss, queries, block))
                nearer = highest > best
                found, best = torch.where(nearer, start + first + place, found), torch.where(nearer, highest, best)
                continue
            for own in range(0, len(queries), columns):
                span = slice(own, own + columns)
                highest, place = (queries[span] @ block.T).max(1)  # of equals the first
                nearer = highest > best[span]
                found[span] = torch.where(nearer, start + first + place, found[span])
                best[span] = torch.where(nearer, highest, best[span])
        start += len(part)
    if not start:
        raise ValueError("expected training features, got none")
    return Nearest(best.cpu().numpy(), found.cpu().numpy())


def _faiss() -> ModuleType | None:
    try:
        return import_module("faiss")
    except ImportError:
        return None


def _by_faiss(faiss: ModuleType, queries: Tensor, block: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Its exact search; of equals the first too. 5,000 x 40,000 rows of 512 on one core, busy: 5.7 s, by torch 16."""
    return faiss.knn(queries.numpy(), block.numpy(), 1, metric=faiss.METRIC_INNER_PRODUCT)


def unit(features: np.ndarray | Tensor, what: str, device: str | torch.device) -> Tensor:
    """Rows of length 1, float32."""
    tensor = features if isinstance(features, Tensor) else torch.from_numpy(np.array(features))
    if tensor.ndim != 2 or not len(tensor):
        raise ValueError(f"expected {what} features [N, D] of at least one row, got shape {tuple(tensor.shape)}")
    tensor = tensor.to(device, torch.float32)
    length = tensor.norm(dim=1, keepdim=True)
    if not length.isfinite().all() or not length.all():
        raise ValueError(f"expected finite {what} features, and none all zero; check the model and the images")
    return tensor / length


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """[64] float32 of 1/8 and -1/8: which of the lowest frequencies of the grey image are above their median.

    The bits are those of imagehash's `phash`. Of two hashes that differ in b bits, the cosine is 1 - b / 32.
    """
    pixels = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    waves = 2 * np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
    low = (waves @ pixels @ waves.T).round(4)  # a flat image's bits would be those of the rounding
    return np.where(low > np.median(low), 0.125, -0.125).astype(np.float32).ravel()


def bits_apart(similarity: Array) -> np.ndarray:
    """How many bits of two perceptual hashes differ, given their cosine."""
    return np.rint((1 - np.asarray(similarity, dtype=np.float64)) * (BITS / 2)).astype(int)


class Overlap(NamedTuple):
    """One test set: accuracies on all of it, on near-duplicates and on the rest; None where a part has no image.

    p: of as many hits on the overlap or more, were its accuracy that of clean; adjusted: by Bonferroni, over the sets tested.
    interval: of the overlap's accuracy.
    """

    name: str
    images: int
    overlapping: int
    all: float
    overlap: float | None
    clean: float | None
    gain: float | None  # all - clean
    interval: Interval | None
    p: float | None
    adjusted: float | None


class Overlaps(NamedTuple):
    sets: list[Overlap]
    level: float

    def corrected(self) -> Overlaps:
        """By Bonferroni, over the sets that could be tested."""
        tests = sum(own.p is not None for own in self.sets)
        sets = [own._replace(adjusted=None if own.p is None else min(1.0, own.p * tests)) for own in self.sets]
        return self._replace(sets=sets)

    def summary(self) -> dict[str, Any]:
        return {"level": self.level, "sets": [own._asdict() for own in self.sets]}

    def table(self) -> str:
        width = max(4, *(len(own.name) for own in self.sets))
        level = f"{100 * self.level:g} % of Overlap"
        lines = [
            f"{'set':{width}} {'images':>8} {'overlap':>8} {'share':>7} {'All':>7} {'Overlap':>7} {'Clean':>7} "
            f"{'All-Clean':>9} {level:>18} {'p':>9} {'adjusted':>9}"
        ]
        for own in self.sets:
            interval = "-" if own.interval is None else f"{own.interval.low:.4f} {own.interval.high:.4f}"
            lines.append(
                f"{own.name:{width}} {own.images:8} {own.overlapping:8} {own.overlapping / own.images:7.2%} {own.all:7.4f} "
                f"{shown(own.overlap, '.4f'):>7} {shown(own.clean, '.4f'):>7} {shown(own.gain, '+.4f'):>9} {interval:>18} "
                f"{shown(own.p, '.3g'):>9} {shown(own.adjusted, '.3g'):>9}"
            )
        return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def overlaps(hits: Mapping[str, Array], duplicates: Mapping[str, Array], level: float = 0.995) -> Overlaps:
    """Of each test set: whether each image is read rightly [M], and whether training has a near-duplicate of it [M]."""
    if not hits or hits.keys() != duplicates.keys():
        raise ValueError(f"expected hits and duplicates of the same sets, got {sorted(hits)} and {sorted(duplicates)}")
    sets = []
    for name in hits:
        right, seen = array(hits[name], f"hits of {name}", 1), array(duplicates[name], f"duplicates of {name}", 1)
        paired(right, seen, f"hits of {name} as duplicates")
        right, seen = right.astype(bool), seen.astype(bool)
        inside, outside = right[seen], right[~seen]
        overlap, clean = (float(part.mean()) if len(part) else None for part in (inside, outside))
        tested = None
        if clean is not None and overlap is not None:
            tested = float(needed("scipy.stats").binomtest(int(inside.sum()), len(inside), clean, alternative="greater").pvalue)
        sets.append(
            Overlap(
                name, len(right), len(inside), float(right.mean()), overlap, clean,
                None if clean is None else float(right.mean()) - clean,
                None if overlap is None else clopper_pearson(int(inside.sum()), len(inside), level), tested, None,
            )
        )  # fmt: skip
    return Overlaps(sets, level).corrected()


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image, str]], columns: int = 4, side: int = 128) -> Image.Image:
    """Pairs to look at: a test image beside the training image, with a line about them below, `columns` pairs a row."""
    if not pairs:
        raise ValueError("expected pairs of images to show, got none")
    gap, line = 8, 14
    width, height = 2 * side + gap, side + line + gap
    columns = min(columns, len(pairs))
    page = Image.new("RGB", (columns * (width + gap) + gap, -(-len(pairs) // columns) * height + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, (test, train, text) in enumerate(pairs):
        left, top = gap + number % columns * (width + gap), gap + number // columns * height
        for place, image in enumerate((test, train)):
            small = ImageOps.contain(image.convert("RGB"), (side, side))
            page.paste(small, (left + place * side + (side - small.width) // 2, top + (side - small.height) // 2))
        draw.text((left, top + side + 1), text, "black")
    return page
