"""Tables of paths and captions, odd or damaged, against pandas: the same rows, or one line that names the file."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from clipfast.data import read_table
from tests.hostile.harness import Attempt, mutated, one_line
from tests.hostile.strings import text_of

NAMES = ("path", "caption", "extra", "Größe", "")
MARKS = (",", '"', ";", "|", "\t", "\nx", "'")
Rows = list[tuple[str | None, str | None]]


def rows_of(rng: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        made = text_of(rng).encode("utf-8", "replace").decode()
        made = made.replace("\0", "").replace("\r", " ")  # csv has no place for the first, nor pandas for the second
        return made if rng.random() < 0.8 else f"{made}{rng.choice(MARKS)}{made}"

    names = ["path", "caption", *rng.sample(NAMES[2:4], rng.randrange(3))]
    rng.shuffle(names)
    return [{name: (f"{i}.jpg" if name == "path" else text()) for name in names} for i in range(rng.randrange(1, 8))]


def written(rows: list[dict[str, str]], kind: str, separator: str, rng: random.Random) -> bytes:
    buffer = io.StringIO(newline="")
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode()
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))
    end = rng.choice(("\n", "\r\n"))
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return (b"\xef\xbb\xbf" if rng.random() < 0.2 else b"") + buffer.getvalue().encode()


def theirs(path: Path, kind: str, separator: str) -> Rows | None:
    """The rows of pandas, json or pyarrow, or None where they read none."""
    try:
        if kind == "parquet":
            table = pq.read_table(path)  # pandas would refuse what only its own notes in the file say
            return list(zip(table["path"].to_pylist(), table["caption"].to_pylist(), strict=True))
        if kind == "jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
            return [(line.get("path"), line.get("caption")) for line in lines]
        options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
        frame = pd.read_csv(path, sep=separator, **options)
        return list(zip(frame["path"].tolist(), frame["caption"].tolist(), strict=True))
    except MemoryError:
        raise
    except Exception:
        return None


def prepare(folder: Path) -> Attempt:
    def attempt(rng: random.Random) -> str:
        rows, kind = rows_of(rng), rng.choice(("csv", "csv", "tsv", "txt", "CSV", "jsonl", "parquet"))
        separator = {"tsv": "\t", "txt": "\t"}.get(kind, rng.choice(",;|\t"))
        path = folder / f"t.{kind}"
        if kind == "parquet":
            pd.DataFrame(rows).to_parquet(path)
            data = path.read_bytes()
        else:
            data = written(rows, kind, separator, rng)
        damaged = rng.random() < 0.7
        path.write_bytes(mutated(data, rng) if damaged else data)
        try:
            got = [(sample.key, sample.caption, sample.error) for sample in read_table(path).samples()]
        except Exception as error:
            told = one_line(error)
            if not damaged:
                return told or f"a good table is refused: {error}"
            return told or ("" if str(path.name) in str(error) else f"the file is not named: {error}")
        wanted = [(row["path"], row["caption"]) for row in rows]
        if not damaged:
            return "" if [row[:2] for row in got] == wanted else f"expected {wanted}, got {got}"
        expected = theirs(path, kind, separator)
        if expected is None:
            return "" if [row[:2] for row in got] == wanted or kind == "jsonl" else f"the oracle reads nothing, got {got}"
        return _apart(expected, got)

    return attempt


def _apart(expected: Rows, got: list[tuple[str, str | None, str]]) -> str:
    if len(expected) != len(got):
        return f"expected {len(expected)} rows, got {len(got)}: {expected} and {got}"
    for (path, caption), (key, text, error) in zip(expected, got, strict=True):
        absent = not isinstance(path, (str, int)) or isinstance(path, bool) or not str(path).strip()
        if absent != bool(error) or (not absent and str(path) != key):
            return f"expected the path {path!r}, got {key!r} {error}"
        if (caption if isinstance(caption, str) else "") != (text or ""):
            return f"expected the caption {caption!r}, got {text!r}"
    return ""
