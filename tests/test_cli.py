"""The command line: what it prints, and one clear line with exit code 2 for whatever a user can put right."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfast import cli, info
from clipfast.data import DataConfig
from clipfast.evaluate import classify
from clipfast.inputs.image import Preprocess
from clipfast.model import CLIP
from clipfast.train import TrainConfig
from clipfast.weights import load
from tests.data.test_data import png, write_shards, write_table
from tests.evaluate.test_evaluate import SIZES


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    torch.save({"state_dict": CLIP(**SIZES).state_dict(), "model_config": {"quick_gelu": True}}, path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "photo.png").write_bytes(png(9))
    return str(tmp_path / "photo.png")


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one line of a command that must fail in an orderly way."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("\r")]
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = [line for line in lines if line.startswith("clipfast: error: ")]
    assert len(line) < 700
    return line.removeprefix("clipfast: error: ")


# ---- what the commands do ----------------------------------------------------------------------------------------------------


def test_classify_prints_a_table_of_probabilities(capsys, model_path, photo):
    texts = ["a dog", "a cat", "a green square"]
    assert run("classify", photo, *texts, "--model", model_path, "--device", "cpu") == 0
    rows = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    probabilities = [float(row[0]) for row in rows]
    assert sorted(probabilities, reverse=True) == probabilities and sum(probabilities) == pytest.approx(100, abs=0.05)
    model, _ = cli.load(model_path, "cpu")
    expected = classify(model, Preprocess(32)(photo)[None], texts)[0]
    assert {row[1]: float(row[0]) for row in rows} == pytest.approx(
        {text: 100 * p for text, p in zip(texts, expected.tolist(), strict=True)}, abs=0.006
    )


def test_train_then_eval_then_embed(capsys, tmp_path):
    data = write_shards(tmp_path / "data")
    settings = ["--steps", 3, "--batch-size", 6, "--workers", 1, "--device", "cpu", "--no-tensorboard", "--micro-batch", 3]
    assert run("train", data, "--model", json.dumps(SIZES), "--out", tmp_path / "run", *settings) == 0
    assert re.search(rf"3 steps in \d+ s: {re.escape(str(tmp_path / 'run' / 'model.pt'))}", capsys.readouterr().out)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["micro_batch"], config["tensorboard"], config["model"]) == (3, 3, False, SIZES)

    trained = ["--model", tmp_path / "run" / "model.pt", "--device", "cpu"]
    tuned = ["--model", tmp_path / "run" / "model.pt", "--pretrained", "--lock-image", "--out", tmp_path / "tuned"]
    assert run("train", data, *tuned, *settings) == 0
    before, after = (load(tmp_path / name / "model.pt")[0].state_dict() for name in ("run", "tuned"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if not name.startswith("visual.")
    }
    capsys.readouterr()
    assert run("eval", data, "--task", "retrieval", *trained) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert table["images"] == table["captions"] == "24" and table["image_to_text_R@10"].endswith("%")

    folder = tmp_path / "classes"
    for name, number in (("n1", 3), ("n2", 100)):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(png(number))
    (tmp_path / "classes.txt").write_text("n1\tred\nn2\tgreen\nblue\n")
    (tmp_path / "templates.txt").write_text("a {}.\nthe {}.\n\n")
    extra = ["--classes", tmp_path / "classes.txt", "--templates", tmp_path / "templates.txt"]
    assert run("eval", folder, *trained, *extra) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert table.keys() == {"top1", "top5", "images", "classes"} and (table["images"], table["classes"]) == ("2", "3")
    assert table["top5"] == "100.00%"

    assert run("embed", data, tmp_path / "out", *trained, "--part-size", 10, "--dtype", "float16") == 0
    assert [np.load(part).shape for part in sorted((tmp_path / "out").glob("img_emb/*.npy"))] == [(6, 16)] * 4
    assert f"4 parts in {tmp_path / 'out'}" in capsys.readouterr().out


def test_train_from_a_file_with_validation_then_export(capsys, tmp_path):
    data = write_shards(tmp_path / "data")
    (tmp_path / "run.toml").write_text(f"""
        data = '{data}'
        model = {{ {", ".join(f"{name} = {value}" for name, value in SIZES.items())} }}
        out = '{tmp_path / "run"}'
        steps = 9
        batch_size = 6
        workers = 1
        device = 'cpu'
        tensorboard = false
        val_data = '{data}'
        val_task = 'retrieval'
        val-every = 2
    """)
    assert run("train", f"@{tmp_path / 'run.toml'}", "--steps", 4) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["batch_size"], config["tensorboard"], config["model"]) == (4, 6, False, SIZES)
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["captions"] == 24
    assert run("eval", data, "--task", "retrieval", "--model", tmp_path / "run" / "model.pt", "--device", "cpu") == 0
    last = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert last["image_to_text_R@5"] == f"{lines[1]['image_to_text_R@5']:.2%}"

    for model in ("model.pt", "checkpoints/step_00000004"):
        out = tmp_path / model.replace("/", "-")
        assert run("export", tmp_path / "run" / model, out, "--layout", "transformers") == 0
        assert capsys.readouterr().out.strip() == str(out) and (out / "config.json").exists()
    assert "expected nothing at" in refused(capsys, "export", tmp_path / "run" / "model.pt", out)


def test_bad_option_files(capsys, tmp_path):
    for text, said in (("steps = ", "expected a TOML file"), ("stepz = 3", "unrecognized arguments: --stepz=3")):
        (tmp_path / "run.toml").write_text(f"data = 'x'\n{text}\n")
        with pytest.raises(SystemExit) as caught:
            run("train", f"@{tmp_path / 'run.toml'}")
        assert caught.value.code == 2 and said in capsys.readouterr().err
    table = write_table(tmp_path / "table")
    small = ["--model", json.dumps(SIZES), "--steps", 2, "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "out"]
    assert "val_data and val_every together" in refused(capsys, "train", table, *small, "--val-every", 2)
    assert "got 2 of 4" not in refused(capsys, "train", table, *small, "--val-data", table, "--val-every", 2, "--val-task", "x")
    assert not (tmp_path / "out").exists()


def test_info_and_running_as_a_module():
    """In a process of its own: the entry of the file, the exit code, and one line on stderr."""
    done = subprocess.run([sys.executable, "-m", "clipfast.cli", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == info().strip()
    done = subprocess.run([sys.executable, "-m", "clipfast.cli", "classify", "none.png", "a"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("clipfast: error: none.png") and done.stderr.count("\n") == 1


def test_every_field_is_a_flag_with_help(capsys):
    for command, kinds in (
        ("train", [DataConfig, TrainConfig, cli.Validation]),
        ("export", [cli.Export]),
        ("eval", [DataConfig, cli.Eval]),
        ("embed", [cli.Embed]),
    ):
        with pytest.raises(SystemExit) as caught:
            run(command, "--help")
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for kind in kinds:
            for field in fields(kind):
                assert f"--{field.name.replace('_', '-')}" in text or f"  {field.name} " in text
    defaults = cli._parser().parse_args(["train", "x"])
    assert vars(defaults) == {"command": "train", "data": "x"}  # what is not given keeps the dataclass's default
    given = vars(cli._parser().parse_args(["train", "x", "--lr", "1e-3", "--steps", "7", "--resume", "auto", "--no-progress"]))
    assert (given["lr"], given["steps"], given["resume"], given["progress"]) == (1e-3, 7, "auto", False)


# ---- bad input ---------------------------------------------------------------------------------------------------------------


def test_bad_images(capsys, tmp_path, model_path):
    assert "none.png" in refused(capsys, "classify", tmp_path / "none.png", "a dog", "--model", model_path)
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png: expected an image" in refused(capsys, "classify", tmp_path / "text.png", "a dog", "--model", model_path)
    (tmp_path / "cut.png").write_bytes(png(3, (300, 300))[:200])
    assert "cut.png" in refused(capsys, "classify", tmp_path / "cut.png", "a dog", "--model", model_path)


def test_bad_captions(capsys, model_path, photo):
    line = refused(capsys, "classify", photo, "word " * 500, "--model", model_path)
    assert line.startswith("Input word") and line.endswith("is too long for context length 77")
    assert "text 2 of 2 is empty" in refused(capsys, "classify", photo, "a dog", "", "--model", model_path)


def test_bad_models(capsys, tmp_path, model_path, photo):
    assert "ViT-B/32" in refused(capsys, "classify", photo, "a dog", "--model", "ViT-B-32")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(model_path).read_bytes()[:20000])
    assert "cut.pt" in refused(capsys, "classify", photo, "a dog", "--model", cut)
    out = tmp_path / "out"
    assert "'ViT-B/33'" in refused(capsys, "train", write_table(tmp_path), "--model", "ViT-B/33", "--steps", 1, "--out", out)
    assert "image_resolution" in refused(capsys, "train", write_table(tmp_path), "--model", '{"embed_dim": 1}', "--steps", 1)
    assert not out.exists()


def test_no_network(capsys, tmp_path, photo, monkeypatch):
    from urllib.error import URLError

    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    line = refused(capsys, "classify", photo, "a dog", "--model", "RN50")
    assert "no route to host" in line and "RN50.pt" in line
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))


def test_bad_data(capsys, tmp_path, model_path):
    tar = tmp_path / "000.tar"
    tar.write_bytes(b"plain text" * 100)
    small = ["--model", json.dumps(SIZES), "--steps", 2, "--batch-size", 4, "--device", "cpu"]
    for workers in (0, 1):
        line = refused(capsys, "train", tar, *small, "--out", tmp_path / "run", "--workers", workers)
        assert "000.tar: expected a readable tar" in line
    assert "000.tar: expected a readable tar" in refused(capsys, "embed", tar, tmp_path / "out", "--model", model_path)
    assert "000.tar: expected a readable tar" in refused(capsys, "eval", tar, "--model", model_path)
    assert "nothing.tar" in refused(capsys, "train", tmp_path / "nothing.tar", *small, "--out", tmp_path / "run")
    table = write_table(tmp_path / "table")
    assert "title is missing" in refused(capsys, "train", table, "--caption-column", "title", *small)
    assert "expected --task" in refused(capsys, "eval", table, "--task", "linear", "--model", model_path)
    assert "gone.txt" in refused(capsys, "eval", table, "--classes", tmp_path / "gone.txt", "--model", model_path)
    (tmp_path / "run2").mkdir()
    assert "end of the training" in refused(capsys, "train", table, "--out", tmp_path / "run2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.tar", "run2", "table"]


def test_nowhere_to_write(capsys, tmp_path, model_path):
    """The tests may run as root, whom no permission stops: a file stands where the folder should be."""
    (tmp_path / "taken").write_text("mine")
    table = write_table(tmp_path / "table")
    small = ["--model", json.dumps(SIZES), "--steps", 2, "--batch-size", 4, "--device", "cpu"]
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        expected = f"expected a folder that can be written at {out}"
        assert expected in refused(capsys, "train", table, *small, "--out", out)
        assert expected in refused(capsys, "embed", table, out, "--model", model_path)
    assert (tmp_path / "taken").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        run("classify", tmp_path / "none.png", "a dog", "--debug")


def test_an_interrupt_is_no_error(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", interrupted)
    assert run("info") == 130 and "Traceback" not in capsys.readouterr().err
