"""Where samples come from: shards, tables, folders, arrays. An image stays as it is stored, to be decoded by who needs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipfast.data.samples import IMAGES, Rows, Sample, Source, no_caption, stored, text_of
from clipfast.data.shards import FromFile, Shards, check_address, tars_in
from clipfast.data.tables import TABLES, read_table

__all__ = [
    "IMAGES", "TABLES", "FromFile", "Rows", "Sample", "Shards", "Source", "check_address", "from_arrays", "no_caption",
    "read_folder", "read_table", "stored", "tars_in",
]  # fmt: skip


def from_arrays(images: Sequence[Any], captions: Sequence[str]) -> Rows:
    """Pairs in memory: images as `read_image` takes them (arrays [H, W, 3] of uint8, PIL images, encoded bytes)."""
    if len(images) != len(captions):
        raise ValueError(f"expected as many captions as images, got {len(images)} images and {len(captions)} captions")
    pairs = zip(images, captions, strict=True)
    return Rows([Sample(str(row), image, text_of(caption), {}) for row, (image, caption) in enumerate(pairs)])


def read_folder(path: str | Path) -> Rows:
    """Every image below a folder, in sorted order. The folder that holds an image is its class; there are no captions.

    An image that lies beside the folders of the others has no class.
    """
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.suffix[1:].lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"expected images ({', '.join(IMAGES)}) below the folder {path}, found none")
    nested = any(file.parent != root for file in files)

    def meta(file: Path) -> dict[str, Any]:
        return {} if nested and file.parent == root else {"class": file.parent.name}

    return Rows([Sample(file.relative_to(root).as_posix(), file, None, meta(file)) for file in files])
