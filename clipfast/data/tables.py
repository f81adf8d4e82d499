"""Tables of image paths and captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from clipfast.data.samples import IMAGES, Rows, Sample, text_of
from clipfast.files import first_line

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
SEPARATORS = {".tsv": "\t", ".txt": "\t"}  # elsewhere a comma, unless the first line says otherwise
FEW, DENSE = 100_000, 8  # rows of a Parquet table that need not be held against its size; rows a byte that no real one has
LINE = 1 << 26  # characters
_END = "\uffffend of the table"  # a line behind the last: where it is swallowed, a quotation mark was not closed


def read_table(
    path: str | Path, images: str | Path = "", image_column: str = "path", caption_column: str = "caption", separator: str = ""
) -> Rows:
    """A .csv, .tsv or .txt with a header, a .jsonl (an object a line) or a .parquet (which needs pyarrow).

    Image paths are relative to `images`, by default the table's own folder.
    separator: between columns; by default the one of tab, comma, semicolon and | by which the header has both columns.

    Raises ValueError, naming the line, for a quotation mark that is not closed, for more fields than the header has (an
    unquoted separator), for what is no UTF-8; a row without an image path is a sample with an error.
    """
    folder, path = Path(images or Path(path).parent), Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: expected a table, got a folder, a pipe or a device; name another")
    if not folder.is_dir():
        raise NotADirectoryError(f"expected the folder of the table's images at {folder}; give `images`")
    columns, rows = _table(path, [image_column, caption_column], separator)
    if missing := {image_column, caption_column} - set(columns):
        shown = ", ".join(" ".join(name.split())[:60] for name in columns[:20])
        raise ValueError(
            f"{path}: expected the columns {image_column} and {caption_column}, got {shown}; "
            f"{' and '.join(sorted(missing))} is missing: name the columns, or the separator"
        )

    def sample(line: int, name: Any, caption: Any) -> Sample:
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not str(name).strip():
            told = f"expected an image path in the column {image_column}, got {name!r}"
            return Sample(f"{path.name}, line {line}", None, text_of(caption), {}, told)
        return Sample(str(name), folder / str(name), text_of(caption), {})

    return Rows([sample(line, row.get(image_column), row.get(caption_column)) for line, row in rows])


def _table(path: Path, wanted: list[str], separator: str) -> tuple[Sequence[str], list[tuple[int, dict[str, Any]]]]:
    """Names of the columns, and (line, row) of each row."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, wanted)
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a byte order mark
        return _jsonl(path, file, wanted) if kind == ".jsonl" else _separated(path, file, wanted, separator)


def _parquet(path: Path, wanted: list[str]) -> tuple[Sequence[str], list[tuple[int, dict[str, Any]]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: expected pyarrow to read Parquet: pip install pyarrow, or give a .csv") from error
    path.open("rb").close()  # if it may not be read, Python's own error says so
    try:
        columns = parquet.read_schema(path).names
        asked = [name for name in wanted if name in columns]
        file = parquet.ParquetFile(path, read_dictionary=asked)  # a text that comes again is kept once
        count = file.metadata.num_rows
        if count > max(FEW, DENSE * path.stat().st_size):
            raise ValueError(f"got {count:,} rows in {path.stat().st_size:,} bytes")
        held = [_values(column) for column in file.read(asked).columns]
        rows = [dict(zip(asked, row, strict=True)) for row in zip(*held, strict=True)]
    except Exception as error:  # what Arrow raises on a damaged file is of many kinds
        raise ValueError(f"{path}: expected a Parquet table: {first_line(error)}; write or fetch it again") from error
    return columns, list(enumerate(rows, 1))


def _values(column: Any) -> Iterator[Any]:
    for chunk in column.chunks:
        if hasattr(chunk, "dictionary"):
            words = chunk.dictionary.to_pylist()
            yield from (None if place is None else words[place] for place in chunk.indices.to_pylist())
        else:
            yield from chunk.to_pylist()


def _jsonl(path: Path, file: IO[str], wanted: list[str]) -> tuple[Sequence[str], list[tuple[int, dict[str, Any]]]]:
    line, found = 0, []
    try:
        for line, text in enumerate(_lines(file), 1):
            if text.strip():
                found.append((line, dict.fromkeys(wanted) | dict(json.loads(text))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {line}: expected rows of UTF-8, got {error}; mend or remove it") from error
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}, line {line}: expected a JSON object, got {error}; mend or remove it") from error
    named = {name: None for _, row in found for name, value in row.items() if value is not None}
    return list(named) if found else wanted, found


def _separated(
    path: Path, file: IO[str], wanted: list[str], separator: str
) -> tuple[Sequence[str], list[tuple[int, dict[str, Any]]]]:
    line, found, names = 0, list[tuple[int, dict[str, Any]]](), list[str]()
    try:
        whole, recent = _lines(file), list[str]()
        first = next(whole, "")
        separator = _separator(path, first, wanted, separator)
        lines = chain([first] if first else [], whole, [_END])
        for row in csv.reader(_noted(lines, recent), delimiter=separator):
            start, line = line + 1, line + len(recent)
            if row and row[-1].endswith(_END):
                if recent != [_END]:
                    raise ValueError(
                        f"{path}, line {start}: expected the quotation mark there to be closed, got the end; mend it"
                    )
                break
            if len(recent) > 1:
                _check_quoted(path, start, recent, row, separator, names.index(wanted[0]) if wanted[0] in names else 0)
            blank = len(row) == 1 and not "".join(recent).strip(" \t\r\n")  # passed over as an empty line is, and by pandas
            recent.clear()
            if not names:
                names = row
                if not set(wanted) <= set(names):
                    break
            elif len(row) > len(names):
                told = f"{path}, line {start}: expected {len(names)} fields, got {len(row)}"
                raise ValueError(f"{told}: quote the one that holds the separator {separator!r}, or name another")
            elif row and not blank:
                found.append((start, {name: row[i] for name, i in _places(names, wanted) if i < len(row)}))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {line}: expected rows of UTF-8, got {error}; mend or remove it") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {line + 1}: expected a row, got {error}; is a quotation mark not closed?") from error
    return names, found


def _lines(file: IO[str]) -> Iterator[str]:
    """csv.Error for one that is longer than any of a table, as of a file of zeros."""
    while text := file.readline(LINE):
        if len(text) == LINE:
            raise csv.Error(f"a line of more than {LINE:,} characters")
        yield text


def _noted(lines: Iterator[str], recent: list[str]) -> Iterator[str]:
    """The lines, each noted: those of a row, until they are cleared."""
    for line in lines:
        recent.append(line)
        yield line


def _places(names: list[str], wanted: list[str]) -> list[tuple[str, int]]:
    return [(name, names.index(name)) for name in wanted if name in names]


def _separator(path: Path, header: str, wanted: list[str], given: str) -> str:
    """The one that is given, or by which the header has the columns that are wanted."""
    given = {"\\t": "\t", "tab": "\t"}.get(given, given)
    if len(given) > 1:
        raise ValueError(f"expected one character as separator (\\t or tab for a tab), got {given!r}")
    usual = SEPARATORS.get(path.suffix.lower(), ",")
    fitting = (one for one in (usual, "\t", ",", ";", "|") if set(wanted) <= set(next(csv.reader([header], delimiter=one), ())))
    return given or next(fitting, usual)


def _check_quoted(path: Path, start: int, lines: list[str], row: list[str], separator: str, place: int) -> None:
    """A field over several lines: a caption with line breaks, or rows between one stray quotation mark and the next?"""
    told = f"{path}, line {start}: expected the quotation mark there to close its own field, got"
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"{told} {len(lines)} lines in which {error}; mend it") from None
    for text in (part for field in row for part in field.splitlines()[1:]):
        cells = text.split(separator)
        if len(cells) > place and len(cells) > 1 and cells[place].lower().endswith(tuple(f".{kind}" for kind in IMAGES)):
            raise ValueError(f"{told} what looks like a row of its own, {text!r:.60}; mend it")
