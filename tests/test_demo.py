"""demo/__main__.py and demo/report.py on coloured squares: every figure from a run of seconds. No network."""

import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from torch import nn

import demo.__main__ as demo_main
from clipfast.tokenizer import default_tokenizer
from clipfast.train import TrainConfig
from demo import emoji, report
from demo.emoji import Concept, Drawings

NAMES = (
    "apple", "bird", "cat", "dog", "egg", "fish", "goat", "hat", "ink", "jam", "kite", "lamp",
    "moon", "nest", "owl", "pig", "queen", "rain", "star", "tree", "urn", "vase", "wolf", "yarn",
)  # fmt: skip
GROUPS = ("things", "beings", "flags")
COLOURS = torch.cartesian_prod(*[torch.tensor([20, 130, 240])] * 3)[: len(NAMES)].to(torch.uint8)  # of each concept
UNSEEN = range(18, 24)
TINY = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None,
    "context_length": 16, "vocab_size": 49408, "transformer_width": 32, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip


def concept(index: int) -> Concept:
    return Concept(f"{index:X}", NAMES[index], (), GROUPS[index % 3], "all", f"{index:X}", index in UNSEEN)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prepared shards in which every style draws each concept as a square of the concept's colour."""
    root = tmp_path_factory.mktemp("data")
    pngs = {}
    for index, colour in enumerate(COLOURS):
        pixels = np.zeros((emoji.SIZE, emoji.SIZE, 4), np.uint8)
        pixels[4:-4, 4:-4] = [*colour.tolist(), 255]
        content = BytesIO()
        Image.fromarray(pixels).save(content, "png")
        pngs[f"{index:X}"] = content.getvalue()
    styles = ("noto", "twemoji", emoji.UNSEEN_STYLE)
    emoji._write_shards(root / "shards", dict.fromkeys(styles, pngs), {f"{i:X}": concept(i) for i in range(len(NAMES))})
    return root


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    run = {"steps": 60, "max_seconds": 300.0, "batch_size": 16, "lr": 3e-3, "precision": "fp32"}
    return TrainConfig(TINY, str(tmp_path / "run"), **run, tensorboard=False, progress=False)


def test_a_run_learns_and_leaves_every_file(data: Path, config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    """From the command line on; only the recipe is smaller."""
    out = tmp_path / "out"
    monkeypatch.setattr(emoji, "DATA", data)
    monkeypatch.setattr(demo_main, "recipe", lambda where, seconds: replace(config, out=where, max_seconds=seconds))
    assert demo_main.main(["--seconds", "60", "--out", str(out)]) == 0

    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    pictures = {f"{name}.png" for name in ("learning_curve", "named_seen", "named_unseen", "retrieval", "confusion")}
    assert set(re.findall(r'src="([^"]+)"', page)) == pictures
    # what the training wrote aside is gone
    assert {path.name for path in out.iterdir()} == pictures | {"report.html", "results.json", "model.pt", "log.jsonl"}
    for name in pictures:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5, f"{name} is empty"
    assert (data / "shards" / "ATTRIBUTION.txt").read_text().splitlines()[0] in page

    assert printed.rstrip().endswith(f"report: {out / 'report.html'}")
    for row in results["accuracy"]:
        both = f"{row['top1']:.1%} / {row['top5']:.1%}".replace("% /", " /")
        assert both in printed and both in page
        assert 0 <= row["top1"] <= row["top5"] <= 1
    seen = results["accuracy"][0]
    assert seen["top5"] > 0.7, "18 plain colours are learned in 60 steps (chance: 0.21)"
    assert seen["pixels_top1"] == 1 and results["accuracy"][2]["pixels_top5"] == 0
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert results["steps"] == len(losses) == 60 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    curve = np.array(results["curve"])
    assert np.all(np.diff(curve[:, 0]) >= 0) and curve[-1, 0] == pytest.approx(results["seconds"])


def test_batches_pair_each_drawing_with_its_own_name(data: Path, config: TrainConfig, monkeypatch):
    monkeypatch.setattr(emoji, "augment", lambda rgba, resolution, generator: emoji.flatten(rgba, resolution))
    make = demo_main.batches(emoji.load("train", data), config)
    colours = emoji.normalize(COLOURS.float()[:, :, None, None] / 255)[..., 0, 0]
    stream, met = make(0), set()
    for _ in range(6):
        batch = next(stream)
        concepts = torch.cdist(batch.pixels[:, :, 16, 16], colours).argmin(1).tolist()
        assert len(set(concepts)) == len(concepts) == 16, "a concept comes twice in a batch"
        for index, tokens, length in zip(concepts, batch.tokens, batch.lengths, strict=True):
            assert NAMES[index] in re.findall(r"\w+", default_tokenizer().decode(tokens[1 : length - 1].tolist()))
        met |= set(concepts)
    assert met == set(range(18)), "all concepts but the unseen ones take part"


def test_batches_go_on_from_any_step(data: Path, config: TrainConfig):
    make = demo_main.batches(emoji.load("train", data), config)
    stream = make(0)
    first, *_, fifth = [next(stream) for _ in range(5)]
    again = next(make(4))
    assert torch.equal(again.pixels, fifth.pixels) and torch.equal(again.tokens, fifth.tokens)
    assert not torch.equal(first.pixels, fifth.pixels)
    stream = demo_main.batches(emoji.load("train", data), replace(config, batch_size=8))(0)  # two of one pass
    assert not torch.equal(next(stream).pixels[:, :, 0, 0], next(stream).pixels[:, :, 0, 0]), "the same backgrounds"
    with pytest.raises(ValueError, match="at least 32 concepts .* got 18"):
        demo_main.batches(emoji.load("train", data), replace(config, batch_size=32))


class Oracle(nn.Module):
    """Sees the concept of a square at once: its features are one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale, self.visual = nn.Parameter(torch.zeros(())), nn.Module()
        self.visual.input_resolution = 32

    def encode_image(self, pixels, normalize):
        colours = emoji.normalize(COLOURS.float()[:, :, None, None] / 255)[..., 0, 0]
        return torch.eye(len(NAMES))[torch.cdist(pixels[:, :, 16, 16], colours).argmin(1)]


def test_accuracies_are_counted_among_the_right_names(data: Path):
    splits = {split: emoji.load(split, data) for split in emoji.SPLITS}
    tests = {kind: splits[kind] for kind in ("seen", "unseen")}
    classifier = torch.eye(len(NAMES))
    classifier[0], classifier[1] = classifier[1].clone(), classifier[0].clone()  # takes concepts 0 and 1 for each other
    rows = demo_main.measure(Oracle(), classifier, splits["train"], tests)
    # flags are the concepts 2, 5, ..., 23: six of the 18 seen, two of the six unseen
    counts = [(row["concepts"], row["flags"], row["drawings"], row["names"]) for row in rows]
    assert counts == [("seen", True, 18, 24), ("seen", False, 12, 16), ("unseen", True, 6, 6), ("unseen", False, 4, 4)]
    assert [row["top1"] for row in rows] == pytest.approx([16 / 18, 10 / 12, 1, 1])
    assert [row["chance_top5"] for row in rows] == pytest.approx([5 / 24, 5 / 16, 5 / 6, 1])
    assert [row["pixels_top1"] for row in rows] == [1, 1, 0, 0]


def squares(concepts: list[int]) -> Drawings:
    rgba = torch.full((len(concepts), emoji.SIZE, emoji.SIZE, 4), 255, dtype=torch.uint8)
    return Drawings(rgba, torch.tensor(concepts), ["noto"] * len(concepts), [concept(i) for i in range(len(NAMES))])


def test_sheet_marks_the_right_name_and_its_rank():
    logits = torch.full((1, len(NAMES)), -20.0)
    logits[0, [7, 3, 9]] = torch.tensor([0.5, 0.3, 0.2]).log()
    figure = report.sheet(report.Shown(squares([3]), logits, {}), torch.tensor([True]), torch.arange(len(NAMES)), 4)
    bars = figure.axes[1]
    assert (bars.get_title("left"), bars.get_title("right")) == ("dog", "rank 2")
    assert [text.get_text() for text in bars.texts][:6] == ["hat", "50%", "dog", "30%", "jam", "20%"]
    assert [bar.get_width() for bar in bars.patches][:3] == pytest.approx([0.5, 0.3, 0.2], abs=1e-4)
    green = [bar.get_facecolor() == to_rgba(report.RIGHT) for bar in bars.patches]
    assert green == [False, True, False, False, False]


def test_sheet_chooses_among_the_given_names_only():
    logits = torch.zeros(1, len(NAMES))
    logits[0, 7], logits[0, 20] = 9, 5
    figure = report.sheet(report.Shown(squares([20]), logits, {}), torch.tensor([True]), torch.tensor([*UNSEEN]), 4)
    assert figure.axes[1].get_title("right") == "rank 1"
    assert "hat" not in [text.get_text() for text in figure.axes[1].texts]


def test_confusion_shares_the_drawings_of_a_group():
    shown = report.Shown(squares([0, 3, 6, 9, 1]), torch.eye(len(NAMES))[[0, 3, 6, 1, 1]], {})
    axes = report.confusion(shown, torch.tensor([True] * 4 + [False])).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0, 0]]  # the last is not asked for
    assert [text.get_text() for text in axes.texts] == ["75%", "25%"]
    assert axes.get_yticklabels()[0].get_text() == "things (4)"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_is_refused(seconds: str, tmp_path: Path, capsys):
    assert demo_main.main(["--seconds", seconds, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("demo: error: expected --seconds above 0")
    assert not (tmp_path / "out").exists()


def test_a_failing_preparation_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys):
    def fail(root: Path) -> Path:
        raise RuntimeError("package x: npm cannot fetch it; check the network")

    monkeypatch.setattr(emoji, "prepare", fail)
    assert demo_main.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "demo: error: package x: npm cannot fetch it; check the network\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError):
        demo_main.main(["--out", str(tmp_path / "out"), "--debug"])


def test_interrupted_training_leaves_the_earlier_report(tmp_path: Path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "report.html").write_text("earlier")
    monkeypatch.setattr(emoji, "prepare", lambda root: root)
    monkeypatch.setattr(demo_main, "run", interrupt)
    assert demo_main.main(["--out", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
