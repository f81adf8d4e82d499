"""A folder of features: how it is laid out, written part by part, and read again.

embed.json          what the features depend on, and, once all of them are there, the names of the parts
listing.jsonl       what the source held: a line for each file or shard
img_emb/            img_emb_NAME.npy: image features after the projection, [rows, D], of unit length
hidden_emb/         the same before the projection, as they are
text_emb/           text features, of unit length
metadata/           metadata_NAME.jsonl or .parquet: a row for each row of the vectors; written last, so that a part is done
done/               NAME.json: a unit (a shard, or so many rows) is done, and of how many parts it is
refresh/            the folder that will take this one's place, while it is made
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipfast.evaluate.listing import Entry
from clipfast.files import parsed, read_parsed, replacing

KINDS = {"image": "img_emb", "hidden": "hidden_emb", "text": "text_emb"}
FORMATS = ("npy", "clip-retrieval", "parquet")
ABOUT, LISTING, DONE, REFRESH = "embed.json", "listing.jsonl", "done", "refresh"
Row = dict[str, Any]


class Part(NamedTuple):
    rows: list[Row]
    vectors: dict[str, np.ndarray]


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


class Store:
    """One folder. `form`: vectors as .npy with metadata as .jsonl ("npy") or as .parquet ("clip-retrieval", what its index,
    filter and back-end read), or all as columns of one .parquet ("parquet", what autofaiss reads)."""

    def __init__(self, folder: Path, form: str, features: Sequence[str]) -> None:
        self.folder, self.form, self.features = folder, form, features
        self.kinds = ["metadata"] if form == "parquet" else [*(KINDS[own] for own in features), "metadata"]

    def path(self, kind: str, name: str) -> Path:
        ending = "npy" if kind != "metadata" else "jsonl" if self.form == "npy" else "parquet"
        return self.folder / kind / f"{kind}_{name}.{ending}"

    def begin(self, about: dict[str, Any], listing: Sequence[Entry]) -> None:
        for kind in (*self.kinds, DONE):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / LISTING) as file:
            for entry in listing:
                file.write(json.dumps(entry).encode() + b"\n")
        write_json(self.folder / ABOUT, about)

    def about(self) -> dict[str, Any] | None:
        path = self.folder / ABOUT
        return read_parsed(path) if path.exists() else None

    def listing(self) -> list[Entry]:
        path = self.folder / LISTING
        with open(path, "rb") as file:
            found = [parsed(line, f"{path}, line {number}", list) for number, line in enumerate(file, 1)]
        if not all(found):
            raise ValueError(f"{path}: expected a name in each line, got none in line {found.index([]) + 1}; remove the folder")
        return found

    # ---- parts

    def has(self, name: str) -> bool:
        return self.path("metadata", name).exists()

    def write(self, name: str, part: Part) -> None:
        """The metadata last: they say that the part is there."""
        if self.form != "parquet":
            for own, vectors in part.vectors.items():
                with replacing(self.path(KINDS[own], name)) as file:
                    np.save(file, vectors)
        with replacing(self.path("metadata", name)) as file:
            if self.form == "npy":
                file.write("".join(json.dumps(row, default=str) + "\n" for row in part.rows).encode())
            else:
                _write_parquet(file, part if self.form == "parquet" else Part(part.rows, {}))

    def read(self, name: str) -> Part:
        if self.form == "npy":
            with open(self.path("metadata", name), encoding="utf-8") as file:
                rows = [parsed(line, file.name) for line in file]
        else:
            table = _parquet().read_table(self.path("metadata", name))
            columns = [own for own in table.column_names if own not in _columns(self.features)]
            rows = table.select(columns).to_pylist()
        if self.form == "parquet":
            vectors = {}
            for own, column in _columns(self.features).items():
                flat = table[own].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                vectors[column] = flat.reshape(len(rows), -1)
        else:
            # Mapped, so that what is looked up in it is read and no more; private: torch warns of what cannot be written.
            vectors = {own: np.load(self.path(KINDS[own], name), mmap_mode="c") for own in self.features}
        if bad := [own for own, found in vectors.items() if len(found) != len(rows)]:
            raise ValueError(
                f"{self.folder}: expected a vector for each of {len(rows)} rows of {name}, got other {bad[0]} ones"
            )
        return Part(rows, vectors)

    def copy(self, name: str, other: Store, of: str) -> None:
        """This part is that one of another store."""
        for kind in self.kinds:
            with replacing(self.path(kind, name)) as file, open(other.path(kind, of), "rb") as source:
                shutil.copyfileobj(source, file)

    # ---- units

    def finish_unit(self, unit: int, about: dict[str, Any]) -> None:
        write_json(self.folder / DONE / f"{unit:05}.json", about)

    def finished(self) -> dict[int, dict[str, int]]:
        """Unit -> its parts, the samples in it and the rows that came of them."""
        found = {}
        for path in (self.folder / DONE).glob("*.json"):
            about = read_parsed(path)
            if not path.stem.isdecimal() or not all(type(about.get(own)) is int for own in ("parts", "samples", "rows")):
                raise ValueError(f"{path}: expected the numbers of a unit's parts, samples and rows, got {str(about)[:80]}")
            found[int(path.stem)] = about
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """Of the parts of all finished units, in order."""
        return [part_name(unit, part) for unit, about in self.finished().items() for part in range(about["parts"])]


def read_features(folder: str | Path) -> Part:
    """All rows that `embed` wrote to a folder, and their vectors [rows, D] by feature: mapped where they are one part."""
    about = read_parsed(Path(folder) / ABOUT)
    if not isinstance(about.get("parts"), list):
        raise ValueError(f"expected the features of a whole source in {folder}, got a part of them; finish the embed")
    store = Store(Path(folder), about["format"], about["features"])
    parts = [store.read(name) for name in about["parts"]]
    if len(parts) == 1:
        return parts[0]
    vectors = {own: np.concatenate([part.vectors[own] for part in parts]) for own in store.features if parts}
    return Part([row for part in parts for row in part.rows], vectors)


def part_name(unit: int, part: int) -> str:
    """Sorted as text they are in order: most readers know no other."""
    return f"{unit:05}" if part == 0 else f"{unit:05}_{part:04}"


def clear(folder: Path) -> None:
    """Remove what a killed run was just writing."""
    for kind in ("", *KINDS.values(), "metadata", DONE):
        for path in (folder / kind).glob("*.part"):
            path.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """A finished refresh takes the place of what was there; killed within, it goes on the next time."""
    place = folder / REFRESH / ABOUT
    about = read_parsed(place) if place.exists() else {}
    if not isinstance(about.get("parts"), list):
        return
    staged, old = (Store(own, about["format"], about["features"]) for own in (folder / REFRESH, folder))
    (folder / ABOUT).unlink(missing_ok=True)  # what reads the folder meanwhile must not take it for whole
    names, units = about["parts"], about["units"]
    for kind in staged.kinds:
        kept = {old.path(kind, name).name for name in names}
        _move(folder / REFRESH / kind, folder / kind, kept)
    _move(folder / REFRESH / DONE, folder / DONE, {f"{unit:05}.json" for unit in range(units)})
    with suppress(FileNotFoundError):
        os.replace(folder / REFRESH / LISTING, folder / LISTING)
    os.replace(folder / REFRESH / ABOUT, folder / ABOUT)
    shutil.rmtree(folder / REFRESH)


def _move(source: Path, target: Path, kept: set[str]) -> None:
    """All files of a folder into another, which keeps of its own those of these names."""
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        if path.name not in kept:
            path.unlink()
    if source.is_dir():
        for path in source.iterdir():
            os.replace(path, target / path.name)


# ---- Parquet


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("expected pyarrow for Parquet: pip install pyarrow, or take the format npy") from error
    return parquet


def _columns(features: Sequence[str]) -> dict[str, str]:
    """Column of a Parquet file -> the feature in it."""
    return {{"image": "image_embedding", "text": "text_embedding"}.get(own, f"{own}_embedding"): own for own in features}


def _write_parquet(file: Any, part: Part) -> None:
    parquet = _parquet()
    import pyarrow

    names = list(dict.fromkeys(name for row in part.rows for name in row))
    columns = {name: _column([row.get(name) for row in part.rows]) for name in names}
    for column, own in _columns(list(part.vectors)).items():
        vectors = part.vectors[own]
        flat = pyarrow.array(vectors.ravel())
        columns[column] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]).cast(pyarrow.list_(flat.type))
    parquet.write_table(pyarrow.table(columns), file)


def _column(values: list[Any]) -> Any:
    """Values of one simple kind as they are, others as text."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 and kinds <= {str, int, float, bool}:
        with suppress(pyarrow.ArrowException, OverflowError):  # an integer beyond 64 bits
            return pyarrow.array(values)
    return pyarrow.array([value if isinstance(value, str | None) else json.dumps(value, default=str) for value in values])
