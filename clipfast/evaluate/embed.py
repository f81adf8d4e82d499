"""Features of whole data sets, written to disk."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clipfast.data.sources import Source
from clipfast.evaluate.features import encode_images
from clipfast.files import output_folder, replacing
from clipfast.inputs import Preprocess
from clipfast.model import CLIP


def embed(
    model: CLIP,
    preprocess: Preprocess,
    source: Source,
    out: str | Path,
    *,
    dtype: str = "float32",
    part_size: int = 4096,
    origin: dict[str, Any] | None = None,
    **reading: Any,
) -> int:
    """Normalised image features of a source as out/part_00000.npy [rows, D], keys and captions in part_00000.jsonl; -> parts.

    A part is there whole or not at all, and is not made again. `origin` (what the features come from) is kept in embed.json,
    and a later call with another one is refused.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"expected dtype float16 or float32, got {dtype!r}")
    origin = (origin or {}) | {"dtype": dtype, "part_size": part_size}
    samples, part = iter(source.samples()), 0
    with output_folder(out) as folder, tqdm(unit=" images", desc="embed") as bar:
        about = folder / "embed.json"
        if about.exists() and (before := json.loads(about.read_text())) != origin:
            raise ValueError(f"expected to go on with {before} in {folder}, got {origin}; choose another folder")
        while (first := next(samples, None)) is not None:
            chunk, name = chain([first], islice(samples, part_size - 1)), folder / f"part_{part:05}"
            part += 1
            if name.with_suffix(".npy").exists():
                bar.update(sum(1 for _ in chunk))
                continue
            vectors, lines = [np.zeros((0, model.visual.output_dim), dtype)], []
            for good, features in encode_images(model, preprocess, chunk, **reading):
                vectors.append(features.cpu().numpy().astype(dtype))
                lines += [json.dumps({"key": sample.key, "caption": sample.caption}) + "\n" for sample in good]
                bar.update(len(good))
            with replacing(about) as file:
                file.write(json.dumps(origin).encode())
            with replacing(name.with_suffix(".jsonl")) as file:
                file.write("".join(lines).encode())
            with replacing(name.with_suffix(".npy")) as file:  # last: it says that the part is finished
                np.save(file, np.concatenate(vectors))
    return part
