"""One image-text pair as it is stored, and what gives them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class Sample(NamedTuple):
    """One image as stored, not yet decoded."""

    key: str
    image: Any  # bytes, a path, an array that `read_image` takes, or None
    caption: str | None
    meta: dict[str, Any]  # a shard's .json, and "class" from its .cls or from the image's folder
    error: str = ""  # why there is nothing to read: this stands for a sample or, at the end of it, for the rest of a shard
    fields: tuple[str, ...] = ()  # names of what a shard has of it, for messages


class Source(Protocol):
    """Where samples come from."""

    @property
    def parts(self) -> int: ...  # how many workers can share it

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """One pass over the samples of this worker, always the same ones, in stored order or shuffled."""
        ...


class Rows:
    """Samples whose images are files of their own, listed in memory."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self.rows, self.parts = rows, len(rows)

    def samples(self, shuffle: random.Random | None = None, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        rows = list(self.rows[worker::workers])
        if shuffle:
            shuffle.shuffle(rows)
        return iter(rows)


def text_of(caption: Any) -> str | None:
    """JSON, Parquet and memory may hold anything as a caption: what is no text, a list of them or NaN, counts as missing."""
    return caption if isinstance(caption, str) else None


def stored(sample: Sample) -> Any:
    """Its image, or an error that says why there is none."""
    if sample.error:
        raise ValueError(sample.error)
    if sample.image is None:
        told = f"; its fields are {', '.join(sample.fields)}: name the image's by image_field" if sample.fields else ""
        raise ValueError(f"expected an image ({', '.join(IMAGES)}), found none{told}")
    return sample.image


def no_caption(sample: Sample) -> str:
    """Why a sample without a caption cannot be used: which fields it might be in."""
    others = [name for name in sample.fields if name not in (*IMAGES, "txt", "json", "cls")]
    return (
        f"no caption; its fields are {', '.join(sample.fields)}: name the caption's by caption_field"
        if others
        else "no caption"
    )
