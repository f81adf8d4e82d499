"""The linear probe against scikit-learn and against its definition."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from clipfast.evaluate import metrics, probe
from clipfast.evaluate.probe import Head, linear_probe


def clouds(rows, classes, width=12, seed=0, spread=1.5):
    """Overlapping clouds about means of their own, on axes of very different lengths."""
    rng = np.random.default_rng(seed)
    means, stretch = np.random.default_rng(99).normal(size=(classes, width)), np.geomspace(0.02, 3, width)
    labels = np.arange(rows) % classes
    return ((means[labels] + spread * rng.normal(size=(rows, width)) + 4) * stretch).astype(np.float32), labels


def mean_loss(features, labels, weight, bias, penalty):
    logits = torch.tensor(features).double() @ weight.double().T + bias.double()
    if len(weight) == 2:  # one free vector, as scikit-learn has for two classes
        weight = weight[1:] - weight[:1]
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    return entropy + penalty / (2 * len(labels)) * weight.double().square().sum().item()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e4])
def test_ours_finds_the_optimum_that_scikit_learn_finds(monkeypatch, classes, penalty):
    monkeypatch.setattr(metrics, "SCORES", 12 * 70)  # blocks of 70 rows
    features, labels = clouds(300, classes)
    theirs = LogisticRegression(C=1 / penalty, max_iter=20000, tol=1e-10).fit(features.astype(np.float64), labels)
    found = linear_probe((features, labels), penalty=penalty, solver="torch")
    weight, bias = torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_)
    if classes == 2:
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    best = mean_loss(features, labels, weight, bias, penalty)
    loss = mean_loss(features, labels, found.head.weight, found.head.bias, penalty)
    assert loss == pytest.approx(found.head.about["loss"], abs=1e-5)
    assert best - 1e-6 < loss < best + 1e-5
    assert (found.head.predict(features) == theirs.predict(features)).mean() > 0.99
    assert found.head.about["converged"] and found.head.about["solver"] == "torch"


def test_digits_as_scikit_learn():
    features, labels = load_digits(return_X_y=True)
    features = features / 16
    train, test = (features[:1200], labels[:1200]), (features[1200:], labels[1200:])
    expected = LogisticRegression(C=0.316, max_iter=1000, tol=1e-4 / 1200).fit(*train).score(*test)
    theirs, ours = (linear_probe(train, test=test, penalty=probe.README_PENALTY, solver=s) for s in ("auto", "torch"))
    assert theirs.score == expected and theirs.head.about["solver"] == "sklearn"
    assert ours.score == pytest.approx(expected, abs=1e-3) and 0.9 < expected < 0.95
    assert ours.head.about["loss"] == pytest.approx(theirs.head.about["loss"], abs=1e-5)


def test_the_search_halves_around_the_best_and_refits_on_both():
    train, validation, test = clouds(60, 3, seed=1), clouds(90, 3, seed=2), clouds(90, 3, seed=3)
    found = linear_probe(train, validation, test, solver="torch")
    tried = {round(8 * np.log10(trial.penalty)): trial.score for trial in found.trials}
    assert set(range(-48, 49, 16)) <= set(tried) and 12 <= len(found.trials) <= 15
    best = max(tried, key=lambda place: (tried[place], place))
    assert found.head.about["penalty"] == pytest.approx(10 ** (best / 8))
    assert {best - 1, best + 1} <= set(tried) and len(set(tried.values())) > 2
    both = tuple(np.concatenate(pair) for pair in zip(train, validation, strict=True))
    again = linear_probe(both, test=test, penalty=found.head.about["penalty"], solver="torch")
    assert torch.allclose(again.head.weight, found.head.weight, atol=2e-3) and again.head.about["rows"] == 150
    assert found.score == np.mean(found.head.predict(test[0]) == test[1])
    assert len(found.table().splitlines()) == len(found.trials) + 2 and found.summary()["test"] == found.score


def test_a_fifth_of_each_class_is_held_out():
    targets = np.repeat([0, 1, 2], [10, 2, 1])
    kept, out = probe.held_out(targets, np.random.default_rng(0))
    assert np.bincount(targets[out], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*kept, *out]) == list(range(13))
    found = linear_probe(clouds(120, 3), solver="torch")
    assert found.trials and found.head.about["rows"] == 120


def test_memory_maps_and_other_types(tmp_path):
    features, labels = clouds(100, 3)
    np.save(tmp_path / "features.npy", features.astype(np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    names = np.array(["ant", "bee", "cat"])[labels]
    found = linear_probe((mapped, names), penalty=1.0, solver="torch")
    tensor = linear_probe((torch.tensor(features.astype(np.float16)), torch.tensor(labels)), penalty=1.0, solver="torch")
    assert torch.equal(found.head.weight, tensor.head.weight)
    assert set(found.head.predict(mapped)) == {"ant", "bee", "cat"}


def test_a_head_is_saved_and_loaded(tmp_path):
    features, labels = clouds(60, 3)
    head = linear_probe((features, labels), penalty=1.0, about={"features": "projected"}, names=["a", "b", "c"]).head
    head.save(tmp_path / "head")
    again = Head.load(tmp_path / "head")
    assert torch.equal(again.logits(features), head.logits(features))
    assert again.about == head.about and again.about["features"] == "projected" and again.about["names"] == ["a", "b", "c"]
    assert torch.allclose(again.probabilities(features).sum(1), torch.ones(60))
    with pytest.raises(ValueError, match=r"expected features \[N, 12\]"):
        again.logits(features[:, :5])
    with pytest.raises(FileNotFoundError, match="got no head.json; fit a probe first"):
        Head.load(tmp_path)


@pytest.mark.parametrize("solver", ["sklearn", "torch"])
def test_what_cannot_be_fitted(solver):
    features, labels = clouds(30, 3)
    broken = features.copy()
    broken[4, 2] = np.nan

    def fit(*sets, **options):
        return linear_probe(*sets, solver=solver, **options)

    for call, message in (
        (lambda: fit((broken, labels), penalty=1.0), "expected finite features"),
        (lambda: fit((features, 0 * labels)), r"two classes or more in train, got only \[0\]"),
        (lambda: fit((features[:3], labels[:3])), "one of each; give penalty"),
        (lambda: fit((features, labels[:-1])), "features of train as labels, got 30 and 29"),
        (lambda: fit((features, labels), (features, labels + 1)), r"validation among the 3 of train, got \[3\]"),
        (lambda: fit((features, labels), test=(features[:, :4], labels)), r"width 12 as train's, got \(30, 4\)"),
        (lambda: fit((features, labels), penalty=0.0), "a penalty above 0, got 0.0"),
        (lambda: fit((features, labels), names=["a", "b", "c", "d"]), r"every class, got none of \['d'\]"),
        (lambda: fit((features, labels), names=["a", "b"]), r"from 0 to 1, as many as names, got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
