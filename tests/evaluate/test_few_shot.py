"""Few-shot draws, their probes, and what zero-shot is worth."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from clipfast.evaluate import few_shot as module
from clipfast.evaluate.few_shot import Worth, examples_worth, few_shot, first_of_each
from tests.evaluate.test_probe import clouds


def test_draws_hold_each_class_equally_and_grow():
    labels = np.array(["b", "a", "b", "a", "c", "c", "a", "c", "b", "a"])
    order = np.random.default_rng(0).permutation(10)
    two, three = (first_of_each(labels, order, number) for number in (2, 3))
    assert sorted(labels[two]) == ["a", "a", "b", "b", "c", "c"]
    assert set(two) < set(three) and len(set(three)) == 9


def test_scores_are_those_of_scikit_learn_on_the_draws():
    train, test = clouds(90, 3, seed=1), clouds(90, 3, seed=2)
    found = few_shot(train, test, shots=(4, 1), seeds=2, zero_shot=0.5)
    expected = {}
    for number in (1, 4):
        rows = [first_of_each(train[1], np.random.default_rng(seed).permutation(90), number) for seed in range(2)]
        models = [
            LogisticRegression(C=0.316, max_iter=1000, tol=1e-4 / len(own)).fit(train[0][own], train[1][own]) for own in rows
        ]
        expected[number] = [model.score(*test) for model in models]
    assert {shots: found.scores[shots] for shots in (1, 4)} == expected
    assert list(found.scores) == [1, 4, 30] and len(found.scores[30]) == 1 and found.whole == 30
    assert expected[1][0] != expected[1][1] and np.mean(expected[4]) < found.scores[30][0]
    assert json.loads(json.dumps(found.summary()))["scores"][0] == {"examples": 1.0, "scores": expected[1]}
    assert "all (30)" in found.table() and str(found.worth) in found.table()


def test_the_penalty_is_chosen_on_validation_which_no_head_is_fitted_on(monkeypatch):
    train, validation, test = clouds(30, 3, seed=1), clouds(60, 3, seed=2), clouds(60, 3, seed=3)
    fitted, probe = [], module.linear_probe

    def watched(*sets, **options):
        found = probe(*sets, **options)
        fitted.append((found.head.about["rows"], found.head.about["penalty"]))
        return found

    monkeypatch.setattr(module, "linear_probe", watched)
    few_shot(train, test, validation=validation, shots=(2,), seeds=1, whole=False)
    (searched, chosen), (rows, used) = fitted
    assert (searched, rows) == (66, 6) and used == chosen


@pytest.mark.parametrize(
    ("zero_shot", "worth"),
    [(0.5, Worth(2.0)), (0.6, Worth(2 * 2**0.5)), (0.4, Worth(1.0)), (0.3, Worth(1.0, "<")), (0.95, Worth(16.0, ">"))],
)
def test_worth_is_interpolated_in_the_logarithm(zero_shot, worth):
    found = examples_worth([1, 2, 4, 16], [0.4, 0.5, 0.7, 0.9], zero_shot)
    assert found.examples == pytest.approx(worth.examples) and found.bound == worth.bound


def test_what_cannot_be_drawn():
    train = clouds(10, 3)
    with pytest.raises(ValueError, match="expected 4 examples or more of every class, got 3 of .*1.*; give fewer shots"):
        few_shot(train, train, shots=(1, 4))
    with pytest.raises(ValueError, match=r"got shots \[0\] and 3 seeds"):
        few_shot(train, train, shots=(0,))
    with pytest.raises(ValueError, match="shots that rise"):
        examples_worth([2, 1], [0.1, 0.2], 0.1)
    with pytest.raises(ValueError, match="finite zero-shot score, got nan"):
        examples_worth([1, 2], [0.1, 0.2], float("nan"))
