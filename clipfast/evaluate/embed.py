"""Features of whole data sets, written to disk by any number of ranks, whatever interrupts them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clipfast.data import Tally
from clipfast.data.sources import Sample, Source
from clipfast.evaluate.features import FEATURES, encode_samples, together, width
from clipfast.evaluate.listing import Entry, Units, differences, listed
from clipfast.evaluate.store import (
    ABOUT,
    DONE,
    FORMATS,
    KINDS,
    LISTING,
    REFRESH,
    Part,
    Row,
    Store,
    clear,
    part_name,
    settle,
    write_json,
)  # fmt: skip
from clipfast.files import LOCK, locked, output_folder, remove
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job


def embed(
    model: CLIP,
    preprocess: Preprocess,
    source: Source,
    out: str | Path,
    *,
    features: Sequence[str] = ("image",),
    dtype: str = "float32",
    part_size: int = 4096,
    form: str = "npy",
    refresh: bool = False,
    job: Job = ALONE,
    weights: str = "",
    **reading: Any,
) -> int:
    """Features of a source in the folder `out`, as `clipfast.evaluate.store` lays it out; -> how many parts.

    features: "image" and "text" (projected, of unit length), "hidden" (of the image tower, before the projection).
    part_size: rows of a part at most; a shard begins another.
    refresh: another content of the source than that of `out` is made part of it, and only what changed is made; without, it is
        refused, with what differs.
    job: the parts are shared out to its ranks. weights: `weights_digest` of the model, where it is known already.

    A part is there whole or not at all, and is not made again: killed and started again, on any number of ranks, the rows are
    the same. Another model, preprocessing, dtype or choice of features is refused.
    """
    key, units = depends_on(model, preprocess, features, dtype, form, part_size, weights), Units(source, part_size)
    folder, tally = Path(out), reading.get("tally") or Tally()
    with ExitStack() as stack:

        def begin() -> tuple[bool, list[int]] | None:
            if job.rank:
                return None
            listing = listed(source)
            if _is_complete(Store(folder, form, features), key, listing):
                return False, []
            stack.enter_context(output_folder(out))
            stack.enter_context(locked(folder))
            return _begin(folder, key, listing, len(units), refresh)

        plan = together(job, begin, lambda made: made)[1][0]
        assert plan is not None  # rank 0's
        staged, remaining = plan
        store = Store(folder / REFRESH if staged else folder, form, features)

        def work() -> None:
            before = Store(folder, form, features) if staged else None
            maker = _Maker(model, preprocess, units, store, dtype, reading | {"tally": tally}, before)
            with tqdm(unit=" rows", desc="embed", disable=job.rank > 0) as bar:
                for unit in remaining[job.rank :: job.world]:
                    maker.make(unit, bar)

        def end() -> int | None:
            return None if job.rank else _end(folder, store, key, len(units), source, tally.allowed, last)

        try:
            _, lasts = together(job, work, lambda made: tally.last)
            last = next(filter(None, lasts), "in an earlier run")
            found = together(job, end, lambda made: made)[1][0]
        except BaseException:
            if job.rank == 0:
                _withdraw(store)
            raise
        assert found is not None
        return found


def depends_on(
    model: CLIP, preprocess: Any, features: Sequence[str], dtype: str, form: str, part_size: int, weights: str = ""
) -> dict[str, Any]:
    """What vectors depend on beside the source's content."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f"expected dtype float16 or float32, got {dtype!r}")
    if form not in FORMATS:
        raise ValueError(f"expected a format of {', '.join(FORMATS)}, got {form!r}")
    if not features or set(features) - set(FEATURES) or len(set(features)) != len(features):
        raise ValueError(f"expected features of {', '.join(FEATURES)}, each once, got {list(features)}")
    if part_size < 1:
        raise ValueError(f"expected a part_size of 1 or more, got {part_size}")
    read = _told(preprocess) if set(features) & {"image", "hidden"} else ""
    return {
        "weights": weights or weights_digest(model), "preprocess": read, "features": list(features),
        "dtype": dtype, "format": form, "part_size": part_size, "version": 1,
    }  # fmt: skip


def _told(preprocess: Any) -> str:
    """What a transform is, the same in every process: addresses left out, steps that were put into it by hand included."""
    told = repr(preprocess)
    if isinstance(preprocess, Preprocess) and "transforms" in vars(preprocess):
        steps = repr(preprocess.transforms)
        told += steps if steps != repr(replace(preprocess).transforms) else ""
    return re.sub(r" at 0x[0-9a-f]+", "", told)


def weights_digest(model: nn.Module) -> str:
    """Of all weights, and of what else the modules are made of: heads, activations, sizes."""

    def of(named: tuple[str, torch.Tensor]) -> bytes:
        content = named[1].detach().cpu().contiguous()
        own = hashlib.sha256(f"{named[0]} {content.dtype} {list(content.shape)}".encode())
        if content.numel():
            own.update(content.reshape(-1).view(torch.uint8).numpy().data)
        return own.digest()

    with ThreadPoolExecutor(8) as pool:  # it hashes without the interpreter's lock
        found = hashlib.sha256(b"".join(pool.map(of, sorted(model.state_dict().items()))))
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple | None)}
        plain = sorted((key, repr(value)) for key, value in own.items() if key[0] != "_" and key != "training")
        found.update(f"{name} {type(module).__name__} {plain}".encode())
    return found.hexdigest()[:32]


class _Maker:
    """Makes units one by one; `before`: a folder that has some of the rows already."""

    def __init__(
        self,
        model: CLIP,
        preprocess: Any,
        units: Units,
        store: Store,
        dtype: str,
        reading: dict[str, Any],
        before: Store | None,
    ) -> None:
        self.model, self.preprocess, self.units, self.store, self.dtype = model, preprocess, units, store, dtype
        self.reading, self.before = reading, before
        self.listing = store.listing() if before else []
        self.done = before.finished() if before else {}
        self.known = _known(before, self.done, units) if before and self.done else {}

    def make(self, unit: int, bar: Any) -> None:
        of = None if self.units.by_row or self.before is None else self.known.get(_text(self.listing[unit]))
        if of is not None and self.before is not None:
            for place in range(self.done[of]["parts"]):
                self.store.copy(part_name(unit, place), self.before, part_name(of, place))
            self.store.finish_unit(unit, self.done[of])
            return
        samples, made = self.units.samples(unit), {"parts": 0, "samples": 0, "rows": 0}
        while (first := next(samples, None)) is not None:
            name = part_name(unit, made["parts"])
            made["parts"] += 1
            chunk = _counted(chain([first], islice(samples, self.units.rows - 1)), made)
            if self.store.has(name):
                bar.update(sum(1 for _ in chunk))
                made["rows"] += len(self.store.read(name).rows)
                continue
            part = self._changed(unit, [*chunk], bar) if self.known and self.units.by_row else self._part(chunk, bar)[0]
            self.store.write(name, part)
            made["rows"] += len(part.rows)
        self.store.finish_unit(unit, made)

    def _part(self, samples: Iterable[Sample], bar: Any) -> tuple[Part, list[int]]:
        """The part of these samples, and which objects they are: some may be unreadable."""
        rows, which = list[Row](), list[int]()
        found = {own: [np.zeros((0, width(self.model, own)), self.dtype)] for own in self.store.features}
        for good, made in encode_samples(self.model, self.preprocess, samples, self.store.features, **self.reading):
            for own, blocks in found.items():
                blocks.append(made[own].cpu().numpy().astype(self.dtype))
            rows += [row_of(sample, self.store.features) for sample in good]
            which += map(id, good)
            bar.update(len(good))
        return Part(rows, {own: np.concatenate(blocks) for own, blocks in found.items()}), which

    def _changed(self, unit: int, samples: list[Sample], bar: Any) -> Part:
        """The part of these rows, of which those that are known are only copied."""
        known = [self.known.get(_text(entry)) for entry in self.listing[self.units.span(unit)]]
        part, which = self._part([own for own, place in zip(samples, known, strict=True) if place is None], bar)
        assert self.before is not None
        new, parts = {own: row for row, own in enumerate(which)}, {place[0]: None for place in known if place}
        old = {name: self.before.read(name) for name in parts}
        picked = [
            (old[place[0]], place[1]) if place else (part, new[id(own)])
            for own, place in zip(samples, known, strict=True)
            if place or id(own) in new
        ]
        vectors = {
            own: np.stack([of.vectors[own][row] for of, row in picked]) if picked else part.vectors[own]
            for own in self.store.features
        }
        return Part([of.rows[row] for of, row in picked], vectors)


def row_of(sample: Sample, features: Sequence[str] = ("image",)) -> Row:
    """What is kept beside a row of vectors; image_path as clip-retrieval's filter and back-end look for it."""
    path = str(sample.image) if isinstance(sample.image, str | Path) else sample.key
    return (
        sample.meta | ({} if [*features] == ["text"] else {"image_path": path}) | {"key": sample.key, "caption": sample.caption}
    )


def _text(entry: Entry) -> str:
    return json.dumps(entry)


def _counted(samples: Iterable[Sample], made: dict[str, int]) -> Iterator[Sample]:
    for sample in samples:
        made["samples"] += 1
        yield sample


def _known(store: Store, done: dict[int, Any], units: Units) -> dict[str, Any]:
    """Entry -> (part, row), or of a shard its unit, of what is finished."""
    listing, known = store.listing(), dict[str, Any]()
    for unit in done:
        if not units.by_row:
            known[_text(listing[unit])] = unit
            continue
        rows, row = store.read(part_name(unit, 0)).rows, 0
        for entry in listing[units.span(unit)]:
            if row < len(rows) and rows[row].get("key") == entry[0]:  # of an unreadable image there is none
                known[_text(entry)] = (part_name(unit, 0), row)
                row += 1
    return known


def _is_complete(store: Store, key: dict[str, Any], listing: list[Entry]) -> bool:
    """Whether nothing is to be done, not even to be tidied up: several processes may then read at once, and need not write."""
    about = store.about() or {}
    if (store.folder / LOCK).exists() or (store.folder / REFRESH).exists() or "parts" not in about:
        return False
    return all(about.get(name) == value for name, value in key.items()) and not differences(store.listing(), listing)


def _begin(folder: Path, key: dict[str, Any], listing: list[Entry], units: int, refresh: bool) -> tuple[bool, list[int]]:
    """Whether the folder is made anew beside what is there, and the units that are to be made."""
    for name in (*KINDS.values(), "metadata", DONE, REFRESH):
        if (folder / name).is_symlink():  # never ours: what it leads to would be written to, and emptied by a refresh
            raise ValueError(f"expected a folder at {folder / name}, got a link; remove it, or link all of {folder}")
    settle(folder)
    store, staged = Store(folder, key["format"], key["features"]), Store(folder / REFRESH, key["format"], key["features"])
    for own in (folder, folder / REFRESH):
        clear(own)
    before = store.about()
    if before is None:
        store.begin(key, listing)
    else:
        _check_key(folder, before, key)
        if not (told := differences(store.listing(), listing)):
            remove(folder / REFRESH)
        elif not refresh:
            raise ValueError(
                f"expected the content that {folder} was made from, but in the source there are {told}; take --refresh to make "
                "only what changed, or another folder"
            )
        else:
            if staged.about() is None or differences(staged.listing(), listing):
                remove(folder / REFRESH)
                staged.begin(key, listing)
            return True, _remaining(staged, units)
    return False, _remaining(store, units)


def _remaining(store: Store, units: int) -> list[int]:
    done = store.finished()
    return [unit for unit in range(units) if unit not in done]


def _check_key(folder: Path, before: dict[str, Any], key: dict[str, Any]) -> None:
    if differ := [f"{name} {before.get(name)} -> {value}" for name, value in key.items() if before.get(name) != value]:
        raise ValueError(f"expected to go on with what {folder} was made by, but {', '.join(differ)}; choose another folder")


def _end(folder: Path, store: Store, key: dict[str, Any], units: int, source: Source, allowed: float, last: str) -> int:
    """Says that all parts are there; -> how many."""
    if "parts" in (about := store.about() or {}):
        return len(about["parts"])
    if told := differences(store.listing(), listed(source)):
        raise ValueError(f"expected no change of the source while {folder} is made, but there are {told}; go on by --refresh")
    done = store.finished().values()
    seen, good = (sum(own[what] for own in done) for what in ("samples", "rows"))
    if seen - good > allowed * seen:
        raise ValueError(
            f"expected at most {allowed:.0%} unusable samples, got {seen - good} of {seen}, last {last}; repair the data and "
            "go on by --refresh, or raise max_bad"
        )
    names = store.names()
    write_json(store.folder / ABOUT, key | {"units": units, "parts": names})
    settle(folder)
    return len(names)


def _withdraw(store: Store) -> None:
    """What was begun and has no row."""
    if not any(len(store.read(path.stem.removeprefix("metadata_")).rows) for path in (store.folder / "metadata").glob("*")):
        for kind in (*store.kinds, DONE):
            remove(store.folder / kind)
        for name in (ABOUT, LISTING):
            (store.folder / name).unlink(missing_ok=True)
        if store.folder.name == REFRESH:
            store.folder.rmdir()
