"""Intervals against their definitions."""

import numpy as np
import pytest
import scipy.stats

from clipfast.evaluate.intervals import Interval, bootstrap, clopper_pearson


@pytest.mark.parametrize(("hits", "trials"), [(0, 12), (12, 12), (1, 1), (37, 90)])
def test_clopper_pearson_is_where_a_tail_holds_half_of_what_is_left(hits, trials):
    low, high = clopper_pearson(hits, trials, 0.99)
    if hits:
        assert scipy.stats.binom.sf(hits - 1, trials, low) == pytest.approx(0.005, rel=1e-6)
    if hits < trials:
        assert scipy.stats.binom.cdf(hits, trials, high) == pytest.approx(0.005, rel=1e-6)
    assert (low == 0) == (hits == 0) and (high == 1) == (hits == trials)
    assert hits / trials in Interval(low, high)


def test_bootstrap_draws_rows_together():
    rng = np.random.default_rng(0)
    first = rng.normal(size=80)
    second = first + rng.normal(size=80)

    def statistic(a, b):
        return np.corrcoef(a, b)[0, 1]

    found = bootstrap(statistic, first, second, draws=200)
    expected = scipy.stats.bootstrap(
        (first, second), statistic, n_resamples=200, batch=1, vectorized=False, paired=True, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found == pytest.approx((expected.low, expected.high))
    assert found.low < np.corrcoef(first, second)[0, 1] < found.high


def test_bootstrap_leaves_out_draws_without_the_statistic():
    found = bootstrap(lambda a: a[a > 0].mean() if (a > 0).any() else np.nan, [0.0, 0.0, 0.0, 2.0], draws=100)
    assert found == (2.0, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson(3, 2), "got 3 of 2"),
        (lambda: clopper_pearson(1, 2, 95), "level between 0 and 1, got 95"),
        (lambda: bootstrap(np.mean, [1.0]), "two rows or more"),
        (lambda: bootstrap(np.mean, [1.0, np.nan]), "expected finite sample 1, got 1 NaN"),
        (lambda: bootstrap(max, [1.0, 2.0], [1.0]), "rows in every sample, got 2 and 1"),
        (lambda: bootstrap(lambda a: np.nan, [1.0, 2.0], draws=5), "finite in some of 5 draws"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
