"""The whole demo in seconds: drawings of one colour made here, a few updates, every file that the report promises."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from demo import __main__ as demo
from demo import emoji, report
from demo.settings import CHOICES, LARGE, SMALL, described, settings, speed
from tests.demo.test_emoji import root  # noqa: F401 - the fixture: packages of thirty-three drawings in each style


@pytest.fixture
def small(tmp_path: Path) -> demo.TrainConfig:
    config = demo.recipe(str(tmp_path / "training"), 300.0)
    (tmp_path / "training").mkdir()
    return replace(config, steps=4, max_seconds=20.0, batch_size=8, progress=False)


def test_a_run_leaves_the_report_and_a_model_that_loads(
    root: Path,  # noqa: F811
    tmp_path: Path,
    small: demo.TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "speed", lambda config, batches: 950.0)
    emoji.prepare(root)
    out = tmp_path / "out"
    out.mkdir()
    results = demo.run(small, root, out)

    written = {path.name for path in out.iterdir()}
    assert written >= {"report.html", "results.json", "model.pt", "log.jsonl", "learning_curve.png", "confusion.png"}
    assert written >= {"named_seen.png", "named_unseen.png", "retrieval.png"}
    html = (out / "report.html").read_text()
    for picture in out.glob("*.png"):
        assert f'src="{picture.name}"' in html
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.std() > 3, f"{picture.name} is empty"
    assert "Microsoft" in html and "CC" in html  # whose drawings these are

    kept = json.loads((out / "results.json").read_text())
    assert kept["accuracy"] == results["accuracy"] and kept["steps"] == 4
    chosen = settings(950.0)
    assert kept["settings"] == chosen._asdict() | {"measured_pairs_per_second": 950.0, "told": described(chosen, 950.0)}
    assert kept["config"]["model"]["transformer_layers"] == chosen.blocks
    assert kept["settings"]["told"] in report.table(results) and "950 measured" in html
    for row in results["accuracy"]:
        assert 0 <= row["top1"] <= row["top5"] <= 1 and row["chance_top1"] == pytest.approx(1 / row["names"])
        assert row["concepts"] == "seen" or row["pixels_top5"] == 0  # nearest pixels can name nothing unseen
    text = report.table(results)
    assert "seen concepts" in text and "unseen concepts" in text
    for better in (False, True):  # than the nearest pixels, which the page says as the terminal does
        row = results["accuracy"][0] | {"top1": 0.3 + better / 10, "pixels_top1": 0.35, "top5": 0.6, "pixels_top5": 0.5}
        told = results | {"accuracy": [row, *results["accuracy"][1:]]}
        assert [("NOT better" in made) for made in (report.table(told), report._page(told, ""))] == [not better] * 2

    model, preprocess = clipfast.load(str(out / "model.pt"), device="cpu")
    drawings = emoji.load("seen", root)
    again = demo.encode(model, drawings)
    assert torch.isfinite(again).all() and preprocess.resolution == 48
    assert torch.allclose(again.norm(dim=-1), torch.ones(len(again)), atol=1e-5)


def test_batches_hold_a_concept_once_and_depend_on_their_step_alone(root: Path, small: demo.TrainConfig) -> None:  # noqa: F811
    emoji.prepare(root)
    drawings = emoji.load("train", root)
    batches = demo.batches(drawings, small)
    labels = {tuple(clipfast.tokenize(t.format(c.label), 32)[0].tolist()): c.label
              for c in drawings.concepts for t in emoji.TRAIN_TEMPLATES}  # fmt: skip
    stream = batches(0)
    for step in range(5):
        batch = next(stream)
        named = [labels[tuple(row.tolist())] for row in batch.tokens]
        assert len(set(named)) == small.batch_size, "a caption fits two drawings of one batch"
        again = next(batches(step))
        assert torch.equal(batch.pixels, again.pixels) and torch.equal(batch.tokens, again.tokens)
        assert torch.equal(batch.lengths, batch.tokens.argmax(dim=1) + 1)


def test_too_few_concepts_are_named(root: Path, small: demo.TrainConfig) -> None:  # noqa: F811
    emoji.prepare(root)
    with pytest.raises(ValueError, match="expected at least 128 concepts"):
        demo.batches(emoji.load("train", root), replace(small, batch_size=128))


def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--seconds", "0"]) == 2
    assert capsys.readouterr().err == "demo: error: expected --seconds above 0, got 0.0\n"


def test_settings_grow_with_the_speed_and_depend_on_it_alone() -> None:
    speeds = np.geomspace(300, 5000, 60).tolist()
    chosen = [settings(own) for own in speeds]
    assert chosen == [settings(own) for own in speeds]
    assert {*chosen} == {*CHOICES} and len({own.name for own in CHOICES}) == len(CHOICES)
    for slower, faster in zip(chosen, chosen[1:], strict=False):
        assert slower.least <= faster.least and slower.blocks <= faster.blocks
        assert slower.small >= faster.small
    for own, found in zip(speeds, chosen, strict=True):
        assert found.least <= own and not any(found.least < other.least <= own for other in CHOICES)
        assert 0 <= found.small < 1, "a model that is asked at 48 pixels must have learned at 48 pixels"
        assert f"{own:,.0f} measured" in described(found, own)
    assert settings(0.1) == CHOICES[0] and settings(1e6) == CHOICES[-1]
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected pairs_per_second above 0"):
            settings(bad)


def test_the_speed_is_that_of_the_updates_behind_the_first(root: Path, small: demo.TrainConfig) -> None:  # noqa: F811
    emoji.prepare(root)
    config, began = replace(small, steps=0), time.perf_counter()
    found = speed(config, demo.batches(emoji.load("train", root), config))
    assert 8 * config.batch_size / (time.perf_counter() - began) < found < float("inf")
    assert not any(Path(config.out).iterdir())


def test_drawings_have_few_pixels_first_and_the_models_in_the_end(root: Path, small: demo.TrainConfig) -> None:  # noqa: F811
    emoji.prepare(root)
    drawings = emoji.load("train", root)
    watch = demo.Watch(drawings, 100.0, None, 0.6)  # type: ignore[arg-type]
    stream = demo.batches(drawings, small, watch.side)(0)
    sides = []
    for seconds in (0.0, 59.9, 60.0, 99.0):
        watch.seconds = seconds
        sides.append(next(stream).pixels.shape[-1])
    assert sides == [SMALL, SMALL, LARGE, LARGE] and watch.until == 60
    assert next(demo.batches(drawings, small)(0)).pixels.shape[-1] == LARGE  # of its own accord a batch has the model's


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_the_weights_fit_both_sides(small: demo.TrainConfig, side: int) -> None:
    model = clipfast.CLIP(**small.model).eval()  # type: ignore[arg-type]
    assert model.encode_image(torch.zeros(2, 3, side, side)).shape == (2, 128)
