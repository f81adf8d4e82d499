"""Tables as people have them: what pandas, which open_clip reads with, takes is read; what it refuses names its line."""

import io
from pathlib import Path

import pandas
import pytest

from clipfast.data import DataConfig
from clipfast.data.sources import read_table


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (path := folder / name).write_text(text, encoding="utf-8", newline="")
    return path


def pairs(path: Path, **options) -> list[tuple[str, str | None]]:
    return [(sample.key, sample.caption) for sample in read_table(path, **options).rows]


@pytest.mark.parametrize("text", [
    'path,caption\n0.jpg,"a, b"\n1.jpg,"said ""no"""\n',
    'path,caption\n0.jpg,"two\nlines"\n\n1.jpg,"x,\ny, and z"\n',
    'path,caption\r\n0.jpg,"big" dog\r\n1.jpg,5" tall\r\n',
    'path,caption\n0.jpg,last without a line break',
    'caption,path\na,0.jpg\n"b\n\nc",1.jpg\n',
    'n,path,caption,more\n1,0.jpg,a,\n2,1.jpg,b,"x,y"\n',
    'path,caption\n0.jpg\n1.jpg,b\n',
])  # fmt: skip
def test_what_pandas_reads(tmp_path: Path, text: str) -> None:
    theirs = pandas.read_csv(io.StringIO(text, newline=""))
    expected = [(row.path, None if pandas.isna(row.caption) else row.caption) for row in theirs.itertuples()]
    assert pairs(table(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('path,caption\n0.jpg,a\n1.jpg,"stray\n' + "".join(f"{i}.jpg,thing {i}\n" for i in range(2, 90)), 3, "to be closed"),
        ('path,caption\n0.jpg,a\n1.jpg,"stray', 3, "to be closed"),
        ("path,caption\n0.jpg,thing zero\n1.jpg,thing one, red\n", 3, "expected 2 fields, got 3"),
    ],
)
def test_what_pandas_refuses_names_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    for separator, suffix in ((",", "csv"), ("\t", "tsv")):
        told = text.replace(",", separator)
        with pytest.raises(pandas.errors.ParserError):
            pandas.read_csv(io.StringIO(told), sep=separator)
        with pytest.raises(ValueError, match=rf"t\.{suffix}, line {line}: .*{message}"):
            read_table(table(tmp_path, told, f"t.{suffix}"))


@pytest.mark.parametrize(
    "rows",
    [
        '0.jpg,"stray one\n1.jpg,b\n2.jpg,"stray two\n3.jpg,d\n',  # closed in the middle of a field
        '0.jpg,"stray one\n1.jpg,b\n2.jpg,ends in a mark"\n3.jpg,d\n',  # closed where a field may end
        '0.jpg,"stray\n1.JPG,b"\n2.jpg,c\n',
    ],
)
def test_rows_between_two_stray_marks_are_not_lost(tmp_path: Path, rows: str) -> None:
    """pandas reads them as one caption, without a word."""
    with pytest.raises(ValueError, match="line 2: expected the quotation mark there to close its own field"):
        read_table(table(tmp_path, f"path,caption\n{rows}"))


@pytest.mark.parametrize(
    ("name", "separator"),
    [("t.csv", "\t"), ("t.csv", ";"), ("t.CSV", ","), ("t.TSV", "\t"), ("t.txt", "\t"), ("t.txt", ","), ("t.tsv", ",")],
)
def test_separators_are_found_in_the_header(tmp_path: Path, name: str, separator: str) -> None:
    text = "path,caption\n0.jpg,a b\n".replace(",", separator)
    source = DataConfig(str(table(tmp_path, text, name))).open()
    assert [(sample.key, sample.caption) for sample in source.samples()] == [("0.jpg", "a b")]


def test_a_separator_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path, "path:caption\n0.jpg:a, b\n")
    with pytest.raises(ValueError, match="expected the columns path and caption, got path:caption.* or the separator"):
        read_table(path)
    assert pairs(path, separator=":") == [("0.jpg", "a, b")]
    assert pairs(table(tmp_path, "path\tcaption\n0.jpg\ta, b\n"), separator="tab") == [("0.jpg", "a, b")]
    source = DataConfig(str(path), separator="tab").open()
    assert [sample.caption for sample in source.samples()] == ["a, b"]
    with pytest.raises(ValueError, match="expected one character as separator"):
        read_table(path, separator="::")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,caption\n0.jpg,a\n,b\n  ,c\n"),
        ("t.jsonl", '{"path": "0.jpg", "caption": "a"}\n\n{"path": null, "caption": "b"}\n{"path": [1], "caption": "c"}\n'),
    ],
)
def test_a_row_without_a_path_is_told_by_its_line(tmp_path: Path, name: str, text: str) -> None:
    first, *others = read_table(table(tmp_path, text, name)).rows
    assert (first.key, first.error) == ("0.jpg", "")
    assert [sample.key for sample in others] == [f"{name}, line 3", f"{name}, line 4"]
    assert all(sample.image is None and "expected an image path in the column path" in sample.error for sample in others)


def test_a_line_of_blanks_is_passed_over_as_an_empty_one(tmp_path: Path) -> None:
    (path := tmp_path / "t.tsv").write_text("path\tcaption\n0.jpg\tone\n \n\n1.jpg\ttwo\n \t \n")
    found = [(sample.key, sample.caption, bool(sample.error)) for sample in read_table(path).samples()]
    assert found[:2] == [("0.jpg", "one", False), ("1.jpg", "two", False)] and [error for *_, error in found[2:]] == [True]
