"""Names, paths, addresses and configurations of a stranger: no command runs, nothing outside is read, one line answers."""

import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.cli import main
from clipfast.data import FromFile, Shards
from clipfast.evaluate.datasets import EvalSet, read_text
from clipfast.evaluate.probe import Head
from clipfast.evaluate.suite import Suite
from clipfast.files import parsed, read_parsed
from clipfast.inputs import HFTokenizer, read_image
from clipfast.model import CLIP
from clipfast.weights.hub import check_repository
from tests.data.test_data import write_shards
from tests.data.test_shards import tar
from tests.evaluate.test_evaluate import SIZES

DEEP = {"JSON": "[" * 100_000, "TOML": "x = " + "[" * 100_000}
PIPES = (
    "pipe:touch {0}", "x.tar::pipe:touch {0}", "{{pipe:touch {0},b.tar}}", "p{{i,}}pe:touch {0}", "PIPE:touch {0}",
    "s3://x/a.tar::pipe:touch {0} #.tar", "ssh://x/y.tar", "reference://::{0}", "simplecache::ssh://{0}",
)  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save({"state_dict": CLIP(**SIZES).state_dict(), "model_config": {"quick_gelu": True}}, path)
    return str(path)


def refused(argv: list[str], capsys) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse prints its usage before the line
        code = stop.code
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "error: " in told[-1] and not any("Traceback" in line for line in told), told
    return told[-1]


@pytest.mark.parametrize("address", PIPES)
@pytest.mark.parametrize("key", ["data", "val_data", "val_da", "train"])
def test_a_file_of_options_runs_no_command(tmp_path: Path, capsys, monkeypatch, model_path, address: str, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "s")
    told = {"data": "s", key: address.format("pwned")}
    Path("options.toml").write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in told.items()))
    train = ["train", "--model", json.dumps(SIZES), "--batch-size", "2", "--steps", "1", "--val-every", "1"]
    argv = ["eval", "--task", "few-shot", "--model", model_path] if key == "train" else train
    assert "typed in the command line" in refused([*argv, "@options.toml"], capsys)
    assert not Path("pwned").exists()


def test_a_file_of_options_hides_no_other_option(tmp_path: Path, capsys) -> None:
    file = tmp_path / "options.toml"
    for text in (
        'data = "--val-data=pipe:ls"',
        '"val-data=pipe:touch x" = ""',
        '"" = 1',
        '"a b" = 2',
        'out = ["x"]',
        "steps = 1979-05-27",
    ):
        file.write_text(text)
        assert "expected an option's name and its value" in refused(["train", f"@{file}"], capsys)


def test_a_command_that_is_typed_runs(tmp_path: Path) -> None:
    urls = write_shards(tmp_path / "s", shards=1)
    with_braces = Shards(f"pipe:cat {Shards(urls).urls[0]}")
    assert [s.error for s in with_braces.samples()] == [""] * len(list(Shards(urls).samples()))
    with pytest.raises(ValueError, match=r"expected a path or an address of .* in a file, got 'pipe:"):
        Shards(FromFile(with_braces.urls[0]))
    with pytest.raises(ValueError, match="typed in the command line"):
        Shards(["a.tar", FromFile("pipe:ls")])
    with pytest.raises(ValueError, match="at most 2,000,000 shards, got 1,000,000,001"):
        Shards("x/{0..1000000000}.tar")
    with pytest.raises(ValueError, match="expected variables that are set"):
        Shards("${NO_SUCH}/x.tar")


@pytest.mark.parametrize("name", ["pipe:touch pwned;.tar", "PIPE:touch pwned;.tar"])
def test_a_file_whose_name_is_a_command_is_a_file(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename(Shards(write_shards(tmp_path / "s", shards=1)).urls[0], tmp_path / name)
    for urls in (".", "*.tar"):
        assert all(not sample.error for sample in Shards(urls).samples())
    assert not Path("pwned").exists()


@pytest.mark.parametrize("address", PIPES)
def test_a_suite_runs_no_command(tmp_path: Path, monkeypatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    address = address.format("pwned")
    for field in ("root", "test"):
        for folder in ("", f"{tmp_path}/"):
            Path("suite.toml").write_text(f'[[dataset]]\nname = "x"\n{field} = {json.dumps(address)}\n')
            with pytest.raises((ValueError, OSError)):
                Suite.read(f"{folder}suite.toml").datasets[0].open("test")
    data = EvalSet.of({"name": "x", "root": "r", "classes": address, "templates": f"{address}.json"})
    for read in (data.named, data.prompts, partial(read_text, FromFile(address))):
        with pytest.raises((ValueError, OSError)):
            read()
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "name",
    ["a/b@../../../x", "a/b@/etc", "../x", "a/../b", "a/b/c", "/etc/passwd", "a/b@x\0", "a\n/b", "a b/c", "a/b@x/..", "", "@x"],
)  # fmt: skip
def test_a_repository_stays_in_its_cache(tmp_path: Path, capsys, name: str) -> None:
    cache, secret = tmp_path / "cache" / "models--a--b", tmp_path / "x"
    (cache / "refs").mkdir(parents=True)
    secret.write_text("0" * 40)
    before = sorted(tmp_path.rglob("*"))
    for call in (clipfast.load, clipfast.get_tokenizer):
        with pytest.raises(OSError, match="check the name"):
            call(f"hf-hub:{name}", download_root=str(tmp_path / "cache"))
    assert "check the name" in refused(["export", f"hf-hub:{name}", str(tmp_path / "out")], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_good() -> None:
    for name in ("gpt2", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "timm/x_1.y@refs/pr/3", "a/b@" + "0" * 40, "a/b@v1.0"):
        check_repository(name)


@pytest.mark.parametrize(
    "name", ["", "\0", "x\0y", "a" * 5000, "../../etc/none", "/dev/zero", "/dev/stdin", "pipe:ls", "http://x/y", "\x1b[2J"]
)
def test_a_model_of_no_such_name(tmp_path: Path, capsys, name: str) -> None:
    assert refused(["export", name, str(tmp_path / "out")], capsys).isprintable() and not [*tmp_path.iterdir()]


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="the image cannot be read: expected a file"):
            read_image(path)
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(OSError, match="at most 1024 MB"):
        read_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("form", ["JSON", "TOML"])
def test_nested_deeply(tmp_path: Path, form: str) -> None:
    file = tmp_path / "x"
    for text, said in (
        (DEEP[form], "nested too deeply"),
        ("\udcff", "x: expected a"),
        ("\0", "x: expected a"),
        ("=", "expected"),
    ):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        for read in (partial(read_parsed, file, form=form), partial(parsed, file.read_bytes(), file, form=form)):
            with pytest.raises(ValueError, match=said) as caught:
                read()
            assert "\n" not in str(caught.value)
    file.write_text("[]")
    with pytest.raises(ValueError, match="x: expected a JSON object, got list; mend it"):
        read_parsed(file)


def test_nested_deeply_wherever_it_is_read(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "s")
    names = ("deep.json", "head.json", "config.json", "open_clip_config.json", "tokenizer_config.json", "modules.json")
    for name in names:
        (tmp_path / name).write_text(DEEP["JSON"])
    Path("deep.toml").write_text(DEEP["TOML"])
    Path("rows.csv").write_text("path,age\nx.png,3\n")
    Path("classes.txt").write_text("a\nb\n")
    Image.new("RGB", (8, 8)).save("x.png")
    torch.save({}, "x.pt")
    deep = '{"a":' + DEEP["JSON"]
    for argv in (
        ["train", "@deep.toml"], ["train", "s", "--model", deep], ["suite", "x.pt", "--suite", "deep.toml"],
        ["classify", "x.png", "--head", "."], ["export", ".", "out"],
    ):  # fmt: skip
        assert "nested too deeply" in refused(argv, capsys), argv
    for read in (
        partial(HFTokenizer, "."), partial(clipfast.get_tokenizer, "."), partial(Head.load, "."),
        EvalSet("x", test="s", templates="deep.json").prompts,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="nested too deeply"):
            read()


def test_a_shard_loses_no_sample_to_deep_metadata(tmp_path: Path) -> None:
    odd = io.BytesIO()
    np.lib.format.write_array_header_2_0(odd, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    files = [("a.jpg", b"1"), ("a.json", DEEP["JSON"].encode()), ("b.jpg", b"2"), ("b.cls", b"\xff"), ("c.jpg", b"3")]
    files += [("c.npy", odd.getvalue()), ("d.jpg", b"4"), ("d.npy", b"PK\3\4"), ("e.jpg", b"5"), ("e.cls", b"7")]
    found = list(Shards(str(tar(tmp_path / "x.tar", files)), label_field="npy").samples())
    assert [(s.key, bool(s.error), s.image) for s in found] == [*((key, True, None) for key in "abcd"), ("e", False, b"5")]


def test_a_head_that_is_none(tmp_path: Path) -> None:
    good = Head(torch.zeros(2, 3), torch.zeros(2), ["a", "b"], {})
    good.save(tmp_path)
    assert Head.load(tmp_path).classes == ["a", "b"]
    for text in ("{}", '{"classes": 3, "about": {}}', '{"classes": ["a", "b"], "about": []}', "[]"):
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(ValueError, match="expected"):
            Head.load(tmp_path)
    good._replace(weight=torch.zeros(3)).save(tmp_path)
    with pytest.raises(ValueError, match="of a head"):
        Head.load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="as it was written"):
        Head.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["dataset = 3", "dataset = [3]", "[[dataset]]\nname = 3\ntest = 'x'", "[[dataset]]\nname = 'a'\ntest = ['x']",
     "[[dataset]]\nname = 'a'\ntest = 'x'\ntasks = 'probe'", "[[dataset]]\nname = 'a'\ntest = 'x'\nmetric = ['map']",
     "point = 3\n[[dataset]]\nname = 'a'\ntest = 'x'", "point = [3]\n[[dataset]]\nname = 'a'\ntest = 'x'",
     "standard = 3\n[[dataset]]\nname = 'a'\ntest = 'x'", "compute = 3\n[[dataset]]\nname = 'a'\ntest = 'x'",
     "[[dataset]]\nname = 'a'\ntest = 'x'\n[compute]\nx = 'y'"],
)  # fmt: skip
def test_a_suite_of_other_types(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ValueError, match="expected"):
        Suite.read(tmp_path / "s.toml")


def test_nothing_steers_the_terminal(tmp_path: Path, capsys) -> None:
    assert "\\x1b]0;x\\x07" in refused(["classify", f"{tmp_path}/\x1b]0;x\x07", "a"], capsys)
    assert sys.getrecursionlimit() < 100_000  # else DEEP would not be too deep
