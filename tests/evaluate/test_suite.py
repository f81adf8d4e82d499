"""A suite of models, data sets and tasks, and the tasks one by one, against scikit-learn and counting."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix

from clipfast.cli import main
from clipfast.data.sources import read_folder
from clipfast.evaluate import encode_texts, metrics, retrieval_source, zero_shot_source
from clipfast.evaluate.datasets import EvalSet, class_weights
from clipfast.evaluate.features import unprojected
from clipfast.evaluate.figures import overlap_table, page
from clipfast.evaluate.multilabel import multilabel_probe
from clipfast.evaluate.overlap import overlaps
from clipfast.evaluate.suite import Suite, best, run_suite, table
from clipfast.evaluate.tasks import Bench
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.weights import export

SIZES = {
    "embed_dim": 16, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip
PREPROCESS = Preprocess(32)
ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**SIZES).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """train, test and shift as folders a class, with class names and templates beside them."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4), ("shift", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    (root / "classnames.txt").write_text("red\ngreen\tlawn\nblue\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {}.\n{c} paint\n")
    return root


def colours(root: Path, **fields: object) -> EvalSet:
    return EvalSet("colours", str(root), **fields)  # type: ignore[arg-type]


def test_zero_shot_by_hand(model: CLIP, root: Path) -> None:
    """Its ensemble, score, subset, calibration and confusion matrix, image by image."""
    names = ["red", "lawn", "blue"]
    weights = [encode_texts(model, [f"a photo of a {name}.", f"{name} paint"]).mean(0) for name in names]
    weights = torch.stack([own / own.norm() for own in weights])
    files, scores = sorted((root / "test").rglob("*.png")), []
    for file in files:
        with torch.no_grad():
            image = model.encode_image(PREPROCESS(file)[None], normalize=True)[0]
            scores.append((model.logit_scale.exp() * weights @ image).tolist())
    right = [[*COLOURS].index(file.parent.name) for file in files]
    guessed = [max(range(3), key=own.__getitem__) for own in scores]
    found = Bench(model, PREPROCESS, colours(root)).zero_shot(calibration=True, confusion=True)
    assert found["score"] == found["top1"] == accuracy_score(right, guessed)
    assert found["confusion"] == confusion_matrix(right, guessed, labels=[0, 1, 2]).tolist()
    expected = metrics.calibration_error(torch.tensor(scores).softmax(1).numpy(), np.array(right))
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-5)
    assert found["names"] == names and found["images"] == 12
    part = [(own[0] < own[2], place == 2) for own, place in zip(scores, right, strict=True) if place != 1]
    found = Bench(model, PREPROCESS, colours(root)).zero_shot(["blue", "red"])
    assert found["score"] == np.mean([guess == blue for guess, blue in part]) and found["images"] == 8


def test_prompts_by_class(model: CLIP, root: Path, tmp_path: Path) -> None:
    """Prompts of each class's own, of unequal number, and a list in JSON."""
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"red": ["blood", "a {}"], "lawn": ["grass"], "blue": ["sky", "sea", "jeans"]}))
    weights = class_weights(model, ["red", "lawn", "blue"], colours(root, templates=str(file)).prompts())
    own = encode_texts(model, ["blood", "a red"]).mean(0)
    torch.testing.assert_close(weights[0], own / own.norm())
    torch.testing.assert_close(weights[1], encode_texts(model, ["grass"])[0])
    with pytest.raises(ValueError, match=r"expected prompts of every class, got none of \['pink'\]"):
        class_weights(model, ["red", "pink"], {"red": ["a"]})
    file.write_text('["the {}", "{c}"]')
    assert colours(root, templates=str(file)).prompts() == ["the {}", "{c}"]


@pytest.mark.parametrize("layers", [1, (1, 1, 1, 1)])
def test_features_before_the_projection(layers: int | tuple[int, ...]) -> None:
    """Projected by hand they are the model's own, and the model is as it was before."""
    torch.manual_seed(0)
    width = 64 if layers == 1 else 8
    model = CLIP(**SIZES | {"vision_layers": layers, "vision_width": width}, vision_heads=None if layers == 1 else 4).eval()
    pixels, before = torch.randn(2, 3, 32, 32), [*model.state_dict()]
    with torch.no_grad():
        whole = model.encode_image(pixels)
        with unprojected(model) as width:
            found = model.encode_image(pixels)
        assert found.shape == (2, width)
        mine = found @ model.visual.proj if layers == 1 else model.visual.attnpool.c_proj(found)
        torch.testing.assert_close(mine, whole)
        torch.testing.assert_close(model.encode_image(pixels), whole)
    assert sorted(model.state_dict()) == sorted(before)


def test_several_labels_against_scikit_learn() -> None:
    """VOC2007's: a regression for each class, the 11-point mAP of their scores; -1 rows are left out of their class."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(90, 6))
    labels = (features @ rng.normal(size=(6, 3)) + rng.normal(size=(90, 3)) > 0).astype(int)
    labels[:5, 0] = -1
    train, test = (features[:60], labels[:60]), (features[60:], labels[60:])

    def score(scores: np.ndarray, relevant: np.ndarray) -> float:
        return metrics.mean_average_precision(scores, relevant, points=11)

    probe = multilabel_probe(train, test, penalty=0.5, score=score, names=["a", "b", "c"])
    logits = []
    for own in range(3):
        kept = train[1][:, own] >= 0
        fitted = LogisticRegression(C=2.0, tol=1e-8, max_iter=1000).fit(train[0][kept], train[1][kept, own])
        logits.append(fitted.decision_function(test[0]))
    np.testing.assert_allclose(probe.head.logits(test[0]).numpy(), np.stack(logits, 1), atol=2e-3)
    assert probe.score == pytest.approx(score(np.stack(logits, 1), test[1]), abs=0.02)
    searched = multilabel_probe(train, test, score=score, names=["a", "b", "c"])
    assert searched.head.about["penalty"] == max(searched.trials, key=lambda own: (own.score, own.penalty)).penalty
    with pytest.raises(ValueError, match="expected images with and without b in train"):
        multilabel_probe((train[0], np.stack([train[1][:, 0], np.ones(60, int)], 1)), test, score=score, names=["a", "b"])


def test_labels_of_shards(root: Path, model: CLIP, tmp_path: Path) -> None:
    """clip_benchmark's layout of several labels an image: an array in .npy beside it."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, labels in enumerate(([1, 0, 0], [0, 1, 1], [0, 0, 1])):
            file = io.BytesIO()
            np.save(file, np.array(labels))
            png = (root / "test" / "red" / f"{number}.png").read_bytes()
            for field, content in (("png", png), ("npy", file.getvalue())):
                info = tarfile.TarInfo(f"{number}.{field}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = EvalSet("voc", test=str(tmp_path), classes=("a", "b", "c"), metric="map-11")
    bench = Bench(model, PREPROCESS, data)
    assert bench.targets(bench.features("test", True), bench.named(), "test").tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert 0 < bench.zero_shot()["score"] <= 1


SUITE = """
[[dataset]]
name = "colours"
root = "{root}"
tasks = ["zero-shot", "probe", "few-shot"]
[[dataset]]
name = "shifted"
test = "{root}/shift"
classes = "{root}/classnames.txt"
shift_of = "colours"
[[dataset]]
name = "gone"
missing = "its <licence> has to be signed"
[[dataset]]
name = "nowhere"
test = "nothing/here"
"""


def test_a_suite_goes_on(model: CLIP, root: Path, tmp_path: Path) -> None:
    """What cannot be had is a row with its reason; a second run loads nothing; other weights or data are measured anew."""
    (tmp_path / "s.toml").write_text(SUITE.format(root=root))
    suite, loads = Suite.read(tmp_path / "s.toml"), []

    def load(name: str) -> tuple[CLIP, Preprocess]:
        loads.append(name)
        if name == "broken":
            raise ValueError("no such\nmodel")
        return model, PREPROCESS

    rows = run_suite(["a", "broken"], suite, tmp_path / "out", load)
    reasons = {(row["model"], row["dataset"], row["task"]): row.get("reason") for row in rows}
    assert len(rows) == 12 and loads == ["a", "broken"]
    assert reasons["a", "gone", "zero-shot"] == "its <licence> has to be signed"
    assert "nothing/here, found nothing" in str(reasons["a", "nowhere", "zero-shot"])
    assert "expected 16 examples or more of every class, got 6 of 'red'" in str(reasons["a", "colours", "few-shot"])
    assert reasons["broken", "colours", "probe"] == "no such model"
    scores = {(row["dataset"], row["task"]): row["score"] for row in rows if "score" in row}
    assert scores.keys() == {("colours", "zero-shot"), ("colours", "probe"), ("shifted", "zero-shot")}
    assert scores["colours", "probe"] == 1  # colours are told apart by any features

    loads.clear()
    again = run_suite(["a"], suite, tmp_path / "out", load)
    assert [row for row in rows if row["model"] == "a" and "score" in row] == [row for row in again if "score" in row]
    assert loads == ["a"]  # for the few-shot cell that failed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == again
    assert not [*(tmp_path / "out").rglob("*.part")]
    html = page(rows, suite)
    assert html.count("<h2>") == 7 and html.count("<svg") >= 3 and "its &lt;licence&gt;" in html and "Not drawn" in html
    assert f"colours {'zero-shot':10}" in table(rows)


def test_what_a_suite_file_may_not_say(tmp_path: Path) -> None:
    for text, told in (
        ("[[dataset", "expected a TOML file"),
        ("standard = []", r"expected \[\[dataset\]\] tables"),
        ('[[dataset]]\nname = "a"\ntest = "x"\nmetric = "luck"', "expected a metric of accuracy"),
        ('[[dataset]]\nname = "a"\ntest = "x"\ntasks = ["dance"]', r"expected tasks of zero-shot.* got \['dance'\]"),
        ('[[dataset]]\nname = "a"\ntest = "x"\nshots = [0]', r"expected shots of a data set .* got \[0\]"),
        ('[[dataset]]\nname = "a"', "a: expected root, test, or why it is missing"),
        ('[[dataset]]\nname = "a"\ntests = "x"', "expected a data set with a name and fields of"),
        ('[[dataset]]\nname = "a"\ntest = "x"\n' * 2, "expected each data set once"),
    ):
        (tmp_path / "s.toml").write_text(text)
        with pytest.raises(ValueError, match=told):
            Suite.read(tmp_path / "s.toml")


def test_the_paper_has_its_sets() -> None:
    suite = Suite.read("paper")
    kinds = [("retrieval" if "retrieval" in own.tasks else "shift" if own.shift_of else "class") for own in suite.datasets]
    assert [kinds.count(kind) for kind in ("class", "retrieval", "shift")] == [27, 2, 7]
    by_metric = {own.name: own.metric for own in suite.datasets if own.metric != "accuracy"}
    per_class = dict.fromkeys(("Aircraft", "Pets", "Caltech101", "Flowers"), "mean-per-class")
    assert by_metric == per_class | {"VOC2007": "map-11", "Kinetics700": "mean-top1-top5", "HatefulMemes": "roc-auc"}


def test_by_the_command_line(model: CLIP, root: Path, tmp_path: Path, capsys) -> None:
    """A probe's head is saved and classifies; a suite writes its report; bad input is one line and writes nothing."""
    weights, other = str(tmp_path / "m.safetensors"), str(tmp_path / "o.safetensors")
    export(model, weights, "safetensors")
    torch.manual_seed(1)
    export(CLIP(**SIZES), other, "safetensors")
    common = ["eval", str(root / "test"), "--train", str(root / "train"), "--device", "cpu", "--model", weights]
    assert main([*common, "--task", "probe", "--out", str(tmp_path / "head")]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert told["score"] == "100.00%" and 1e-6 <= float(told["penalty"]) <= 1e6
    picture = str(root / "test" / "blue" / "0.png")
    ask = ["classify", picture, "--head", str(tmp_path / "head"), "--device", "cpu", "--model"]
    assert main([*ask, weights]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[1] == "blue"
    assert main([*ask, other]) == 2
    assert "expected the model that the head was fitted on" in capsys.readouterr().err
    assert main([*common, "--task", "few-shot", "--shots", "2,8", "--out", str(tmp_path / "few")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected 8 examples or more of every class, got 6" in error
    assert not (tmp_path / "few").exists()
    (tmp_path / "s.toml").write_text(SUITE.format(root=root))
    assert (
        main(["eval", weights, "--suite", str(tmp_path / "s.toml"), "--out", str(tmp_path / "suite"), "--device", "cpu"]) == 0
    )
    assert "<svg" in (tmp_path / "suite" / "report.html").read_text()


def test_overlap_bias_and_robustness_by_the_command_line(model: CLIP, root: Path, tmp_path: Path, capsys) -> None:
    weights = str(tmp_path / "m.safetensors")
    export(model, weights, "safetensors")
    common = ["--device", "cpu", "--model", weights, "--out", str(tmp_path / "out"), "--task"]
    test = str(root / "test")
    results = tmp_path / "out" / "results.json"
    assert main(["eval", test, *common, "overlap", "--train", test, "--similarity", "0.9999"]) == 0
    own = json.loads(results.read_text())["sets"][0]
    assert (own["images"], own["overlapping"], own["clean"], own["all"]) == (12, 12, None, own["overlap"])

    assert (tmp_path / "out" / "duplicates.png").exists() and Image.open(tmp_path / "out" / "duplicates.png").size[0] > 500
    assert main(["eval", test, *common, "overlap", "--train", str(root / "train"), "--hash-bits", "0"]) == 0
    found = json.loads(results.read_text())
    assert found["score"] == 0 and found["pairs"] == []
    shutil.copytree(root / "train", tmp_path / "seen")
    copy = Image.open(root / "test" / "blue" / "1.png").resize((40, 40))
    copy.save(tmp_path / "seen" / "blue" / "copy.png")
    assert main(["eval", test, *common, "overlap", "--train", str(tmp_path / "seen"), "--hash-bits", "8"]) == 0
    pairs = json.loads(results.read_text())["pairs"]
    assert [(own["test"], own["train"]) for own in pairs] == [("blue/1.png", "blue/copy.png")] and pairs[0]["alike"] <= 8

    names = [f"{name}/0.png" for name in COLOURS]
    rows = [f"{root}/test/{name},{'warm' if name[0] == 'r' else 'cold'}" for name in names]
    (tmp_path / "faces.csv").write_text("\n".join(["path,tone", *rows]))
    given = {"designs": {"two": ["red", "blue"], "three": ["red", "blue", "thief"]}, "groups": {"crime": ["thief"]}}
    (tmp_path / "d.json").write_text(json.dumps(given))
    faces = str(tmp_path / "faces.csv")
    assert main(["eval", faces, *common, "bias", "--designs", str(tmp_path / "d.json")]) == 0
    shares = {(own["design"], own["value"]): own for own in json.loads(results.read_text())["shares"]}
    features = torch.stack([model.encode_image(PREPROCESS(root / "test" / name)[None])[0] for name in names]).detach()
    prompts = [f"a photo of a {name}." for name in given["designs"]["three"]]
    hits = (features @ encode_texts(model, prompts).T).argmax(1) == 2
    assert shares["three", "cold"]["hits"] == int(hits[1:].sum()) and shares["three", "cold"]["images"] == 2
    assert shares["three", "warm"]["hits"] == int(hits[0]) and shares["two", "all"]["hits"] == 0

    assert (tmp_path / "out" / "bias.svg").read_text().count("<rect") == 2 + 2 * 3  # a legend; all, cold and warm

    points = ["a,0.5,0.3,1", "b,0.6,0.4,1", "c,0.7,0.5,1", "d,0.7,0.6,0"]
    (tmp_path / "r.csv").write_text("\n".join(["model,accuracy,shifted,standard", *points]))
    assert main(["eval", str(tmp_path / "r.csv"), *common, "robustness"]) == 0
    found = json.loads(results.read_text())
    x, y = (np.log(np.array(own) / (1 - np.array(own))) for own in ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5]))
    slope, intercept = np.polyfit(x, y, 1)
    promised = 1 / (1 + np.exp(-(slope * x[2] + intercept)))
    assert found["models"][3]["effective"] == pytest.approx(0.6 - promised)
    capsys.readouterr()
    assert main(["eval", test, *common, "bias", "--designs", str(tmp_path / "d.json")]) == 2
    assert "expected a .csv or .tsv" in capsys.readouterr().err


def test_who_counts_as_best() -> None:
    """The paper's bold figures: the highest, and what lies within its interval of 99.5 %."""
    points = [("a", 0.9, [0.85, 0.94]), ("b", 0.85, [0.8, 0.9]), ("c", 0.8499, [0.8, 0.9]), ("d", None, None)]
    rows = [{"model": name, "dataset": "x", "task": "probe"} | ({"score": score, "interval": own} if own else {"reason": "no"})
            for name, score, own in points]  # fmt: skip
    assert best(rows) == ["a", "b"]
    assert best([{"model": "a", "score": 0.5}, {"model": "b", "score": 0.6}]) == ["b"] and best(rows[:1]) == []
    told = table(rows).splitlines()
    assert told[1].split()[2:] == ["90.00%", "*", "85.00%", "*", "84.99%", "-"] and told[2].startswith("* the highest")


def test_one_split_under_two_names_is_refused(model: CLIP, root: Path) -> None:
    bench = Bench(model, PREPROCESS, colours(root, train=str(root / "test")))
    for task in ("probe", "few-shot"):
        with pytest.raises(ValueError, match="expected other images in train than in test, got the same 12 in both"):
            bench.run(task)


@pytest.mark.parametrize("predicts", ["words", "caption"])
def test_a_model_that_predicts_captions(root: Path, predicts: str) -> None:
    """Figure 2's rivals: the class whose prompt is the likeliest, as `zero_shot_source` has it."""
    torch.manual_seed(0)
    model = CLIP(**SIZES, predicts=predicts).eval()
    found = Bench(model, PREPROCESS, colours(root, templates=("a {}", "the {}"))).run("zero-shot")
    named = {"red": "red", "green": "lawn", "blue": "blue"}
    expected = zero_shot_source(model, PREPROCESS, read_folder(root / "test"), named, ["a {}", "the {}"])
    assert {name: found[name] for name in ("top1", "top5")} == {name: expected[name] for name in ("top1", "top5")}
    assert 0 <= found["contextless"] <= 1 and len(found["example"]["guesses"]) == 3


def test_classes_and_images_that_do_not_meet(model: CLIP, root: Path, caplog) -> None:
    """A class without an image is told and counts as one to choose; an image without a class is an error."""
    names = ("red", "green", "blue", "pink")
    found = Bench(model, PREPROCESS, colours(root, classes=names)).zero_shot()
    assert caplog.messages == ["colours: 1 of 4 classes have no image: pink"] and found["classes"] == 4
    with pytest.raises(ValueError, match=r"expected classes among the 2 named, got \['blue'\]"):
        Bench(model, PREPROCESS, colours(root, classes=names[:2])).zero_shot()
    with pytest.raises(ValueError, match=r"expected a place for the class name"):
        Bench(model, PREPROCESS, colours(root, templates=("a photo",))).zero_shot()
    with pytest.raises(ValueError, match=r"expected a subset of its classes, got \['pink'\]"):
        Bench(model, PREPROCESS, colours(root)).zero_shot(["pink"])
    caplog.clear()
    found = zero_shot_source(model, PREPROCESS, read_folder(root / "test"), {name: name for name in names})
    assert caplog.messages == ["1 of 4 classes have no image: pink"] and found["classes"] == 4


def test_an_image_without_a_class_is_told(model: CLIP, root: Path, tmp_path: Path) -> None:
    """One that lies beside the folders of the classes, and a row of a table whose class is empty."""
    shutil.copytree(root / "test", tmp_path / "test")
    shutil.copy(root / "test" / "red" / "0.png", tmp_path / "test" / "stray.png")
    (tmp_path / "t.csv").write_text(f"path,caption\n{root}/test/red/0.png,red\n{root}/test/red/1.png,\n")
    for path, key in ((tmp_path / "test", "stray.png"), (tmp_path / "t.csv", "1.png")):
        with pytest.raises(ValueError, match=f"expected the class of every image of test, but .*{key} has none"):
            Bench(model, PREPROCESS, EvalSet("some", test=str(path))).zero_shot()
    with pytest.raises(ValueError, match=r"expected the class of every image .*, but stray.png has none"):
        zero_shot_source(model, PREPROCESS, read_folder(tmp_path / "test"))
    assert {own.meta["class"] for own in read_folder(root / "test" / "red").rows} == {"red"}  # no folder beside them


def test_a_second_evaluation_encodes_no_image(model: CLIP, root: Path, tmp_path: Path, monkeypatch) -> None:
    """Of whatever suite, task or command: features are kept by what they depend on; of another content only what changed is
    made, and what was measured is that of features in memory."""
    counts = {"images": 0, "texts": 0}
    for name, method in (("images", "encode_image"), ("texts", "encode_text")):
        encode = getattr(CLIP, method)

        def counted(self, batch, *args, encode=encode, name=name, **kwargs):
            counts[name] += len(batch)
            return encode(self, batch, *args, **kwargs)

        monkeypatch.setattr(CLIP, method, counted)
    data = tmp_path / "data"
    shutil.copytree(root, data)
    pairs = [f"{path.relative_to(data)},a {path.parent.name} {n}" for path in sorted(data.rglob("test/*/*.png")) for n in "ab"]
    (data / "pairs.csv").write_text("\n".join(["path,caption", *pairs, pairs[0]]))
    sets = [colours(data, tasks=("zero-shot", "probe")), EvalSet("pairs", test=str(data / "pairs.csv"), tasks=("retrieval",))]

    def run(out: str) -> list[dict]:
        counts.update(images=0, texts=0)
        rows = run_suite(["m"], Suite(sets), tmp_path / out, lambda _: (model, PREPROCESS), cache=tmp_path / "features")
        assert not [row["reason"] for row in rows if "reason" in row]
        return [{key: value for key, value in row.items() if key != "trials"} for row in rows]

    first = run("a")
    assert counts["images"] == 12 + 18 + 12  # test, train, and the pairs
    second = run("b")
    assert counts["images"] == 0 and first == second
    prompts = counts["texts"]
    bench = Bench(model, PREPROCESS, sets[1])
    assert bench.retrieval() == {key: second[2][key] for key in bench.retrieval()}
    theirs = retrieval_source(model, PREPROCESS, sets[1].open("test"))
    assert bench.retrieval() == pytest.approx(theirs | {"score": theirs["text_to_image_R@1"], "metric": "text_to_image_R@1"})
    (data / "test" / "red" / "0.png").write_bytes((data / "train" / "red" / "0.png").read_bytes())
    run("c")
    assert counts["images"] == 1 + 1 and counts["texts"] == prompts  # the set's, and the pairs'
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_overlap_and_bias_of_a_suite(model: CLIP, root: Path, tmp_path: Path) -> None:
    """As tasks of its sets; Bonferroni's correction is over the sets of a model; shots are the suite's."""
    rows = [f"{root}/test/{name}/0.png,{name[0]}" for name in COLOURS]
    (tmp_path / "faces.csv").write_text("\n".join(["path,tone", *rows]))
    given = {"designs": {"two": ["red", "blue"]}, "groups": {"cold": ["blue"]}}
    (tmp_path / "d.json").write_text(json.dumps(given))
    mixed = tmp_path / "mixed"
    shutil.copytree(root / "train", mixed)
    for name in COLOURS:
        shutil.copy(root / "test" / name / "1.png", mixed / name / "seen.png")
    own = f'root = "{root}"\nagainst = "mixed"\ntasks = ["overlap", "few-shot"]\nshots = [1, 3]'
    sets = [f'[[dataset]]\nname = "{name}"\n{own}' for name in ("a", "b")]
    sets.append('[[dataset]]\nname = "faces"\ntest = "faces.csv"\ndesigns = "d.json"\ntasks = ["bias"]')
    (tmp_path / "s.toml").write_text("\n".join(sets))
    suite = Suite.read(tmp_path / "s.toml")
    found = run_suite(["m"], suite, tmp_path / "out", lambda name: (model, PREPROCESS))
    by_task = {(row["dataset"], row["task"]): row for row in found}
    assert not [row["reason"] for row in found if "reason" in row]
    few = by_task["a", "few-shot"]["scores"]
    assert [own["examples"] for own in few] == [1, 3, 6]
    overlap = by_task["a", "overlap"]
    assert overlap["score"] >= 3 / 12 and {"blue/1.png", "red/1.png"} <= {pair["test"] for pair in overlap["pairs"]}
    shares = by_task["faces", "bias"]["shares"]
    values = [own["share"] for own in shares if own["attribute"] == "tone"]
    assert by_task["faces", "bias"]["score"] == max(values) - min(values)
    html = page(found, suite)
    assert "Bias: faces, m" in html and "Overlap: near-duplicates" in html
    sheets = [by_task[name, "overlap"]["sheet"] for name in ("a", "b")]
    assert all(f'<a href="{own}">' in html and Image.open(tmp_path / "out" / own).width > 256 for own in sheets)
    assert sheets[0] != sheets[1] and "sheet" not in by_task["a", "few-shot"]
    right, seen = np.repeat([True, False, True], [18, 2, 40]), np.repeat([True, False], [20, 40])
    right[30:] = False
    rows = [overlaps({name: right}, {name: seen}).summary() | {"score": 0.1} for name in ("a", "b")]
    told = overlap_table([row | {"model": "m", "dataset": "x" * n, "task": "overlap"} for n, row in enumerate(rows)])
    assert rows[0]["sets"][0]["adjusted"] == (p := rows[0]["sets"][0]["p"]) < 0.5
    assert [line.split()[-2:] for line in told.splitlines()[2:]] == [[f"{p:.3g}", f"{2 * p:.3g}"]] * 2


def test_standard_splits(model: CLIP, root: Path, tmp_path: Path) -> None:
    """STL10's: rows of training in a line each, the test whole; UCF101's: lists of names for both."""
    lines = ["0 1 2 6 7 8 12 13 14", "3 4 5 9 10 11 15 16 17"]
    (tmp_path / "folds.txt").write_text("\n".join(lines))
    bench = Bench(model, PREPROCESS, colours(root, folds=str(tmp_path / "folds.txt")))
    probe, results = bench.probe(penalty=1.0)
    train, test = (bench.features(split, False) for split in ("train", "test"))
    expected = []
    for line in lines:
        rows = [*map(int, line.split())]
        fitted = LogisticRegression(C=1.0, max_iter=1000).fit(train.features[rows], [train.labels[row] for row in rows])
        expected.append(accuracy_score(test.labels, fitted.predict(test.features)))
    assert results["folds"] == expected and results["score"] == np.mean(expected)
    plain = Bench(model, PREPROCESS, colours(root)).zero_shot()
    assert bench.zero_shot()["score"] == plain["score"] and bench.zero_shot()["contextless"] == plain["contextless"]

    videos, lists = tmp_path / "videos", tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "test"):
        for path in sorted((root / split).rglob("*.png")):
            (videos / split / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, videos / split / path.parent.name / f"v_{path.parent.name}_{split}{path.stem}.png")
    names = sorted(f"{path.parent.name}/{path.stem}.avi" for path in videos.rglob("*.png"))
    for fold in (1, 2):
        tested = [name for name in names if (int(name[-5]) % 2 == 1) == (fold == 1)]
        (lists / f"testlist0{fold}.txt").write_text("\n".join(tested))
        (lists / f"trainlist0{fold}.txt").write_text("\n".join(f"{own} 1" for own in names if own not in tested))
    data = EvalSet("ucf", test=f"{videos}/test", train=f"{videos}/train", classes=(*COLOURS,), folds=str(lists))
    bench = Bench(model, PREPROCESS, data)
    pool, folds = bench._pool(True)
    scores = bench.scores(pool.features, [*COLOURS], ["a photo of a {}."]).argmax(1) == [
        [*COLOURS].index(n) for n in pool.labels
    ]
    assert [len(rows) for _, rows in folds] == [15, 15] and not set(folds[0][0]) & set(folds[0][1])
    assert bench.zero_shot()["folds"] == [scores[rows].mean() for _, rows in folds] and bench.zero_shot()["images"] == 30
    assert bench.probe(penalty=1.0)[1]["score"] == 1
    for text, told in (("0 99", "line 1: expected numbers of training images from 0 to 17, got '0 99'"), ("", "a line of num")):
        (tmp_path / "folds.txt").write_text(text)
        with pytest.raises(ValueError, match=told):
            Bench(model, PREPROCESS, colours(root, folds=str(tmp_path / "folds.txt"))).probe()


@pytest.mark.slow
def test_a_suite_on_two_ranks(model: CLIP, root: Path, tmp_path: Path) -> None:
    """They make the features together; the rows are those of one process."""
    weights = str(tmp_path / "m.safetensors")
    export(model, weights, "safetensors")
    (tmp_path / "s.toml").write_text(SUITE.format(root=root))
    command = ["-m", "clipfast.cli", "eval", weights, "--suite", str(tmp_path / "s.toml"), "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = {}
    for out, before in (("one", []), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *before, *command, "--out", str(tmp_path / out)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told[out] = [line for line in done.stdout.splitlines() if "report.html" not in line]
        rows = json.loads((tmp_path / out / "results.json").read_text())["rows"]
        scores = {(row["dataset"], row["task"]): row["score"] for row in rows if "score" in row}
        assert scores.keys() == {("colours", "zero-shot"), ("colours", "probe"), ("shifted", "zero-shot")}
    assert told["one"] == told["two"]
    names = [{path.name for path in (tmp_path / out / "features").iterdir()} for out in told]
    assert names[0] == names[1] and len(names[0]) == 3
