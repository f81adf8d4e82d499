"""Shards as people have them: doubled files, other names of fields, folders, and those that would fill memory."""

import gzip
import io
import logging
import lzma
import os
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from open_clip_train.data import group_by_keys_nothrow

from clipfast.data import DataConfig, read_images, training_batches
from clipfast.data.batches import Tally
from clipfast.data.sources import Shards
from clipfast.inputs.image import Preprocess
from tests.data.test_data import caption, png, write_shards, write_table


def tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("doubled", "again"),
    [
        ([("s2.jpg", b"i"), ("s2.txt", b"t"), ("s2.txt", b"again")], "s2.txt"),
        ([("s2.jpg", b"i"), ("s2.JPG", b"other"), ("s2.txt", b"t")], "s2.JPG"),
        ([("s2.jpg", b"i"), ("s2.txt", b"t"), ("s2.JPG", b"other"), ("s2.txt", b"u")], "s2.JPG"),
    ],
)
def test_a_file_that_comes_twice_costs_no_other_sample(
    tmp_path: Path, caplog, doubled: list[tuple[str, bytes]], again: str
) -> None:
    files = [(f"s{i}.{kind}", b"x") for i in (0, 1) for kind in ("jpg", "txt")]
    files += [*doubled, *((f"s{i}.{kind}", b"x") for i in (3, 4) for kind in ("jpg", "txt")), ("README", b"no field")]
    path = tar(tmp_path / "x.tar", files)
    with caplog.at_level(logging.WARNING):
        found = list(Shards(str(path)).samples())
    grouped = group_by_keys_nothrow({"fname": name, "data": data, "__url__": "x"} for name, data in files if "." in name)
    expected = [(group["__key__"], group.get("jpg"), group.get("txt")) for group in grouped]
    assert len(found) == len(expected)
    for sample, (key, image, text) in zip(found, expected, strict=True):
        assert sample.key == key
        if not sample.error:
            assert (sample.image, (sample.caption or "").encode()) == (image, text or b"")
    told = [sample.error for sample in found if sample.error] + caplog.messages
    assert len(told) == 1 and f"shard {path}: expected each file once, got {again} again within s2" in told[0]


def test_other_names_of_fields(tmp_path: Path) -> None:
    for names, options in (
        (("img", "cap"), {"image_field": "img", "caption_field": "cap"}),
        (("input.jpg", "outputs.txt"), {"image_field": "jpg;input.JPG", "caption_field": "outputs.txt"}),
    ):
        files = [
            (f"{i:03}.{name}", data) for i in range(3) for name, data in zip(names, (png(i), caption(i).encode()), strict=True)
        ]
        where = str(tar(tmp_path / "x.tar", files))
        found = list(DataConfig(where, **options).open().samples())
        assert [(sample.image, sample.caption) for sample in found] == [(png(i), caption(i)) for i in range(3)]
        fields = ", ".join(sorted(names))
        with pytest.raises(ValueError, match=f"found none; its fields are {fields}: name the image's by image_field"):
            list(read_images(Shards(where).samples(), Preprocess(8), 4, Tally(0.0)))
        stream = training_batches(DataConfig(where, workers=0, image_field=names[0]), 8, 3)(0)
        with pytest.raises(ValueError, match=f"no caption; its fields are {fields}: name the caption's by caption_field"):
            next(stream)
    files = [("a.png", png(0)), ("a.json", b'{"alt": "from json"}')]
    source = DataConfig(str(tar(tmp_path / "y.tar", files)), caption_column="alt").open()
    assert [sample.caption for sample in source.samples()] == ["from json"]


def test_folders_and_wildcards(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    braces = Shards(write_shards(folder, shards=3)).urls
    for name in ("000.parquet", "000_stats.json", "notes.txt"):  # as img2dataset leaves them
        (folder / name).write_text("")
    for captions in (False, True):
        assert DataConfig(str(folder)).open(captions).urls == braces  # type: ignore[attr-defined]
    assert Shards(f"{folder}/*.tar").urls == Shards(str(folder)).urls == Shards([str(folder)]).urls == braces
    assert Shards(f"{folder}/00[12].tar").urls == braces[1:]
    os.rename(braces[0], literal := str(folder / "x[1].tar"))
    assert Shards(literal).urls == [literal]
    with pytest.raises(FileNotFoundError, match=r"none\*\.tar"):
        Shards(f"{folder}/none*.tar")
    (folder / "000.parquet").unlink()
    write_table(folder, 2)
    with pytest.raises(ValueError, match=r"found pairs\.csv, .*001\.tar; name one"):
        DataConfig(str(folder)).open(captions=True)


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_compressed_shards(tmp_path: Path, kind: str) -> None:
    files = [("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)), ("b.txt", b"two")]
    path = tar(tmp_path / "x.tar", files, f"w:{kind}")
    assert [(sample.image, sample.caption) for sample in Shards(str(path)).samples()] == [(png(1), "one"), (png(2), "two")]
    path.write_bytes(path.read_bytes()[:-30] if kind else path.read_bytes()[:-9000])
    assert f"shard {path}: expected a readable tar" in list(Shards(str(path)).samples())[-1].error


LIMITED = """
import resource, sys
from clipfast.data import Shards, DataConfig, training_batches
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (150 << 20),) * 2)
for path in sys.argv[1:]:
    *_, last = Shards(path, max_member=100, max_unpacked=60).samples()
    print(last.error)
"""


def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """300 kB that unpack to much more, as one file and as many; in a process that may take 150 MB."""

    def bomb(name: str, write, files: int, size: int) -> str:
        with write(tmp_path / name, "wb") as file:
            for number in range(files):
                info = tarfile.TarInfo(f"{number}.jpg")
                info.size = size
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                for _ in range(size >> 20):
                    file.write(bytes(1 << 20))
        return str(tmp_path / name)

    one = bomb("one.tar.gz", partial(gzip.open, compresslevel=1), 1, 101 << 20)
    many = bomb("many.tar.gz", partial(gzip.open, compresslevel=1), 4, 20 << 20)
    twice = bomb("many.tar.xz", partial(lzma.open, preset=0), 4, 20 << 20)
    texts = tar(
        tmp_path / "text.tar", [("a.jpg", b"x"), ("a.txt", bytes(5 << 20)), ("b.jpg", b"x"), ("b.json", b"[" * (5 << 20))]
    )
    done = subprocess.run([sys.executable, "-c", LIMITED, one, many, twice], capture_output=True, text=True, check=True)
    ends = ["raise max_member", "raise max_unpacked", "raise max_unpacked"]
    assert [line.partition("; ")[2] for line in done.stdout.splitlines()] == ends, done.stdout
    told = [sample.error for sample in Shards(str(texts)).samples()]
    assert told == [f"expected a text of at most 4 MB as {kind}, got 5; is it another file?" for kind in ("txt", "json")]


def test_a_shard_takes_no_more_memory_than_allowed(tmp_path: Path) -> None:
    """A large file, a long name and a pax header claim more: refused by the header, before a byte of them is read."""
    claims = []
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("c.png")
        info.size, info.type = 5 << 30, kind
        good = io.BytesIO()
        with tarfile.open(fileobj=good, mode="w") as archive:
            for name in ("a.png", "b.png"):
                member = tarfile.TarInfo(name)
                member.size = 9
                archive.addfile(member, io.BytesIO(b"the image"))
        claims.append(good.getvalue()[:2048] + info.tobuf(tarfile.GNU_FORMAT))
    for head in claims:
        for write, name in ((open, "x.tar"), (gzip.open, "x.tar.gz")):
            with write(tmp_path / name, "wb") as file:
                file.write(head)
            first, last = Shards(str(tmp_path / name)).samples()
            assert first.image == b"the image" and not first.error
            assert last.error.endswith("expected files of at most 256 MB, got c.png of 5120; raise max_member")
    many = [(f"{i}.png", bytes(900_000)) for i in range(4)]
    bomb = str(tar(tmp_path / "bomb.tar.gz", many, "w:gz"))
    assert os.path.getsize(bomb) < 50_000 and all(not sample.error for sample in Shards(bomb).samples())
    *some, last = Shards(bomb, max_unpacked=2).samples()
    assert len(some) == 1 and last.error.endswith("to unpack to at most 2 MB; raise max_unpacked")
    plain = str(tar(tmp_path / "plain.tar", many))
    assert len(list(Shards(plain, max_unpacked=2).samples())) == 4  # a tar that is not compressed is as large as it is
    config = DataConfig(bomb, max_member=0, workers=1)
    with pytest.raises(ValueError, match="at most 0 MB.*raise max_member"):
        next(training_batches(config, 8, 4)(0))
