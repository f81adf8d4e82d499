"""Zero-shot by likelihood against brute force: every image with every prompt, one at a time."""

from __future__ import annotations

import json
from statistics import mean

import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from clipfast.cli import main
from clipfast.data.sources import Rows, Sample
from clipfast.evaluate import Bench, EvalSet, class_likelihoods, encode_texts, likelihood, metrics, zero_shot_source
from clipfast.inputs import tokenize
from clipfast.model import CLIP
from clipfast.train.config import arguments_for
from clipfast.weights import export
from tests.data.test_data import write_table
from tests.evaluate.test_evaluate import PREPROCESS, SIZES, write_folders
from tests.model.test_model import shake

NAMES = ["cat", "cat face", "dog dog", "a red heart", "cat"]
TEMPLATES = ["{}", "a drawing of {}"]


@pytest.fixture(params=["words", "caption"])
def model(request: pytest.FixtureRequest) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**arguments_for(request.param, SIZES | {"transformer_layers": 2})).eval()
    shake(model)
    return model


def brute_force(model: CLIP, image: Tensor, text: str) -> float:
    """image [D]"""
    state = image / image.norm() * len(image) ** 0.5
    ids = tokenize([text])[0]
    ids = ids[: int(ids.argmax()) + 1].long()
    if model.words is not None:
        own, best = model.words(state).log_softmax(0)[ids[1:-1]], torch.bincount(ids[1:-1]).double() / (len(ids) - 2)
        return (own.mean() - (best[best > 0] * best[best > 0].log()).sum()).item()
    x = model.embed_text(ids[None])
    x = torch.cat([x[:, :1] + model.prefix(state), x[:, 1:]], 1)
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)))[:, 0]
    return (x @ model.token_embedding.weight.T).log_softmax(1)[range(len(ids) - 1), ids[1:]].sum().item()


@torch.no_grad()
@pytest.mark.parametrize("states", [1 << 24, 1 << 10], ids=["at once", "in blocks"])
def test_scores_are_those_of_brute_force(model, monkeypatch, states):
    monkeypatch.setattr(likelihood, "STATES", states)
    features = torch.randn(3, SIZES["embed_dim"])
    got = class_likelihoods(model, features, NAMES, TEMPLATES)
    expected = [[sum(brute_force(model, image, t.format(name)) for t in TEMPLATES) / 2 for name in NAMES] for image in features]
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(class_likelihoods(model, 7 * features, NAMES, TEMPLATES), got)  # of any length


def test_a_source_is_classified_by_them(model):
    torch.manual_seed(1)
    images = (torch.rand(6, 40, 40, 3) * 255).byte().numpy()
    labels = [0, 1, 2, 3, 1, 0]
    source = Rows([Sample(str(n), image, None, {"class": labels[n]}) for n, image in enumerate(images)])
    found = zero_shot_source(model, PREPROCESS, source, {n: n for n in NAMES[:4]}, TEMPLATES)
    with torch.no_grad():
        features = torch.cat([model.encode_image(PREPROCESS(image)[None]) for image in images])
    scores = class_likelihoods(model, features, NAMES[:4], TEMPLATES)
    assert found["top1"] == pytest.approx((scores.argmax(1) == torch.tensor(labels)).double().mean().item())


@pytest.mark.parametrize("by_class", [False, True], ids=["templates", "prompts of each class"])
def test_the_tasks_of_a_data_set_are_by_them(model, tmp_path, by_class):
    """Zero-shot, its calibration and confusion, and bias, image by image and prompt by prompt."""
    folders = write_folders(tmp_path / "data")
    prompts = {name: [f"a {name}", f"the {name} thing"][: 1 + (place > 0)] for place, name in enumerate(folders)}
    (tmp_path / "p.json").write_text(json.dumps(prompts if by_class else ["a {}", "the {} thing"]))
    texts = prompts if by_class else {name: [f"a {name}", f"the {name} thing"] for name in folders}
    files = [tmp_path / "data" / name / f"{n}.png" for name, numbers in folders.items() for n in sorted(numbers, key=str)]
    with torch.no_grad():
        images = [model.encode_image(PREPROCESS(path)[None])[0] for path in files]
        scores = [[mean(brute_force(model, own, text) for text in texts[name]) for name in folders] for own in images]
    table = torch.tensor(scores)
    guessed, right = table.argmax(1), torch.tensor([[*folders].index(path.parent.name) for path in files])
    data = EvalSet("folders", test=str(tmp_path / "data"), templates=str(tmp_path / "p.json"))
    found = Bench(model, PREPROCESS, data).zero_shot(calibration=True, confusion=True)
    assert found["score"] == pytest.approx((guessed == right).double().mean().item())
    assert found["confusion"] == confusion_matrix(right, guessed).tolist()
    expected = metrics.calibration_error(table.softmax(1).numpy(), right.numpy())
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-4)
    (tmp_path / "faces.csv").write_text("path,tone\n" + "\n".join(f"{path},{path.stem}" for path in files))
    (tmp_path / "d.json").write_text(json.dumps({"designs": {"all": [*folders]}, "groups": {"last": ["n03"]}}))
    about = {"templates": data.templates, "designs": str(tmp_path / "d.json")}
    shares = Bench(model, PREPROCESS, EvalSet("faces", test=str(tmp_path / "faces.csv"), **about)).bias()[0].shares
    assert shares[0].hits == int((guessed == 2).sum()) and shares[0].images == len(files)


def test_tasks_that_search_by_texts_refuse_them(model, tmp_path, capsys):
    """In one line, before an image is read, and with nothing written."""
    export(model, tmp_path / "m.safetensors")
    table = write_table(tmp_path / "data", 3)
    given = [table, "--model", str(tmp_path / "m.safetensors"), "--device", "cpu", "--task", "retrieval"]
    for more in ([], ["--features", str(tmp_path / "kept")]):
        assert main(["eval", *given, *more, "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "expected a contrastive model for retrieval, got one that predicts the" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "m.safetensors"]


def test_what_has_no_likelihood_is_told(model):
    with pytest.raises(ValueError, match="expected a contrastive model for text features, got one that predicts the"):
        encode_texts(model, ["a cat"])
    with pytest.raises(ValueError, match="expected a model that predicts words or a caption, got one for contrastive"):
        class_likelihoods(CLIP(**SIZES), torch.randn(1, 16), ["a"])
    if model.objective == "words":
        with pytest.raises(ValueError, match="expected a word in every prompt, got none in prompt 1"):
            class_likelihoods(model, torch.randn(1, 16), ["a", ""], "{}")
