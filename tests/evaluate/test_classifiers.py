"""Top-1 and top-5 of classifiers, over every kind of source, and by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipfast.cli import main
from clipfast.data import DataConfig
from clipfast.data.sources import from_arrays, read_folder
from clipfast.evaluate.classifiers import classifier_source
from clipfast.inputs import Preprocess
from clipfast.interop.timm_classifiers import class_names, load_classifier
from tests.data.test_data import png, write_shards, write_tar
from tests.interop.test_timm_classifiers import renamed, tiny

PREPROCESS = Preprocess(8)
ANIMALS = ["cow", "hen", "cat", "ant", "dog", "fly", "pig"]
NUMBERS = [3, 60, 200, 9, 100, 150, 31]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))


def expected(model: nn.Module, targets: list[int], numbers: list[int] = NUMBERS, preprocess=PREPROCESS) -> dict[str, float]:
    """Ranks by counting: outputs that are higher, or as high and before."""
    hits = {1: 0, 5: 0}
    for number, target in zip(numbers, targets, strict=True):
        with torch.no_grad():
            logits = model(preprocess(png(number))[None])[0].tolist()
        rank = sum(logit > logits[target] or (logit == logits[target] and i < target) for i, logit in enumerate(logits))
        hits = {k: hits[k] + (rank < k) for k in hits}
    return {f"top{k}": hits[k] / len(numbers) for k in hits} | {"images": len(numbers), "classes": len(logits)}


def write_folders(root: Path, names: list[str], numbers: list[int] = NUMBERS) -> None:
    for name, number in zip(names, numbers, strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.png").write_bytes(png(number))


@pytest.mark.parametrize(
    ("names", "classes", "targets"),
    [
        ("g f e d c b a", "", [6, 5, 4, 3, 2, 1, 0]),  # in sorted order, all of them
        ("dog cat dog cow dog cat cat", " ".join(ANIMALS), [4, 2, 4, 0, 4, 2, 2]),
        ("5 0 6 0 05 2 1", "", [5, 0, 6, 0, 5, 2, 1]),
        ("cat 0 cat 6 cat 2 1", " ".join(ANIMALS), [2, 0, 2, 6, 2, 2, 1]),
    ],
)
def test_a_folder(model, tmp_path, names: str, classes: str, targets: list[int]) -> None:
    write_folders(tmp_path, names.split())
    got = classifier_source(model, PREPROCESS, read_folder(tmp_path), classes.split(), batch_size=3)
    assert got == pytest.approx(expected(model, targets)) and model.training


def test_names_in_any_order_and_dropout(model) -> None:
    """Of as many names as outputs the sorted place counts, not the one at which a name came first; nothing is dropped."""
    dropping = nn.Sequential(nn.Dropout(0.9), model)
    images = [png(number) for number in NUMBERS]
    got = classifier_source(dropping, PREPROCESS, from_arrays(images, list("cgafbed")))
    assert got == pytest.approx(expected(model, [2, 6, 0, 5, 1, 4, 3])) and dropping.training


def test_shards_and_tables(model, tmp_path) -> None:
    targets, files, lines = [4, 2, 4, 0, 6, 2, 2], {}, ["file;label"]
    for place, (number, target) in enumerate(zip(NUMBERS, targets, strict=True)):
        files |= {f"{place}.png": png(number), f"{place}.cls": str(target).encode()}
        (tmp_path / f"{place}.png").write_bytes(png(number))
        lines.append(f"{place}.png;{ANIMALS[target]}")
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    shards = DataConfig(str(tmp_path / "0.tar")).open()
    table = DataConfig(str(tmp_path / "labels.csv"), image_column="file", caption_column="label").open()
    wanted = pytest.approx(expected(model, targets))
    assert classifier_source(model, PREPROCESS, shards) == wanted
    assert classifier_source(model, PREPROCESS, table, ANIMALS) == wanted


def test_equal_logits_and_few_outputs(model, tmp_path) -> None:
    write_folders(tmp_path, [str(number) for number in range(7)])
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    got = classifier_source(model, PREPROCESS, read_folder(tmp_path))
    assert got == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "images": 7, "classes": 7})
    many = nn.Sequential(nn.Flatten(), nn.Linear(192, 300))
    nn.init.zeros_(many[1].weight), nn.init.zeros_(many[1].bias)
    got = classifier_source(many, PREPROCESS, read_folder(tmp_path))
    assert got == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "images": 7, "classes": 300})
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert classifier_source(two, PREPROCESS, from_arrays([png(3)], ["1"]))["top5"] == 1


@pytest.mark.parametrize(
    ("label", "classes", "message"),
    [
        ("owl", "", "expected every class among the 7 outputs, by number or name, got 'owl' .1 of 1 classes."),
        ("7", "", "got '7'"),
        ("owl", "a b c d e f g", "got 'owl'"),
        ("a", "a b", "expected a name for each of the 7 outputs, got 2"),
        ("a", "a b c d e f f", "expected a name for each of the 7 outputs, got 6"),
        (None, "", "expected the class of every image .* but 0 has none"),
    ],
)
def test_labels_that_cannot_be_told(model, label, classes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier_source(model, PREPROCESS, from_arrays([png(3)], [label]), classes.split())
    assert model.training


def test_what_is_no_classifier_and_no_data(model, tmp_path) -> None:
    nn.init.constant_(model[1].bias, torch.nan)
    for broken in (model, nn.Sequential(nn.Conv2d(3, 7, 8))):
        with pytest.raises(ValueError, match=r"expected finite logits \[1, classes\]"):
            classifier_source(broken, PREPROCESS, from_arrays([png(3)], ["1"]))
    with pytest.raises(ValueError, match="expected images to evaluate on, got none"):
        classifier_source(model, PREPROCESS, from_arrays([], []))
    with pytest.raises(ValueError, match="0000 has none"):
        classifier_source(model, PREPROCESS, DataConfig(write_shards(tmp_path, 1, 1, {"0000.txt": None})).open())


def test_the_command(tmp_path, capsys, caplog) -> None:
    """A file of MMPretrain's on folders of names: what is printed and written is what the model gives."""
    data, classes, out = tmp_path / "data", tmp_path / "classes.txt", tmp_path / "out"
    write_folders(data, ["dog", "cat", "dog", "cow", "dog", "cat", "cat"])
    (data / "cat" / "broken.png").write_bytes(b"no image")
    classes.write_text("cow\tox\nhen\ncat\nant\ndog\nfly\npig\n")
    save_file(renamed(tiny().state_dict()), tmp_path / "clip.safetensors")
    given = ["eval", str(data), "--task", "classify", "--checkpoint", str(tmp_path / "clip.safetensors"), "--device", "cpu"]
    assert main([*given, "--classes", str(classes), "--out", str(out), "--max-bad", "0.2"]) == 0
    model, preprocess = load_classifier(tmp_path / "clip.safetensors", "cpu")
    wanted = expected(model, [4, 2, 4, 0, 4, 2, 2], preprocess=preprocess)
    told = {"task": "classify", "model": given[5], "data": str(data)}
    assert json.loads((out / "results.json").read_text()) == told | wanted
    printed = capsys.readouterr()
    assert f"top1{wanted['top1']:25.2%}" in printed.out and f"images{7:21}" in printed.out
    assert "broken.png" in caplog.text and "images" in printed.err
    assert main([*given, "--classes", str(classes)]) == 2  # one of eight images is more than a tenth
    assert "broken.png" in capsys.readouterr().err
    assert main([*given, "--max-bad", "0.2"]) == 2
    assert "expected every class among the 7 outputs" in capsys.readouterr().err
    assert main([*given[:4], "--device", "cpu"]) == 2
    assert "or timm's name of a model that has some (timm.list_pretrained()), got 'ViT-B/32'" in capsys.readouterr().err


def test_imagenets_folders(tmp_path) -> None:
    """Of 1,000 outputs each is known by ImageNet's name of its folder."""

    class Known(nn.Module):
        """Gives the class that an image's colour says."""

        num_classes = 1000

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.stack([PREPROCESS(png(n)).flatten() for n in NUMBERS]))

        def forward(self, x: Tensor) -> Tensor:
            near = (x.flatten(1)[:, None] - self.table).pow(2).sum(-1).argmin(1)
            return nn.functional.one_hot(torch.arange(100, 107)[near], 1000).float()

    model = Known()
    names = class_names(model)
    write_folders(tmp_path, [names[100 + i] for i in range(7)])
    got = classifier_source(model, PREPROCESS, read_folder(tmp_path), names)
    assert got == {"top1": 1, "top5": 1, "images": 7, "classes": 1000}
