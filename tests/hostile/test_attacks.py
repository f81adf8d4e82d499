"""What an attacker tried who had read SECURITY.md: links in folders that are written to, bombs, names that steer a terminal.

Each of these once wrote or deleted elsewhere, ran for ever, took memory out of proportion to its input, or printed it raw.
"""

import gzip
import html.parser
import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from clipfast.cli import main
from clipfast.data import Shards, read_table
from clipfast.evaluate import figures
from clipfast.evaluate.probe import Head
from clipfast.evaluate.suite import Suite
from clipfast.files import parsed
from clipfast.inputs import Preprocess
from clipfast.inputs.image import read_rgb
from clipfast.kernels import passed
from clipfast.model import CLIP
from clipfast.train.config import sizes
from clipfast.train.job import place
from clipfast.weights import export, load
from tests.data.test_data import png, write_shards
from tests.hostile.test_trust import refused
from tests.hostile.weights import SIZES

MODEL = SIZES | {"vocab_size": 49408}
TRAIN = ["--steps", "2", "--checkpoint-every", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--no-progress"]
TRAIN += ["--no-tensorboard", "--model", json.dumps(MODEL), "--out", "out", "--resume", "auto"]
MEMORY = 1 << 30


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, within 30 seconds and a gigabyte more than there was."""

    def ring(*_: object) -> None:
        raise AssertionError("no answer within 30 s")

    monkeypatch.chdir(tmp_path)
    before, most = signal.signal(signal.SIGALRM, ring), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < most


# ---- folders that are written to


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file and a folder outside OUT, which stay as they are."""
    file, folder = tmp_path / "victim", tmp_path / "victims"
    file.write_text("precious")
    (folder / "kept").mkdir(parents=True)
    yield file, folder
    assert file.read_text() == "precious" and [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", [os.symlink, os.link])
def test_links_in_a_runs_folder_lead_nowhere(victims, capsys, kind: Callable) -> None:
    write_shards(Path("s"), shards=1, each=8)
    Path("out/checkpoints").mkdir(parents=True)
    for name in ("model.pt", "model.pt.part", "config.json", "config.json.part", "log.jsonl", "log.jsonl.part", "eval.jsonl"):
        kind(victims[0], f"out/{name}")
    os.symlink(victims[1], "out/checkpoints/step_00000001.part")
    assert main(["train", "s", *TRAIN]) == 0
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["step_00000001", "step_00000002"]
    os.remove("out/log.jsonl")
    kind(victims[0], "out/log.jsonl")
    assert main(["train", "s", *TRAIN, "--steps", "3"]) == 0


@pytest.mark.parametrize("name", ["log.jsonl", "config.json", "model.pt", "eval.jsonl"])
def test_pipes_in_a_runs_folder_are_not_waited_for(capsys, name: str) -> None:
    write_shards(Path("s"), shards=1, each=8)
    Path("out").mkdir()
    for path in (f"out/{name}", "out/config.json.part", "out/model.pt.part"):
        os.mkfifo(path)
    assert "got a folder or a device at out/" in refused(["train", "s", *TRAIN], capsys)


@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _, path: os.mkfifo(path), lambda _, path: os.mkdir(path)])
def test_a_lock_that_is_none_of_ours(victims, capsys, make: Callable) -> None:
    write_shards(Path("s"), shards=1, each=8)
    Path("out").mkdir()
    make(victims[0], "out/.clipfast.lock")
    assert "expected the lock's own file at out/.clipfast.lock" in refused(["train", "s", *TRAIN], capsys)


@pytest.mark.parametrize("name", ["refresh", "img_emb", "metadata", "done"])
def test_links_in_a_folder_of_features_are_refused(victims, capsys, name: str) -> None:
    write_shards(Path("s"), shards=1)
    torch.save({"state_dict": CLIP(**MODEL).state_dict(), "model_config": {"quick_gelu": True}}, "tiny.pt")
    Path("out").mkdir()
    os.symlink(victims[1], f"out/{name}")
    assert f"expected a folder at out/{name}, got a link" in refused(["embed", "s", "out", "--model", "tiny.pt"], capsys)


def test_a_log_that_is_damaged(capsys, caplog) -> None:
    write_shards(Path("s"), shards=1, each=8)
    assert main(["train", "s", *TRAIN]) == 0
    whole = Path("out/log.jsonl").read_bytes()
    odd = [
        b'{"step": 1' + b"0" * 400 + b"}",
        b'{"step": NaN}',
        b'"step"',
        b"[1]",
        b"null",
        b'{"step": "1"}',
        b"[" * 100_000,
        b"\xff",
    ]
    with open("out/log.jsonl", "ab") as file:
        file.write(b"\n".join(odd) + b'\n{"step": 2')
        file.truncate(len(whole) + 150_000_000)  # of zeros that are in no memory
    assert main(["train", "s", *TRAIN, "--steps", "3"]) == 0
    lines = Path("out/log.jsonl").read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:2]) == whole and len(lines) == 3 and json.loads(lines[2])["step"] == 3
    assert "left out of out/log.jsonl: " in caplog.text


def test_what_check_kept_is_ours_or_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = {"cases": 3, "ms": 1.5, "speedup": float("nan"), "size": "x"}
    passed.keep({"a": good})
    assert passed.kept()["a"]["ms"] == 1.5
    file = passed.cache_file()
    odd = [7, [], {}, good | {"ms": "1"}, good | {"ms": 0}, good | {"more": 1}, good | {"size": None}]
    for text in (json.dumps(dict(enumerate(odd))), "[" * 100_000, '{"a":' * 100_000, "[]", "\0", ""):
        file.write_text(text)
        assert passed.kept() == {}
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero")):
        file.unlink()
        make()
        assert passed.kept() == {}


def test_a_full_disk_is_told_by_every_layout(monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for layout in ("open_clip", "transformers"):
        with pytest.raises(OSError, match="expected room for the model at x, got: No space left"):
            export(CLIP(**MODEL), "x", layout)
    assert not [*Path().iterdir()]


# ---- bombs


def test_a_sample_has_a_limit_too() -> None:
    for size, count in ((900 << 10, 3), (0, 2000)):
        with gzip.open("x.tar.gz", "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for number in range(count):
                info = tarfile.TarInfo(f"a.f{number}")
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
        (sample,) = Shards("x.tar.gz", max_member=1).samples()
        assert "expected files of at most 1 MB in a sample" in sample.error


def test_the_header_of_safetensors_has_a_limit() -> None:
    header = b'{"__metadata__":{' + b",".join(b'"%d":"x"' % number for number in range(1_300_000)) + b"}}"
    Path("x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="its header has .* bytes, expected at most"):
        load("x.safetensors", "cpu")


TWICE = b"".join(b"h%c\x85h%c\x85\x86\x94" % (n, n) for n in range(99))  # each holds the one before twice: 2**99 places
LISTS = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (n, n) for n in range(90)) + b"}(X\x0c\0\0\0model_config}X\x06\0\0\0visionh\x5as"
PICKLES = {
    "a key that is for ever to hash": (b"\x80\x04}()\x94" + TWICE + b"K\x01u.", "a tuple of tuples"),
    "a key nested as deep as no stack is": (b"\x80\x04}N" + b"\x85" * 2_000_000 + b"K\x01s.", "a tuple of tuples"),
    "a storage that is for ever to print": (b"\x80\x04)\x94" + TWICE + b"Q.", "a tuple of tuples"),
    "a configuration that is for ever to print": (
        b"\x80\x04" + LISTS + b"X\x0a\0\0\0state_dict}u.",
        "at most 10,000 values|cut short",
    ),
    "2**32 memos": (b"\x80\x04Nr\xff\xff\xff\xff.", "expected a mapping of names to tensors"),
    "bytes of 2**60": (b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".", "cut short"),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("form", ["zip", "older"])
def test_an_index_that_is_a_bomb(name: str, form: str) -> None:
    data, told = PICKLES[name]
    if form == "zip":
        with zipfile.ZipFile("x.pt", "w") as made:
            made.writestr("x/data.pkl", data)
    else:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        first = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
        Path("x.pt").write_bytes(first + data + pickle.dumps([], 2))
    with pytest.raises(ValueError, match=told):
        load("x.pt", "cpu")


def test_a_jpeg_of_many_scans() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    for scans, good in ((20, True), (50_000, False)):
        Path("x.jpg").write_bytes(made := data[:-2] + last * scans + data[-2:])
        for source in (made, "x.jpg"):
            if good:
                assert read_rgb(source).shape == (64, 64, 3)
            else:
                with pytest.raises(OSError, match="expected a JPEG of at most 100 scans, got 50010"):
                    read_rgb(source)


def test_parquet_of_rows_that_take_no_space() -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(rows: int, text: str) -> None:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])
        parquet.write_table(pyarrow.table({"path": column, "caption": column}), "x.parquet")

    write(3_000_000, "x")
    with pytest.raises(ValueError, match=r"expected a Parquet table: got 3,000,000 rows in"):
        read_table("x.parquet")
    write(20_000, "x" * 100_000)  # 2 GB, if each row had its own
    assert read_table("x.parquet").parts == 20_000


def test_tables_without_an_end() -> None:
    for name in ("x.csv", "x.jsonl"):
        with open(name, "wb") as file:
            file.write(b"path,caption\n" if name == "x.csv" else b"")
            file.truncate(300_000_000)
        with pytest.raises(ValueError, match=rf"{name}, line \d: .*a line of more than"):
            read_table(name)
    os.mkfifo("y.csv")
    with pytest.raises(OSError, match="y.csv: expected a table, got a folder, a pipe"):
        read_table("y.csv")


@pytest.mark.parametrize("field", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-320])
def test_a_transform_makes_numbers(field: str, value: float) -> None:
    if field == "mean" and value == 1e-320:
        return
    with pytest.raises(ValueError, match=f"expected {field} of a transform"):
        Preprocess(32, **{field: (0.5, 0.5, value)})


@pytest.mark.parametrize("name", MODEL)
def test_sizes_that_are_none(name: str) -> None:
    odd: list[Any] = [10**9, 10**30, -1, True, "12", 1.5, float("nan"), [1.5] * 4, None]
    for value in [1.5, -1, "12"] if name == "vision_patch_size" else odd:
        with pytest.raises((ValueError, TypeError)):
            CLIP(**sizes(MODEL | {name: value}))


# ---- options and names


def test_options_that_nest_or_wait(capsys) -> None:
    Path("self.toml").write_text('data = "@self.toml"')
    Path("deep.toml").write_text(".".join("a" * 20_000) + " = 1")
    os.mkfifo("pipe.toml")
    assert "expected an end of the training" in refused(["train", "@self.toml"], capsys)  # a value is no file of options
    assert "nested too deeply" in refused(["train", "@deep.toml"], capsys)
    assert "got a pipe at pipe.toml" in refused(["train", "@pipe.toml"], capsys)
    assert parsed("a.b.c = 'x.y'\nd = '" + "a." * 50 + "'", "x", form="TOML")["a"] == {"b": {"c": "x.y"}}


@pytest.mark.parametrize(("rank", "world"), [("x", "1"), ("-1", "1"), ("1", "1"), ("0", "0"), ("0", ""), ("٠", "1")])
def test_ranks_that_nobody_has(monkeypatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="expected RANK below WORLD_SIZE"):
        place()


STEERS = "\x1b]0;x\x07\x9b2J\u202e"


def test_names_in_data_steer_no_terminal(capfd, monkeypatch) -> None:
    """In the program's own process: pytest's has handlers of its own for what is logged."""
    torch.save({"state_dict": CLIP(**MODEL).state_dict(), "model_config": {"quick_gelu": True}}, "tiny.pt")
    with tarfile.open("x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(("a", "b", f"a\nclipfast: error: fake{STEERS}")):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data := png(number) if number < 2 else b"none")
            tar.addfile(info, io.BytesIO(data))
    Path("x.png").write_bytes(png(1))
    Head(torch.zeros(2, 64), torch.zeros(2), [f"a{STEERS}", "b\nc"], {}).save("h")
    monkeypatch.setattr("logging.root.handlers", [])
    assert main(["embed", "x.tar", "out", "--model", "tiny.pt", "--device", "cpu", "--max-bad", "1"]) == 0
    assert main(["classify", "x.png", "--head", "h", "--model", "tiny.pt", "--device", "cpu"]) == 0
    told = capfd.readouterr()
    assert not set(told.out + told.err) & set(STEERS) - set("]0;x2J")
    assert "clipfast: skipped a\\nclipfast: error: fake\\x1b]0;x" in told.err and "b\\nc" in told.out


def test_names_in_a_report_are_text() -> None:
    evil = "</pre></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    Path("s.toml").write_text(f"[[dataset]]\nname = {json.dumps(evil)}\ntest = 's'\n[compute]\n{json.dumps(evil)} = 1\n")
    example = {"true": [evil], "guesses": [[evil, 0.5]], "jpeg": '"><script>'}
    rows: list[dict[str, Any]] = [
        {"model": f"{evil}{n}", "dataset": evil, "task": task, "score": 0.5, "contextless": 0.4, "example": example,
         "zero_shot": 0.1,
         "scores": [{"examples": 1, "scores": [0.2]}, {"examples": 2, "scores": [0.3]}]}
        for n in range(3) for task in ("zero-shot", "probe", "few-shot")
    ]  # fmt: skip
    found: list[tuple[str, list]] = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.append((tag, attrs))

    Tags().feed(figures.page(rows, Suite.read("s.toml")))
    assert found and not [own for own in found if own[0] == "script" or any(name.startswith("on") for name, _ in own[1])]
