"""Each metric against a loop or another library's."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from clipfast.evaluate import metrics

GENERATOR = np.random.default_rng(0)


def tied(*shape):
    """Scores of few values: many are equal."""
    return np.random.default_rng(1).integers(0, 5, shape) / 4


def test_top_k_sorts_equal_scores_by_index():
    scores, targets = tied(60, 7), GENERATOR.integers(0, 6, 60)
    for k in (1, 3, 9):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        assert metrics.top_k(scores, targets, k) == pytest.approx(
            np.mean([t in row for t, row in zip(targets, order, strict=True)])
        )
    untied = GENERATOR.normal(size=(60, 7))
    expected = [top_k_accuracy_score(targets, untied, k=k, labels=range(7)) for k in (1, 5)]
    assert metrics.mean_top1_top5(torch.tensor(untied), torch.tensor(targets)) == pytest.approx(sum(expected) / 2)
    assert 0 < expected[0] < expected[1] < 1


def test_mean_per_class_leaves_out_a_class_without_examples():
    targets, predictions = np.array([0, 0, 0, 2, 2, 5]), np.array([0, 0, 1, 2, 0, 5])
    assert metrics.mean_per_class(predictions, targets) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    labels = GENERATOR.integers(0, 4, (2, 90))
    assert metrics.mean_per_class(*labels) == pytest.approx(balanced_accuracy_score(labels[1], labels[0]))
    assert metrics.mean_per_class([1], [1]) == 1.0 and metrics.mean_per_class([0], [1]) == 0.0


def test_f1_roc_and_confusion():
    truth, found = np.array([1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0])
    assert metrics.f1(found, truth) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.f1([0, 0], [0, 0]) == 0.0
    scores = tied(40)
    labels = (GENERATOR.random(40) < 0.4).astype(int)
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels == 1] for n in scores[labels == 0]]
    assert metrics.roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    counts = metrics.confusion(found, truth, 3)
    assert counts.tolist() == [[3, 1, 0], [1, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("rows", [1, 200])
def test_calibration_is_torchmetrics(rows):
    logits, targets = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)), torch.arange(rows) % 6
    probabilities = logits.mul(2).softmax(1)
    expected = multiclass_calibration_error(probabilities, targets, 6, n_bins=15).item()
    assert metrics.calibration_error(probabilities, targets) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.1


def test_eleven_points():
    """VOC2007's loop, on scores with ties; recall is reached where a whole run of equal scores is taken."""
    for scores in (tied(50), GENERATOR.normal(size=50)):
        relevant = (GENERATOR.random(50) < 0.3).astype(int)
        curve = []
        for threshold in np.unique(scores):
            taken = relevant[scores >= threshold]
            curve.append((taken.sum() / relevant.sum(), taken.mean()))
        expected = np.mean([max(p for r, p in curve if r >= level / 10 - 1e-9) for level in range(11)])
        assert metrics.average_precision(scores, relevant, points=11) == pytest.approx(expected)
    assert metrics.average_precision([0.3], [1], points=11) == metrics.average_precision([0.3], [1]) == 1.0


def test_mean_average_precision_leaves_out_classes_and_rows():
    scores = tied(40, 4)
    labels = (GENERATOR.random((40, 4)) < 0.3).astype(int)
    labels[:, 2] = 0  # a class without a positive
    labels[::3] = -1
    known = labels[:, 0] >= 0
    each = [average_precision_score(labels[known, c], scores[known, c]) for c in (0, 1, 3)]
    assert metrics.mean_average_precision(scores, labels) == pytest.approx(np.mean(each))
    assert math.isnan(metrics.average_precisions(scores, labels)[2])
    counts = [100, 20, 5, 99]
    assert metrics.long_tail(scores, labels, counts) == pytest.approx(
        {"all": np.mean(each), "head": each[0], "medium": (each[1] + each[2]) / 2, "tail": np.nan}, nan_ok=True
    )


def test_weighted_mean_average_precision_counts_a_video_once_in_each_group():
    scores, groups = GENERATOR.normal(size=(60, 2)), GENERATOR.integers(-1, 3, (60, 2))
    videos = np.array([f"v{number}" for number in GENERATOR.integers(0, 9, 60)])
    each = []
    for c in range(2):
        rows = [i for i in range(60) if groups[i, c] >= 0]
        weights = [1 / sum(videos[j] == videos[i] and groups[j, c] == groups[i, c] for j in rows) for i in rows]
        each.append(average_precision_score(groups[rows, c] == 1, scores[rows, c], sample_weight=weights))
    assert metrics.weighted_mean_average_precision(scores, groups, videos) == pytest.approx(np.mean(each))


def test_base_to_new_is_among_own_half():
    scores = np.array([[1, 0, 0, 9, 9], [0, 0, 1, 9, 9], [0, 1, 0, 9, 9], [9, 9, 9, 1, 0], [9, 9, 9, 1, 0]])
    found = metrics.base_to_new(scores, [0, 2, 2, 3, 4])  # five classes: three are base
    assert found == pytest.approx({"base": 2 / 3, "new": 1 / 2, "harmonic_mean": 2 / (3 / 2 + 2)})
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0


def test_shape_bias():
    scores = np.array([[0.4, 0.1, 0.2], [0.0, 0.9, 0.1]])
    assert metrics.group_scores(scores, [[0, 1], [2]]) == pytest.approx(np.array([[0.25, 0.2], [0.45, 0.1]]))
    assert metrics.group_scores(scores, [[0, 1], [2]], "max")[1].tolist() == [0.9, 0.1]
    predicted, shape, texture = ["cat", "cat", "dog", "car", "cat"], ["cat", "cat", "cat", "cat", "cat"], ["dog"] * 4 + ["cat"]
    assert metrics.shape_bias(predicted, shape, texture) == pytest.approx(2 / 3)  # the last is in no conflict


@pytest.mark.parametrize("scores_at_a_time", [1, 400, 1 << 24])
def test_person_retrieval(monkeypatch, scores_at_a_time):
    monkeypatch.setattr(metrics, "SCORES", scores_at_a_time)
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(20, 4, generator=generator), torch.randn(31, 4, generator=generator)
    query_ids, gallery_ids = torch.arange(20) % 6, torch.arange(31) % 7
    hits, precisions, penalties = [], [], []
    for query, person in zip(queries, query_ids, strict=True):
        scores = gallery @ query
        right = (gallery_ids == person)[scores.argsort(descending=True)]
        ranks = right.nonzero()[:, 0] + 1
        hits.append(ranks[0].item())
        penalties.append(len(ranks) / ranks[-1].item())
        precisions.append(average_precision_score(gallery_ids == person, scores))
    found = metrics.person_retrieval(queries, gallery, query_ids, gallery_ids)
    expected = {f"Rank-{k}": np.mean(np.array(hits) <= k) for k in (1, 5, 10)}
    assert found == pytest.approx(expected | {"mAP": np.mean(precisions), "mINP": np.mean(penalties)}, abs=1e-6)
    equal = metrics.person_retrieval(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([1]), torch.tensor([0, 1, 1]), ks=(1, 2))
    assert equal == pytest.approx({"Rank-1": 0, "Rank-2": 1, "mAP": (1 / 2 + 2 / 3) / 2, "mINP": 2 / 3})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.top_k([[0.1, math.nan]], [0]), "expected finite scores, got 1 NaN"),
        (lambda: metrics.top_k([[0.1, 0.2]], [2]), "from 0 to 1, got int64 from 2 to 2"),
        (lambda: metrics.top_k([[0.1, 0.2]], [0, 1]), "got 1 and 2"),
        (lambda: metrics.top_k(np.zeros((0, 3)), []), r"at least one row, got shape \(0, 3\)"),
        (lambda: metrics.roc_auc([0.2, 0.1], [1, 1]), r"both of them, got \[1\]"),
        (lambda: metrics.average_precision([0.2, 0.1], [0, 0]), "at least one 1"),
        (lambda: metrics.mean_average_precision([[0.2]], [[0]]), "classes with a positive, got none"),
        (lambda: metrics.confusion([0, 3], [0, 1], 3), r"from 0 to 2, got \[3\]"),
        (lambda: metrics.calibration_error([[3.0, 1.0]], [0]), "apply a softmax"),
        (lambda: metrics.base_to_new([[0.0, 1.0]], [0]), "one half has none"),
        (lambda: metrics.shape_bias([0], [1], [2]), "read by shape or texture, got none"),
        (lambda: metrics.person_retrieval(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1), torch.ones(1)), "a right answer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_absent_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'clipfast\[eval\]'"):
        metrics.roc_auc([0.1, 0.2], [0, 1])
