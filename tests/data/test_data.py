"""Data: the right pairs, in an order that a seed fixes and a resumed run finds again; bad input counted, named and limited."""

import gzip
import http.server
import io
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.data import Batch, DataConfig, Tally, random_square, read_images, training_batches
from clipfast.data.sources import Sample, Shards, from_arrays, read_folder
from clipfast.files import output_folder, replacing
from clipfast.inputs.image import Preprocess, read_image, read_rgb
from clipfast.inputs.tokenizer import tokenize

R = 32


def colour(number: int) -> tuple[int, int, int]:
    return (number * 5 % 256, number * 11 % 256, 255 - number)


def png(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """An image of one colour, so that its number can be read back from any crop of it."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"picture {number}"


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, shards: int = 4, each: int = 6, replace: dict[str, bytes | None] | None = None) -> str:
    """Shards of numbered pairs; `replace` puts other bytes under a name, or (None) leaves it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        files: dict[str, bytes | None] = {}
        for number in range(shard * each, (shard + 1) * each):
            files |= {f"{number:04}.png": png(number), f"{number:04}.txt": caption(number).encode()}
            files[f"{number:04}.json"] = json.dumps({"number": number}).encode()
        files |= {name: content for name, content in (replace or {}).items() if name in files}
        write_tar(folder / f"{shard:03}.tar", {name: content for name, content in files.items() if content is not None})
    return str(folder / f"{{000..{shards - 1:03}}}.tar")


def write_table(folder: Path, count: int = 24) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,{caption(number)}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


def take(where: str, count: int, start: int = 0, batch_size: int = 5, seed: int = 0, **config) -> list[Batch]:
    batches = training_batches(DataConfig(where, **{"workers": 0} | config), R, batch_size, seed=seed)(start)
    return [next(batches) for _ in range(count)]


NUMBER_OF = {tuple(tokenize(caption(number))[0].tolist()): number for number in range(200)}


def numbers(batches: list[Batch]) -> list[int]:
    """Which pairs these are, by their captions, after checking that each image is the one of its caption."""
    found = []
    for batch in batches:
        captions = [NUMBER_OF[tuple(row.tolist())] for row in batch.tokens]
        expected = torch.tensor([colour(n) for n in captions], dtype=torch.uint8)
        assert torch.equal(batch.pixels, expected[:, :, None, None].expand(-1, -1, R, R))
        assert batch.keys is not None and [int(re.sub(r"\D", "", key)) for key in batch.keys] == captions
        found += captions
    return found


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)


@pytest.fixture(params=["shards", "table"])
def where(request, tmp_path):
    return write_shards(tmp_path / "data") if request.param == "shards" else write_table(tmp_path / "data")


def test_a_shard_gives_key_image_caption_and_metadata(tmp_path):
    where = write_shards(tmp_path, shards=1, each=2, replace={"0001.txt": None})
    write_tar(tmp_path / "more.tar", {"a.JPG": png(7), "a.cls": b"3", "b.webp": png(8), "b.json": b'{"caption": "from json"}'})
    samples = Shards([*Shards(where).urls, str(tmp_path / "more.tar")]).samples()
    first, second, third, fourth = (sample._replace(fields=()) for sample in samples)
    assert first == Sample("0000", png(0), "picture 0", {"number": 0})
    assert second == Sample("0001", png(1), None, {"number": 1})
    assert third == Sample("a", png(7), None, {"class": 3})
    assert fourth == Sample("b", png(8), "from json", {"caption": "from json"})


def test_batches_have_the_shapes_and_types_of_the_model(where):
    (batch,) = take(where, 1)
    assert batch.pixels.shape == (5, 3, R, R) and batch.pixels.dtype == torch.uint8
    assert batch.tokens.shape == (5, 77) and batch.tokens.dtype == torch.int32
    assert batch.lengths.dtype == torch.int64 and batch.labels is None
    assert torch.equal(batch.lengths, batch.tokens.argmax(1) + 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_has_every_pair_once_in_another_order(where, workers):
    epochs = numbers(take(where, 2 * 6, batch_size=4, workers=workers))
    counts = Counter(epochs)
    assert counts == {number: 2 for number in range(24)}
    if workers == 0:
        first, second = epochs[:24], epochs[24:]
        assert sorted(first) == sorted(second) == list(range(24))
        assert first != second and first != sorted(first)


def test_more_workers_than_shards_are_not_started(tmp_path):
    where = write_shards(tmp_path, shards=1)
    assert_equal(take(where, 3, workers=2), take(where, 3, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_fixes_the_batches(where, workers):
    assert_equal(take(where, 7, workers=workers, seed=3), take(where, 7, workers=workers, seed=3))
    assert numbers(take(where, 4, workers=workers, seed=3)) != numbers(take(where, 4, workers=workers, seed=4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 13])  # 24 pairs in fives: step 13 is in the third epoch
def test_batches_can_start_at_any_step(where, workers, start):
    straight = take(where, start + 3, workers=workers)
    assert_equal(take(where, 3, start=start, workers=workers), straight[start:])


def test_only_one_epoch_is_read_to_be_skipped(where):
    config = DataConfig(where, workers=0)
    from clipfast.data.batches import _BatchStream

    class Counting:
        read = 0
        source = config.open()

        def samples(self, *arguments):
            for sample in self.source.samples(*arguments):
                self.read += 1
                yield sample

    counting = Counting()
    next(iter(_BatchStream(counting, config, R, 5, 77, 0, 1000)))
    assert counting.read <= 2 * 24 + 5


def test_loading_leaves_the_global_random_state_alone(where):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(where, 2, workers=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tall", [False, True])
def test_random_square_is_any_square_of_the_shorter_side_resized(tall):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 48, 3) if tall else (48, 96, 3), np.uint8)
    image, rng, seen = Image.fromarray(pixels), random.Random(0), set()
    boxes = [(0, n, 48, n + 48) if tall else (n, 0, n + 48, 48) for n in range(49)]
    squares = [np.asarray(image.crop(box).resize((32, 32), Image.Resampling.BICUBIC), int) for box in boxes]
    for _ in range(500):
        crop = random_square(pixels, 32, rng)
        assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8
        (place,) = [n for n, square in enumerate(squares) if abs(crop - square).max() <= 1]
        seen.add(place)
    assert seen == set(range(49))


def test_squares_of_odd_images():
    pixels, rng = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8), random.Random(0)
    assert np.array_equal(random_square(pixels, 48, rng), pixels)
    assert random_square(np.zeros((1, 60_000, 3), np.uint8), R, rng).shape == (R, R, 3)
    with pytest.raises(ValueError, match="expected an image with pixels, got 48 x 0"):
        random_square(pixels[:0], R, rng)


def test_crops_are_each_sample_s_own(tmp_path):
    """One wide picture under every name: crops differ within and between batches, and a bad sample moves no other's."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 96, 3), np.uint8)).save(file, "PNG")
    same: dict[str, bytes | None] = {f"{number:04}.png": file.getvalue() for number in range(24)}
    (good,) = take(write_shards(tmp_path / "good", replace=same), 1, batch_size=24)
    crops = {tuple(row.tolist()): crop for row, crop in zip(good.tokens, good.pixels, strict=True)}
    assert len(torch.stack(list(crops.values())).unique(dim=0)) > 12
    (bad,) = take(write_shards(tmp_path / "bad", replace=same | {"0007.png": b"broken"}), 1, batch_size=24)
    assert len(bad.pixels) == 23
    for row, crop in zip(bad.tokens, bad.pixels, strict=True):
        assert torch.equal(crop, crops[tuple(row.tolist())])
    again = take(write_shards(tmp_path / "good", replace=same), 2, batch_size=24)[1]
    assert any(not torch.equal(crop, crops[tuple(row.tolist())]) for row, crop in zip(again.tokens, again.pixels, strict=True))


def test_equal_captions_are_positives_on_request(tmp_path):
    where = write_shards(tmp_path, replace={"0003.txt": b"picture 9", "0004.txt": b" picture 9\n"})
    (batch,) = take(where, 1, batch_size=24, caption_labels=True)
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    same = [(row == batch.tokens).all(1).tolist() for row in batch.tokens]
    assert [(label == batch.labels).tolist() for label in batch.labels] == same
    assert sum(map(sum, same)) == 24 + 6


def test_a_bad_sample_is_logged_and_only_it_is_missing(tmp_path, caplog):
    good = take(write_shards(tmp_path / "good"), 5)
    where = write_shards(tmp_path / "bad", replace={"0005.png": b"not an image", "0011.txt": b"  ", "0017.png": png(17)[:60]})
    with caplog.at_level(logging.WARNING):
        bad = take(where, 5)
    kept = [number for number in numbers(good) if number not in (5, 11, 17)]
    assert numbers(bad) == kept
    assert [len(batch.pixels) for batch in bad] != [len(batch.pixels) for batch in good]
    for key in ("0005: ", "0011: no caption", "0017: "):
        assert f"skipped {key}" in caplog.text
    assert len(caplog.messages) == len(numbers(good)) - len(kept)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_are_an_error(tmp_path, workers):
    where = write_shards(tmp_path, replace={f"{number:04}.png": b"" for number in range(0, 24, 3)})
    with pytest.raises(ValueError, match=r"at most 10% unreadable samples, got 1\d of \d+, last 00\d\d: ") as caught:
        take(where, 40, workers=workers)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(take(where, 40, workers=workers, max_bad=0.4)) == 40


def test_shards_come_through_pipes_and_fsspec(tmp_path):
    path = Path(write_shards(tmp_path, shards=1)).parent / "000.tar"
    whole = list(Shards(str(path)).samples())
    assert list(Shards(f"pipe:cat {path}").samples()) == whole
    assert list(Shards(f"file://{path}").samples()) == whole
    with fsspec.open("memory://shards/000.tar", "wb") as file:
        file.write(path.read_bytes())
    assert list(Shards("memory://shards/000.tar").samples()) == whole
    for url, reason in ((f"pipe:cat {path}; exit 3", "exit 3"), ("pipe:exit 6", ""), ("memory://shards/none.tar", "none")):
        *_, last = Shards(url).samples()
        assert last.error.startswith(f"shard {url}: expected a readable tar") and reason in last.error


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")
def test_shards_come_over_http(tmp_path):
    local = Shards(write_shards(tmp_path, shards=2))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            root = f"http://127.0.0.1:{server.server_port}"
            assert list(Shards(f"{root}/{{000..001}}.tar").samples()) == list(local.samples())
            (missing,) = Shards(f"{root}/none.tar").samples()
        finally:
            server.shutdown()
    assert missing.error.startswith(f"shard {root}/none.tar: expected a readable tar") and "exit 22" in missing.error


def truncated(path: Path, keep: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def test_a_truncated_shard_gives_what_it_has_and_is_counted(tmp_path, caplog):
    where = write_shards(tmp_path, shards=4, each=6)
    truncated(tmp_path / "001.tar")
    with caplog.at_level(logging.WARNING):
        found = numbers(take(where, 11, batch_size=4))
    assert set(range(24)) - set(range(6, 12)) < set(found) and 6 in found and 11 not in found
    assert f"skipped shard {tmp_path / '001.tar'}: expected a readable tar" in caplog.text
    straight = take(where, 9, workers=2)
    assert_equal(take(where, 3, start=6, workers=2), straight[6:])  # the place of the break is one sample's
    truncated(tmp_path / "002.tar")
    with pytest.raises(ValueError, match="expected at most 10% unreadable shards, got 2 of 4, last shard .*00[12].tar"):
        take(where, 40)
    assert len(take(where, 40, max_bad=0.5)) == 40


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_with_a_damaged_header_is_counted(tmp_path, packed):
    """Python's tarfile takes such a header for the end of the tar, and the rest would go missing without a word."""
    path = Path(write_shards(tmp_path, shards=1)).parent / "000.tar"
    whole = list(Shards(str(path)).samples())
    content = bytearray(path.read_bytes())
    header = content.index(b"0003.png")
    content[header : header + 4] = b"????"
    path.write_bytes(gzip.compress(content) if packed else content)
    *kept, last = Shards(str(path)).samples()
    assert kept == whole[:2]  # of the third nobody knows whether it was whole
    assert f"the header at byte {header} is damaged" in last.error and last.meta == {"shard": str(path)}


def test_a_store_that_fails_costs_its_shard_alone(tmp_path, monkeypatch):
    """Clients of remote stores raise errors of their own making. A missing package is another thing: it ends the run."""

    class Failing:
        error: type[Exception]

        def open(self):
            raise self.error("no such bucket")

    monkeypatch.setattr("fsspec.open", lambda *_: Failing())
    where = write_shards(tmp_path, shards=4)
    urls = [*Shards(where).urls, "s3://bucket/004.tar"]
    Failing.error = type("ClientError", (Exception,), {})
    *kept, last = Shards(urls).samples()
    assert len(kept) == 24 and "s3://bucket/004.tar: expected a readable tar, got ClientError: no such bucket" in last.error
    Failing.error = ImportError
    with pytest.raises(ImportError, match="no such bucket"):
        take("::".join(urls), 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_no_tar_is_named(tmp_path, workers):
    path = tmp_path / "000.tar"
    path.write_bytes(b"plain text" * 200)
    with pytest.raises(ValueError, match=f"shard {path}: expected a readable tar") as caught:
        take(str(path), 1, workers=workers)
    assert "\n" not in str(caught.value)


def test_bad_metadata_costs_its_sample_alone(tmp_path):
    files = {"x.png": png(1), "x.json": b"{", "y.png": png(2), "y.cls": b"two", "z.png": png(3), "z.txt": b"three"}
    write_tar(tmp_path / "a.tar", files)
    x, y, z = Shards(str(tmp_path / "a.tar")).samples()
    assert x.error.startswith("expected a JSON object") and y.key == "y" and y.error and not z.error
    (batch,) = take(str(tmp_path / "a.tar"), 1, batch_size=3, max_bad=0.9)
    assert batch.keys == ["z"]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_out_the_same_batches(where, workers):
    """Four streams: what one rank gets is what two and four get together, and that from any step on."""

    def of(rank: int, world: int, start: int = 0) -> list[Batch]:
        config = DataConfig(where, workers=0 if Path(where).suffix == ".tar" else workers, streams=4)
        stream = training_batches(config, R, 8, rank=rank, world=world)(start)
        return [next(stream) for _ in range(5)]

    alone = of(0, 1)
    assert set(numbers(alone)) == set(range(24))
    for world in (2, 4):
        ranks = [of(rank, world) for rank in range(world)]
        for step, whole in enumerate(alone):
            for field in ("pixels", "tokens", "lengths"):
                assert torch.equal(torch.cat([getattr(rank[step], field) for rank in ranks]), getattr(whole, field))
    assert_equal(of(1, 2, 3)[:2], of(1, 2)[3:])
    with pytest.raises(ValueError, match="expected streams that 3 ranks can share evenly"):
        of(0, 3)
    with pytest.raises(ValueError, match="for each of 100 streams, got"):
        training_batches(DataConfig(where, streams=100), R, 100)


def test_pairs_in_memory_and_photos_scaled_as_they_are_decoded():
    rng = np.random.default_rng(0)
    waves = np.add.outer(np.sin(np.arange(600) / 40), np.cos(np.arange(800) / 30))[..., None] * [40, 50, 60]
    photo = (127 + waves + rng.normal(0, 3, (600, 800, 3))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=90)
    stream = training_batches(DataConfig("memory", workers=0), 64, 2, source=from_arrays([photo, file.getvalue()], ["a", "b"]))(
        0
    )
    batch = next(stream)
    assert batch.pixels.shape == (2, 3, 64, 64) and batch.keys is not None and sorted(batch.keys) == ["0", "1"]
    for seed in range(3):
        scaled = random_square(read_rgb(file.getvalue(), 128), 64, random.Random(seed))
        left = 4 * int(random.Random(seed).random() * (200 - 150 + 1))
        exact = Image.open(file).crop((left, 0, left + 600, 600)).resize((64, 64), Image.Resampling.BICUBIC)
        assert 0 < abs(scaled - np.asarray(exact, int)).mean() < 2
    assert read_image(file.getvalue(), 128).size == (200, 150) and read_image(file.getvalue()).size == (800, 600)
    with pytest.raises(ValueError, match="got 1 images and 2 captions"):
        from_arrays([photo], ["a", "b"])


def photo(number: int, mode: str = "RGB", **options) -> bytes:
    """A JPEG of 75 x 50 with its own smooth colours."""
    small = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((75, 50), Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_photos_of_every_kind_with_and_without_simplejpeg(tmp_path, monkeypatch, caplog, workers):
    """The same batches, bit for bit; the same samples refused for the same reasons, and counted."""
    pytest.importorskip("simplejpeg")
    kinds: dict[str, bytes | None] = {f"{number:04}.png": photo(number) for number in range(24)}
    kinds |= {"0001.png": photo(1, "L"), "0002.png": photo(2, "CMYK"), "0003.png": photo(3, progressive=True)}
    broken = {"0007.png": photo(7)[:300], "0013.png": photo(13)[:-2], "0019.png": b"\xff\xd8\xff" + bytes(50)}
    where = write_shards(tmp_path, replace=kinds | broken)
    found, logs = [], []
    for absent in (False, True):
        if absent:
            monkeypatch.setattr("clipfast.inputs.image.simplejpeg", None)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found.append(take(where, 6, batch_size=4, workers=workers, max_bad=0.5))
        logs.append(caplog.messages)
    assert_equal(*found)
    kept = Counter(key for batch in found[0] for key in batch.keys or ())
    assert kept == {f"{number:04}": 1 for number in range(24) if number not in (7, 13, 19)}
    assert logs[0] == logs[1]
    if workers == 0:  # a worker's messages are not of this process
        assert sorted(line[8:12] for line in logs[0]) == ["0007", "0013", "0019"]


def test_a_batch_holds_pillow_s_pixels_of_each_crop():
    """The whole way of a photo, from bytes to its row, against Pillow's bicubic filter on the same place."""
    stored = [photo(n) for n in range(8)]
    batches = training_batches(DataConfig("memory", workers=0), R, 8, source=from_arrays(stored, list(map(caption, range(8)))))(
        0
    )
    batch = next(batches)
    assert batch.keys is not None and batch.pixels.is_contiguous(memory_format=torch.channels_last)
    for row, key in enumerate(batch.keys):
        image, rng = Image.open(io.BytesIO(stored[int(key)])), random.Random(f"0 0 0 {row}")
        left = int(rng.random() * 26)
        square = image.crop((left, 0, left + 50, 50)).resize((R, R), Image.Resampling.BICUBIC)
        assert abs(batch.pixels[row].permute(1, 2, 0).numpy().astype(int) - np.asarray(square)).max() <= 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_tables(tmp_path, kind):
    write_table(tmp_path, 6)
    rows = [{"path": f"{n}.png", "caption": caption(n), "more": n} for n in range(6)] + [{"path": "2.png", "caption": None}]
    table = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), table)
    assert sorted(numbers(take(str(table), 1, batch_size=7))) == list(range(6))
    with pytest.raises(ValueError, match="title is missing"):
        DataConfig(str(table), caption_column="title").open()
    table.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object" if kind == "jsonl" else "expected a Parquet table"):
        DataConfig(str(table)).open()


def test_captions_that_are_no_text_count_as_missing(tmp_path, caplog):
    write_table(tmp_path, 3)
    (tmp_path / "t.jsonl").write_text(
        '{"path": "0.png", "caption": ["a", "b"]}\n\n{"path": 5, "caption": "c"}\n{"path": "1.png", "caption": "picture 1"}\n'
    )
    files = {"x.png": png(1), "x.json": b'{"caption": 5}', "y.png": png(2), "y.txt": b"picture 2"}
    write_tar(tmp_path / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        assert numbers(take(str(tmp_path / "t.jsonl"), 1, batch_size=3, max_bad=0.9)) == [1]
        assert [batch.keys for batch in take(str(tmp_path / "a.tar"), 1, batch_size=2, max_bad=0.9)] == [["y"]]
    assert {"skipped 0.png: no caption", "skipped x: no caption"} < set(caplog.messages)
    arrays = from_arrays([np.zeros((R, R, 3), np.uint8)] * 2, [float("nan"), "a"])  # type: ignore[list-item]
    assert [sample.caption for sample in arrays.samples()] == [None, "a"]


def test_a_folder_is_trained_on_by_its_one_table(tmp_path):
    table = Path(write_table(tmp_path))
    assert_equal(take(str(tmp_path), 3), take(str(table), 3))
    (tmp_path / "more.csv").write_bytes(table.read_bytes())
    with pytest.raises(ValueError, match="expected a table of captions .* found more.csv, pairs.csv; name one"):
        take(str(tmp_path), 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="expected a table of captions .* found none"):
        take(str(tmp_path / "images"), 1)


def test_tables_as_spreadsheets_write_them(tmp_path):
    table = Path(write_table(tmp_path, 3))
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert sorted(numbers(take(str(table), 1, batch_size=3))) == [0, 1, 2]
    for content, message in (
        ("path,caption\n0.png,café\n".encode("latin-1"), "after line 0: expected rows of UTF-8, got 'utf-8' codec"),
        (b'path,caption\n0.png,a\n1.png,"' + b"x\n" * 100_000, "line 3: expected a row, got field larger than"),
    ):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=f"pairs.csv, {message}"):
            DataConfig(str(table)).open()


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="expected pyarrow to read Parquet"):
        DataConfig(str(tmp_path / "pairs.parquet")).open()


def test_missing_sources_are_named(tmp_path):
    where = write_shards(tmp_path / "shards", shards=2)
    with pytest.raises(FileNotFoundError, match="002.tar"):
        Shards(where.replace("001", "002"))
    table = write_table(tmp_path / "table")
    with pytest.raises(ValueError, match="expected the columns path and title, got path, caption; title is missing"):
        DataConfig(table, caption_column="title").open()
    with pytest.raises(NotADirectoryError, match="nowhere"):
        DataConfig(table, images=str(tmp_path / "nowhere")).open()
    with pytest.raises(FileNotFoundError):
        DataConfig(str(tmp_path / "none.csv")).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected images .* found none"):
        DataConfig(str(tmp_path / "empty")).open()
    (tmp_path / "empty.csv").write_text("path,caption\n")
    with pytest.raises(ValueError, match="expected samples"):
        take(str(tmp_path / "empty.csv"), 1)


def test_tab_separated_tables_and_other_columns(tmp_path):
    write_table(tmp_path / "images", 3)
    (tmp_path / "t.tsv").write_text("title\tfile\npicture 1\t1.png\npicture 2\t2.png\n")
    config = {"images": str(tmp_path / "images"), "image_column": "file", "caption_column": "title"}
    assert sorted(numbers(take(str(tmp_path / "t.tsv"), 1, batch_size=2, **config))) == [1, 2]


def test_a_folder_gives_classes(tmp_path):
    for name in ("dog/2.png", "cat/1.PNG", "top.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "notes.txt").write_text("no image")
    samples = list(read_folder(tmp_path).samples())
    assert [(s.key, s.meta.get("class")) for s in samples] == [("cat/1.PNG", "cat"), ("dog/2.png", "dog"), ("top.png", None)]
    assert [s.meta["class"] for s in read_folder(tmp_path / "cat").samples()] == ["cat"]


@pytest.mark.parametrize("threads", [1, 3])
def test_read_images_keeps_order_and_tallies(threads):
    samples = [Sample(str(n), b"broken" if n == 4 else png(n), None, {}) for n in range(11)]
    samples.append(Sample("none", None, None, {}))
    tally = Tally(0.5)
    got = list(read_images(samples, Preprocess(R), 4, tally, threads))
    assert [[s.key for s in good] for good, _ in got] == [["0", "1", "2", "3"], ["5", "6", "7"], ["8", "9", "10"]]
    for good, pixels in got:
        assert torch.equal(pixels, torch.stack([Preprocess(R)(Image.open(io.BytesIO(png(int(s.key))))) for s in good]))
    assert (tally.seen, tally.bad) == (12, 2)
    tally.check()
    with pytest.raises(ValueError, match="2 of 12, last none: expected an image"):
        tally.allowed = 0.1
        tally.check()


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_what_replaces_a_file_is_on_the_disk_first(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("os.fsync", lambda descriptor: order.append(("fsync", (tmp_path / "file").exists())))
    with replacing(tmp_path / "file") as file:
        file.write(b"all")
    assert order == [("fsync", False)] and (tmp_path / "file").read_bytes() == b"all"


def test_an_output_folder_is_there_only_if_written_to(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        raise RuntimeError
    assert not (tmp_path / "a" / "b").exists()
    with output_folder(tmp_path / "c") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "c" / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="expected a folder that can be written at .*file"), output_folder(tmp_path / "file"):
        pass


@dataclass
class Slow:
    """A source whose samples take their time."""

    seconds: float
    parts: int = 24

    def samples(self, rng: random.Random | None = None, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        for number in range(part, self.parts, parts):
            time.sleep(self.seconds)
            yield Sample(str(number), png(number), caption(number), {})


def test_a_worker_that_is_stopped_is_named_and_waited_for_no_longer(where):
    batches = training_batches(DataConfig(where, workers=2, worker_timeout=2.0), R, 4)(0)
    next(batches)
    workers = multiprocessing.active_children()
    stopped = workers[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    named = rf"within 2 s of data worker \d \(process {stopped.pid}\), got none: it was stopped: see "
    with pytest.raises(RuntimeError, match=named):
        for _ in range(9):  # what was read before comes first
            next(batches)
    assert not [worker for worker in workers if worker.is_alive()]


def test_a_worker_that_waits_for_its_data_is_named():
    batches = training_batches(DataConfig("stuck", workers=1, worker_timeout=0.5), R, 4, source=Slow(60))(0)
    with pytest.raises(RuntimeError, match=r"data worker 0 \(process \d+\), got none: it waits .* or raise worker_timeout"):
        next(batches)


def test_a_run_ends_though_a_worker_is_stopped(where):
    batches = training_batches(DataConfig(where, workers=2), R, 4)(0)
    next(batches)
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGSTOP)
    batches.close()
    assert len(workers) == 2 and not [worker for worker in workers if worker.is_alive()]


def test_a_worker_that_is_slow_is_waited_for():
    config = DataConfig("slow", workers=1, worker_timeout=1.5)
    batches = training_batches(config, R, 4, source=Slow(0.25))(1)  # it passes over four samples, and then reads four
    assert numbers([next(batches)]) == [4, 5, 6, 7]
