"""Fits of accuracies under shift."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LinearRegression

from clipfast.evaluate.robustness import log_log_fit, robustness

ACCURACY = [0.5, 0.6, 0.7, 0.8, 0.7]
NAMES = ["a", "b", "c", "d", "clip"]


def test_models_on_a_line_have_no_effective_robustness_and_one_above_it_has():
    shifted = [*expit(1.2 * logit(ACCURACY[:4]) - 0.4), 0.75]
    found = robustness(NAMES, ACCURACY, shifted, NAMES[:4], baseline="c", draws=50)
    assert found.line == pytest.approx((1.2, -0.4, 1.0))
    effective = [model.effective for model in found.models]
    assert effective[:4] == pytest.approx([0] * 4, abs=1e-12)
    assert effective[4] == pytest.approx(0.75 - shifted[2])
    assert [model.relative for model in found.models] == pytest.approx(np.array(shifted) - shifted[2])
    assert found.models[4].interval == pytest.approx([effective[4]] * 2)  # every draw has the same line
    assert found.grid[0] == pytest.approx(0.5) and found.band[0] == pytest.approx([shifted[0]] * 2)


def test_the_fit_is_that_of_the_standard_models_only_and_the_interval_that_of_drawn_models():
    shifted = [0.4, 0.42, 0.6, 0.66, 0.9]
    found = robustness(NAMES, ACCURACY, shifted, NAMES[:4], draws=60, level=0.9, seed=7)
    x, y = logit(ACCURACY)[:, None], logit(shifted)
    model = LinearRegression().fit(x[:4], y[:4])
    assert found.line[:2] == pytest.approx((model.coef_[0], model.intercept_))
    assert found.line.r == pytest.approx(np.corrcoef(x[:4, 0], y[:4])[0, 1])
    rng, effective = np.random.default_rng(7), []
    while len(effective) < 60:
        rows = rng.integers(0, 4, 4)
        if len(set(rows)) > 1:
            effective.append(0.9 - expit(LinearRegression().fit(x[rows], y[rows]).predict(x[4:])[0]))
    clip = found.models[4]
    assert clip.interval == pytest.approx(np.quantile(effective, [0.05, 0.95]).tolist())
    assert clip.interval.low < clip.effective < clip.interval.high and clip.relative is None
    assert json.loads(json.dumps(found.summary()))["models"][4]["interval"] == list(clip.interval)
    assert found.table().count("\n") == 6


def test_an_accuracy_of_one_counts_as_half_an_image_less():
    found = robustness(["a", "b", "c"], [0.4, 0.6, 1.0], [0.0, 0.5, 0.7], ["a", "b", "c"], images=(50, 10), draws=20)
    x, y = logit([0.4, 0.6, 0.99]), logit([0.05, 0.5, 0.7])
    assert found.line[:2] == pytest.approx(np.polyfit(x, y, 1))
    assert found.models[2].accuracy == 1.0


def test_log_log_fit():
    assert log_log_fit([1, 10, 100], [0.8, 0.4, 0.2])[:2] == pytest.approx((np.log10(0.5), np.log10(0.8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robustness(NAMES[:2], [0.5, 0.6], [0.5, 0.6], NAMES[:2]), "three models or more"),
        (lambda: robustness(NAMES, ACCURACY, [0.5, 0.6, 0.7, 0.8, 1.0], NAMES), "got 1.0 of clip; give the numbers of images"),
        (lambda: robustness(NAMES, [50, 60, 70, 80, 70], ACCURACY, NAMES), "not per cent"),
        (lambda: robustness(NAMES, ACCURACY, ACCURACY, ["e"]), r"got \['e'\]"),
        (lambda: robustness(["a"] * 5, ACCURACY, ACCURACY, ["a"]), "expected 5 names, each once"),
        (lambda: robustness(NAMES, ACCURACY, [0.5, np.nan, 0.5, 0.5, 0.5], NAMES), "got 1 NaN"),
        (lambda: robustness(NAMES[:3], [0.5] * 3, [0.1, 0.2, 0.3], NAMES[:3]), "of different accuracy"),
        (lambda: log_log_fit([0, 1, 2], [0.1, 0.2, 0.3]), "compute and errors above 0"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
