"""What overlap and bias read beside the features: hashes of images, pairs to look at, designs of classes, attributes."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipfast.data import UNREADABLE, DataConfig, Tally, read_images
from clipfast.data.sources import Source, stored
from clipfast.evaluate.bias import Bias
from clipfast.evaluate.datasets import read_text
from clipfast.evaluate.embed import row_of
from clipfast.evaluate.overlap import perceptual_hash, sheet
from clipfast.evaluate.store import Part
from clipfast.files import parsed
from clipfast.inputs import read_image

PAIRS = 48  # near-duplicates that are named, and shown


def hashes(source: Source, reading: Mapping[str, Any]) -> Part:
    """Perceptual hashes [N, 64] of a source's images."""
    tally, rows, found = reading.get("tally") or Tally(), list[dict[str, Any]](), list[np.ndarray]()
    size, threads = reading.get("batch_size", 64), reading.get("threads", 2)

    def hashed(image: Any) -> torch.Tensor:
        return torch.from_numpy(perceptual_hash(read_image(image)))

    for samples, block in read_images(source.samples(), hashed, size, tally, threads):
        rows += map(row_of, samples)
        found.append(block.numpy())
    tally.check()
    if not rows:
        raise ValueError("expected images to hash, got none")
    return Part(rows, {"hash": np.concatenate(found)})


def images_of(source: Source, keys: Collection[str], side: int = 256) -> dict[str, Image.Image]:
    """These images of a source, small."""
    found: dict[str, Image.Image] = {}
    for sample in source.samples():
        if sample.key in keys and sample.key not in found:
            try:
                found[sample.key] = read_image(stored(sample)).convert("RGB")
            except UNREADABLE:
                continue
            found[sample.key].thumbnail((side, side))
    return found


def pair_sheet(pairs: Sequence[Mapping[str, Any]], test: Source, train: Source) -> Image.Image:
    """Test images beside the training images that they are near-duplicates of."""
    mine = images_of(test, {pair["test"] for pair in pairs})
    theirs = images_of(train, {pair["train"] for pair in pairs})
    shown = [own for own in pairs if own["test"] in mine and own["train"] in theirs]
    return sheet([(mine[own["test"]], theirs[own["train"]], label(own)) for own in shown])


def label(pair: Mapping[str, Any], letters: int = 40) -> str:
    """How much alike both are, and their names; of long ones the end."""
    told = f"{pair['alike']:.3g}"
    room = (letters - len(told) - 4) // 2
    return f"{told}  {pair['test'][-room:]}, {pair['train'][-room:]}"


def designs(path: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The designs of the classes, and the groups of labels that are counted, of a JSON file."""
    if not path:
        raise ValueError("expected designs, a JSON file of designs and groups of labels, for bias")
    given = parsed(read_text(path), path)
    both = given.get("designs"), given.get("groups")
    for own in both:
        lists = own.values() if isinstance(own, dict) else [None]
        if not lists or not all(isinstance(one, list) and one and all(isinstance(n, str) for n in one) for one in lists):
            raise ValueError(f"{path}: expected designs and groups, each an object of lists of labels; got {str(given)[:80]}")
    return both  # type: ignore[return-value]


def attributes(reader: DataConfig, keys: Sequence[str]) -> dict[str, list[str]]:
    """Column -> its value for each image, of a table with columns beside the image's."""
    if not reader.data.lower().endswith((".csv", ".tsv")):
        raise ValueError(f"expected a .csv or .tsv with columns of attributes for bias, got {reader.data}")
    with open(reader.data, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter=reader.separator or ("\t" if reader.data.endswith(".tsv") else ",")))
    if not rows or reader.image_column not in rows[0] or len(rows[0]) < 2:
        raise ValueError(f"{reader.data}: expected rows with the column {reader.image_column} and columns of attributes")
    by_key = {row[reader.image_column]: row for row in rows}
    if unknown := [key for key in keys if key not in by_key]:
        raise ValueError(f"{reader.data}: expected a row of every image, got none of {unknown[:3]}")
    return {own: [by_key[key][own] for key in keys] for own in rows[0] if own and own != reader.image_column}


def widest_gap(shares: Bias) -> float:
    """Under the first design: the most that the shares of a group of labels differ between the values of an attribute."""
    found: dict[tuple[str, str], list[float]] = {}
    for own in shares.shares:
        if own.design == shares.shares[0].design:
            found.setdefault((own.group, own.attribute), []).append(own.share)
    return max(max(own) - min(own) for own in found.values())
