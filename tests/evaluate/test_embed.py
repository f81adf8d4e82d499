"""Features on disk: the right vectors, made once, whatever interrupts the making and whoever shares it."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.cli import main
from clipfast.data import DataConfig, Tally
from clipfast.data.sources import from_arrays, read_folder, read_table
from clipfast.evaluate import embed, read_features, zero_shot_source
from clipfast.evaluate.embed import depends_on, weights_digest
from clipfast.evaluate.listing import differences
from clipfast.files import LOCK, locked
from clipfast.inputs.image import Preprocess
from clipfast.model import CLIP
from clipfast.weights import export
from tests.data.test_data import caption, png, write_shards, write_table
from tests.evaluate.test_evaluate import PREPROCESS, SIZES, reference_image, reference_text, write_folders
from tests.model.test_model import shake

module = importlib.import_module("clipfast.evaluate.embed")  # the name is the function's
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**SIZES).eval()


@pytest.fixture
def encodings(model, monkeypatch) -> list[int]:
    """How many images each call of the model encoded."""
    calls, encode = list[int](), model.encode_image

    def counted(pixels, normalize=False):
        calls.append(len(pixels))
        return encode(pixels, normalize)

    monkeypatch.setattr(model, "encode_image", counted)
    return calls


def keys(found) -> list[str]:
    return [row["key"] for row in found.rows]


def sizes(out: Path) -> list[int]:
    return [len(np.load(path)) for path in sorted(out.glob("img_emb/*.npy"))]


# ---- what is written ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_and_what_they_are_of(model, tmp_path, dtype):
    source = DataConfig(write_shards(tmp_path / "data", shards=2, each=12)).open()
    assert embed(model, PREPROCESS, source, tmp_path / "out", dtype=dtype, part_size=7, batch_size=3) == 4
    found = read_features(tmp_path / "out")
    assert keys(found) == [f"{number:04}" for number in range(24)] and found.vectors["image"].dtype == dtype
    expected = torch.stack([reference_image(model, png(number)) for number in range(24)])
    np.testing.assert_allclose(found.vectors["image"], expected.numpy(), atol=1e-5 if dtype == "float32" else 1e-3)
    assert sizes(tmp_path / "out") == [7, 5, 7, 5]  # a shard begins another part
    names = [path.stem.removeprefix("img_emb_") for path in sorted((tmp_path / "out" / "img_emb").iterdir())]
    assert names == ["00000", "00000_0001", "00001", "00001_0001"]
    assert found.rows[7] == {"key": "0007", "image_path": "0007", "caption": "picture 7", "number": 7}


@pytest.mark.parametrize("layers", [1, (1, 1, 1, 1)])
def test_features_before_and_after_the_projection_and_of_texts(tmp_path, layers):
    torch.manual_seed(0)
    given = SIZES | {"vision_layers": layers, "vision_width": 64 if layers == 1 else 8}
    model = CLIP(**given, vision_heads=None if layers == 1 else 4).eval()
    if layers != 1:
        shake(model)
    source = read_table(write_table(tmp_path / "data", 5))
    embed(model, PREPROCESS, source, tmp_path / "out", features=("text", "image", "hidden"))
    found = read_features(tmp_path / "out").vectors
    pixels = torch.stack([PREPROCESS(png(number)) for number in range(5)])
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=-1)
        hidden = torch.from_numpy(found["hidden"])
        mine = hidden @ model.visual.proj if layers == 1 else model.visual.attnpool.c_proj(hidden)
    np.testing.assert_allclose(found["image"], image, atol=1e-5)
    np.testing.assert_allclose(F.normalize(mine, dim=-1), image, atol=1e-5)
    texts = torch.stack([reference_text(model, caption(number)) for number in range(5)])
    np.testing.assert_allclose(found["text"], texts, atol=1e-5)


def test_texts_alone_read_no_image(model, tmp_path, caplog):
    table = Path(write_table(tmp_path, 4))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    table.write_text(table.read_text() + "4.png,\n")
    with caplog.at_level(logging.WARNING):
        embed(model, PREPROCESS, read_table(table), tmp_path / "out", features=("text",), tally=Tally(0.3))
    found = read_features(tmp_path / "out")
    np.testing.assert_allclose(found.vectors["text"][3], reference_text(model, caption(3)), atol=1e-5)
    assert len(found.rows) == 4 and caplog.messages == ["skipped 4.png: no caption"]


def test_formats_as_clip_retrieval_and_autofaiss_read_them(model, tmp_path):
    """Index, filter and back-end of clip-retrieval: img_emb/*.npy, text_emb/*.npy, metadata/*.parquet, in order of names."""
    source = DataConfig(write_shards(tmp_path / "data", shards=2, each=3)).open()
    for form in ("npy", "clip-retrieval", "parquet"):
        embed(model, PREPROCESS, source, tmp_path / form, features=("image", "text"), form=form, part_size=2)
    whole = read_features(tmp_path / "npy")
    for form in ("clip-retrieval", "parquet"):
        found = read_features(tmp_path / form)
        assert found.rows == whole.rows
        for own in ("image", "text"):
            np.testing.assert_array_equal(found.vectors[own], whole.vectors[own])
    theirs = tmp_path / "clip-retrieval"
    table = pandas.concat(pandas.read_parquet(path) for path in sorted((theirs / "metadata").glob("*.parquet")))
    assert table["image_path"].tolist() == keys(whole) and table["caption"].tolist() == [caption(n) for n in range(6)]
    for kind, own in (("img_emb", "image"), ("text_emb", "text")):
        parts = [np.load(path) for path in sorted((theirs / kind).glob("*.npy"))]
        np.testing.assert_array_equal(np.concatenate(parts), whole.vectors[own])
    one = pyarrow.parquet.read_table(sorted((tmp_path / "parquet" / "metadata").iterdir())[0])
    np.testing.assert_array_equal(np.stack(one["image_embedding"].to_numpy()), whole.vectors["image"][:2])


def test_the_commands_read_a_folded_model(tmp_path, monkeypatch, capsys):
    """`clipfast embed` and `eval` fold a ResNet's batch norms: the same vectors, the same accuracy."""
    torch.manual_seed(0)
    given = {"vision_layers": (1, 1, 1, 1), "vision_width": 16, "vision_patch_size": None}
    model = CLIP(**(SIZES | given))
    shake(model)
    model.eval()
    export(model, tmp_path / "m.safetensors")
    write_folders(tmp_path / "data")
    seen: list[bool] = []
    encode = CLIP.encode_image

    def watched(self, *args, **kwargs):
        seen.append(any(isinstance(module, torch.nn.BatchNorm2d) for module in self.modules()))
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(CLIP, "encode_image", watched)
    asked = [str(tmp_path / "data"), "--model", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    assert main(["embed", asked[0], str(tmp_path / "out"), *asked[1:]]) == 0
    assert main(["eval", *asked]) == 0
    assert seen == [False, False]
    found = read_features(tmp_path / "out")
    assert len(found.rows) == 6
    expected = torch.stack([reference_image(model, png(int(Path(key).stem))) for key in keys(found)])
    np.testing.assert_allclose(found.vectors["image"], expected.numpy(), atol=1e-5)
    top1 = zero_shot_source(model, PREPROCESS, read_folder(tmp_path / "data"))["top1"]
    assert f"{top1:8.2%}" in capsys.readouterr().out


def test_arrays_are_known_by_their_content(model, tmp_path, encodings):
    images = [np.full((20, 20, 3), 10 * number, np.uint8) for number in range(4)]
    embed(model, PREPROCESS, from_arrays(images, ["a"] * 4), tmp_path / "out")
    embed(model, PREPROCESS, from_arrays([own.copy() for own in images], ["a"] * 4), tmp_path / "out")
    assert sum(encodings) == 4
    drawn = [Image.fromarray(own) for own in images]
    for _ in range(2):
        embed(model, PREPROCESS, from_arrays(drawn, ["a"] * 4), tmp_path / "drawn")
    assert sum(encodings) == 8
    for changed in (images[:3] + [images[3] + 1], [Image.fromarray(own) for own in images[:3]] + [png(1)]):
        with pytest.raises(ValueError, match=r"there are .*1 changed \(3\)|4 changed \(0, 1, 2, ...\)"):
            embed(model, PREPROCESS, from_arrays(changed, ["a"] * 4), tmp_path / "out")
    with pytest.raises(ValueError, match=r"1 changed \(1\)"):  # its caption
        embed(model, PREPROCESS, from_arrays(images, ["a", "b", "a", "a"]), tmp_path / "out")


def test_texts_of_a_table_without_images_by_the_command_line(model, tmp_path, capsys):
    export(model, tmp_path / "m.safetensors")
    (tmp_path / "t.csv").write_text("caption\na red square\n" + "a long " * 60 + "\n")
    common = [str(tmp_path / "t.csv"), str(tmp_path / "out"), "--model", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    assert main(["embed", *common, "--features", "text", "--image-column", "caption", "--format", "parquet"]) == 0
    assert f"1 parts in {tmp_path / 'out'}" in capsys.readouterr().out
    found = read_features(tmp_path / "out")
    assert found.rows[0] == {"key": "a red square", "caption": "a red square"}
    np.testing.assert_allclose(found.vectors["text"][0], reference_text(model, "a red square"), atol=1e-5)
    (tmp_path / "t.csv").write_text("caption\na red square\na blue one\n")
    again = ["embed", *common, "--features", "text", "--image-column", "caption", "--format", "parquet"]
    assert main(again) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "there are 1 added (a blue one), 1 removed (a long" in told and "--refresh" in told
    assert main([*again, "--refresh"]) == 0 and len(read_features(tmp_path / "out").rows) == 2
    assert main([*again[:5], "--features", "text", "--image-column", "caption"]) == 2
    assert "but format parquet -> npy; choose another folder" in capsys.readouterr().err


def test_a_folder_of_shards_far_away(model, tmp_path, capsys):
    export(model, tmp_path / "m.safetensors")
    write_shards(tmp_path / "data", shards=2, each=4)
    system = fsspec.filesystem("memory")
    for name in ("000.tar", "001.tar"):
        system.pipe(f"/far/test/{name}", (tmp_path / "data" / name).read_bytes())
    given = ["--model", str(tmp_path / "m.safetensors"), "--device", "cpu"]
    assert main(["embed", "memory://far/test", str(tmp_path / "out"), *given]) == 0
    assert keys(read_features(tmp_path / "out")) == [f"{number:04}" for number in range(8)]


# ---- going on ----------------------------------------------------------------------------------------------------------------


def test_an_interrupted_embed_goes_on(model, tmp_path, monkeypatch):
    source = DataConfig(write_table(tmp_path / "data")).open()
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed(model, PREPROCESS, source, whole, part_size=5)
    encode, calls = model.encode_image, []

    def counted(pixels, normalize=False):
        calls.append(len(pixels))
        if sum(calls) > 12:
            raise KeyboardInterrupt
        return encode(pixels, normalize)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "encode_image", counted)
        embed(model, PREPROCESS, source, out, part_size=5)
    assert sizes(out) == [5, 5] and not [*out.rglob("*.part")]
    with pytest.raises(ValueError, match="got a part of them; finish the embed"):
        read_features(out)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            model, "encode_image", lambda pixels, normalize: (calls.append(len(pixels)), encode(pixels, normalize))[1]
        )
        embed(model, PREPROCESS, source, out, part_size=5)
    assert sum(calls) == 24 - 10
    expected, found = read_features(whole), read_features(out)
    assert found.rows == expected.rows and np.array_equal(found.vectors["image"], expected.vectors["image"])
    with pytest.raises(ValueError, match=r"go on with what .* was made by, but part_size 5 -> 6; choose another folder"):
        embed(model, PREPROCESS, source, out, part_size=6)


def test_another_content_is_refused_and_refreshed(model, tmp_path, encodings):
    """Of the folder: what differs is told; a refresh makes what is new and keeps the rest, wherever it moved to."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(12):
        (data / f"{number:02}.png").write_bytes(png(number))
    embed(model, PREPROCESS, read_folder(data), out, part_size=5)
    encodings.clear()
    embed(model, PREPROCESS, read_folder(data), out, part_size=5)
    assert not encodings
    for number in range(12, 17):
        (data / f"0{number}.png").write_bytes(png(number))  # before the others
    (data / "03.png").write_bytes(png(99))
    (data / "07.png").unlink()
    told = r"5 added \(012.png, 013.png, 014.png, ...\), 1 removed \(07.png\), 1 changed \(03.png\); take --refresh"
    with pytest.raises(ValueError, match=told):
        embed(model, PREPROCESS, read_folder(data), out, part_size=5)
    assert not encodings
    embed(model, PREPROCESS, read_folder(data), out, part_size=5, refresh=True)
    assert sum(encodings) == 6
    found = read_features(out)
    assert keys(found) == sorted(path.name for path in data.iterdir()) and sizes(out) == [5, 5, 5, 1]
    expected = torch.stack([reference_image(model, (data / key).read_bytes()) for key in keys(found)])
    np.testing.assert_allclose(found.vectors["image"], expected, atol=1e-5)
    assert sorted(path.name for path in out.iterdir()) == ["done", "embed.json", "img_emb", "listing.jsonl", "metadata"]


def test_a_shard_that_changed_is_made_again(model, tmp_path, encodings):
    where, out = write_shards(tmp_path / "data", shards=3, each=4), tmp_path / "out"
    embed(model, PREPROCESS, DataConfig(where).open(), out, part_size=3)
    write_shards(tmp_path / "new", shards=3, each=4, replace={"0005.png": png(90)})
    os.replace(tmp_path / "new" / "001.tar", tmp_path / "data" / "001.tar")
    encodings.clear()
    with pytest.raises(ValueError, match=r"1 changed \(001.tar\)"):
        embed(model, PREPROCESS, DataConfig(where).open(), out, part_size=3)
    embed(model, PREPROCESS, DataConfig(where).open(), out, part_size=3, refresh=True)
    found = read_features(out)
    assert sum(encodings) == 4 and keys(found) == [f"{number:04}" for number in range(12)]
    os.rename(tmp_path / "data", tmp_path / "moved")  # shards are known by their names below their folder
    embed(model, PREPROCESS, DataConfig(str(tmp_path / "moved")).open(), out, part_size=3)
    assert sum(encodings) == 4
    np.testing.assert_allclose(found.vectors["image"][5], reference_image(model, png(90)), atol=1e-5)
    np.testing.assert_allclose(found.vectors["image"][11], reference_image(model, png(11)), atol=1e-5)


def test_remote_shards_are_known_by_what_their_store_says(model, tmp_path, encodings):
    write_shards(tmp_path / "data", shards=2, each=4)
    system = fsspec.filesystem("memory")
    for name in ("000.tar", "001.tar"):
        system.pipe(f"/clipfast/{name}", (tmp_path / "data" / name).read_bytes())
    where = "memory://clipfast/{000..001}.tar"
    for _ in range(2):
        embed(model, PREPROCESS, DataConfig(where).open(), tmp_path / "out")
    assert sum(encodings) == 8
    write_shards(tmp_path / "data", shards=2, each=6)
    system.pipe("/clipfast/001.tar", (tmp_path / "data" / "001.tar").read_bytes())
    with pytest.raises(ValueError, match=r"there are 1 changed \(memory://clipfast/001.tar\)"):
        embed(model, PREPROCESS, DataConfig(where).open(), tmp_path / "out")
    system.rm("/clipfast/001.tar")
    with pytest.raises(ConnectionError, match="cannot reach memory://clipfast/001.tar: FileNotFoundError"):
        embed(model, PREPROCESS, DataConfig(where).open(), tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_told(model, tmp_path, monkeypatch):
    write_folders(tmp_path / "data")
    encode, victim = model.encode_image, tmp_path / "data" / "n02" / "9.png"

    def meddled(pixels, normalize=False):
        victim.write_bytes(png(91))
        return encode(pixels, normalize)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_image", meddled)
        with pytest.raises(ValueError, match=r"no change of the source while .* 1 changed \(n02/9.png\); go on by --refresh"):
            embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out")
    embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out", refresh=True)
    row = keys(read_features(tmp_path / "out")).index("n02/9.png")
    np.testing.assert_allclose(
        read_features(tmp_path / "out").vectors["image"][row], reference_image(model, png(91)), atol=1e-5
    )


def test_two_on_one_folder(model, tmp_path):
    write_folders(tmp_path / "data")
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on .* since"):
        embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out")


def test_what_is_complete_is_only_read(model, tmp_path, monkeypatch):
    """By several at once, and from a folder that nobody may write to."""
    write_folders(tmp_path / "data")
    embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out")

    def refused(*_):
        raise AssertionError("no lock is needed")

    monkeypatch.setattr(module, "locked", refused)
    assert embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out") == 1


def test_what_vectors_depend_on(model):
    """Weights, activation, heads, preprocessing, dtype, which features: each alone is another key."""
    torch.manual_seed(0)
    given = ("image",), "float32", "npy", 10
    own = depends_on(model, PREPROCESS, *given)
    assert own == depends_on(CLIP(**SIZES).train(), Preprocess(32), *given) | {"weights": own["weights"]}
    assert weights_digest(model) == own["weights"]
    other = CLIP(**SIZES)
    other.load_state_dict(model.state_dict())
    assert weights_digest(other) == own["weights"]
    for change in (
        lambda: other.visual.conv1.weight.data.view(-1)[5].add_(1e-6),
        lambda: setattr(other.visual.transformer.resblocks[0].mlp, "gelu", torch.nn.GELU()),
        lambda: other.half(),
    ):
        before = weights_digest(other)
        change()
        assert weights_digest(other) != before
    looked_at, changed = Preprocess(32), Preprocess(32)
    assert looked_at.transforms and depends_on(model, looked_at, *given) == own
    changed.transforms[0] = lambda image: image
    for preprocess in (Preprocess(32, interpolation="bilinear"), changed):
        assert depends_on(model, preprocess, *given)["preprocess"] != own["preprocess"]


def test_what_two_contents_differ_in():
    before = [["a", 1], ["b", 2], ["b", 3], ["c", 4]]
    assert differences(before, [*before]) == ""
    assert differences(before, before[::-1]) == "4 in another order"
    assert differences(before, before[:2] + before[3:]) == "1 changed (b)"
    assert differences([], before) == "3 added (a, b, c)"


# ---- bad input ---------------------------------------------------------------------------------------------------------------


def test_what_is_corrupt_is_skipped_and_told(model, tmp_path, caplog):
    where = write_shards(tmp_path / "data", replace={"0003.png": b"broken"})
    with caplog.at_level(logging.WARNING):
        embed(model, PREPROCESS, DataConfig(where).open(), tmp_path / "out", part_size=10)
    found = read_features(tmp_path / "out")
    assert len(found.rows) == len(found.vectors["image"]) == 23 and "0003" not in keys(found)
    assert "skipped 0003" in caplog.text
    many = write_shards(tmp_path / "many", shards=2, each=12, replace={f"{n:04}.png": b"broken" for n in range(5)})
    for _ in range(2):  # what is made is kept, and is too little the next time too
        with pytest.raises(ValueError, match="at most 10% unusable samples, got 5 of 24, last .*; repair the data"):
            embed(model, PREPROCESS, DataConfig(many).open(), tmp_path / "bad", part_size=10)
    with pytest.raises(ValueError, match="finish the embed"):
        read_features(tmp_path / "bad")
    embed(model, PREPROCESS, DataConfig(many).open(), tmp_path / "bad", part_size=10, tally=Tally(0.5))
    assert len(read_features(tmp_path / "bad").rows) == 19


def test_a_repaired_image_is_put_in_its_place(model, tmp_path, encodings):
    """The rows behind it keep their own vectors."""
    folders = write_folders(tmp_path / "data")
    broken = tmp_path / "data" / "n01" / "60.png"
    broken.write_bytes(b"broken")
    embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out", tally=Tally(0.3))
    assert len(read_features(tmp_path / "out").rows) == 5
    broken.write_bytes(png(60))
    encodings.clear()
    embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out", refresh=True)
    found = read_features(tmp_path / "out")
    assert sum(encodings) == 1 and len(found.rows) == sum(map(len, folders.values()))
    for key, vector in zip(keys(found), found.vectors["image"], strict=True):
        np.testing.assert_allclose(vector, reference_image(model, png(int(Path(key).stem))), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "expected dtype float16 or float32, got 'int8'"),
        ({"form": "csv"}, "expected a format of npy, clip-retrieval, parquet, got 'csv'"),
        ({"features": ("image", "sound")}, "expected features of image, hidden, text, each once, got ['image', 'sound']"),
        ({"features": ()}, "each once, got []"),
        ({"part_size": 0}, "expected a part_size of 1 or more, got 0"),
    ],
)
def test_bad_options(model, tmp_path, options, message):
    write_folders(tmp_path / "data")
    with pytest.raises(ValueError, match=re.escape(message)):
        embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("embed.json", "[" * 100_000, "embed.json: expected a JSON object, got one that is nested too deeply"),
        ("embed.json", "{", "embed.json: expected a JSON object, got Expecting"),
        ("embed.json", "[1]", "embed.json: expected a JSON object, got list"),
        ("embed.json", "{}", "was made by, but weights None -> "),
        ("listing.jsonl", "{}\n", "listing.jsonl, line 1: expected a JSON list, got dict"),
        ("listing.jsonl", "[" * 100_000, "listing.jsonl, line 1: expected a JSON list, got one that is nested"),
        ("done/00000.json", '{"parts": "two"}', "00000.json: expected the numbers of a unit's parts, samples and rows, got"),
        ("done/x.json", "{}", "x.json: expected the numbers of a unit's parts"),
    ],
)
def test_a_folder_that_was_tampered_with(model, tmp_path, name, text, message):
    write_folders(tmp_path / "data")
    embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out")
    (tmp_path / "out" / name).write_text(text)
    (tmp_path / "out" / LOCK).touch()  # of a process that was killed: all is looked at
    with pytest.raises(ValueError, match=re.escape(message)):
        embed(model, PREPROCESS, read_folder(tmp_path / "data"), tmp_path / "out")


# ---- killed, and over ranks --------------------------------------------------------------------------------------------------


def forks(folder: Path, scenario: str, how: str, number: int) -> int:
    """How many were killed; what was wrong afterwards fails."""
    command = [sys.executable, "-m", "tests.evaluate.forks", folder, scenario, how, number]
    done = subprocess.run(
        [str(own) for own in command], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, wrong = json.loads(done.stdout)
    assert not wrong, wrong[:5]
    return kills


def test_killed_at_some_of_its_file_operations_and_as_two_ranks(tmp_path):
    assert forks(tmp_path, "shards", "quick", 20) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "least"), [("fresh", 40), ("shards", 90), ("refresh", 60)])
def test_killed_at_each_of_its_file_operations(tmp_path, scenario, least):
    assert forks(tmp_path, scenario, "each", 1) >= least


@pytest.mark.slow
@pytest.mark.parametrize("how", ["random", "random-ranks"])
@pytest.mark.parametrize("scenario", ["shards", "refresh"])
def test_killed_at_random_times(tmp_path, scenario, how):
    assert forks(tmp_path, scenario, how, 25) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fresh", "shards", "refresh"])
def test_four_ranks_write_the_rows_of_one(tmp_path, scenario):
    forks(tmp_path, scenario, "ranks", 4)
