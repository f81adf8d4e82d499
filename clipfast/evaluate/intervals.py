"""How sure a measured number is: exact intervals of shares, bootstrap intervals of anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from clipfast.evaluate.metrics import Array, array, needed, paired


class Interval(NamedTuple):
    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


def clopper_pearson(hits: int, trials: int, level: float = 0.995) -> Interval:
    """The exact interval of a share of `hits` in `trials`; the paper's level is 99.5 %."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"expected hits from 0 to the number of trials, at least one, got {hits} of {trials}")
    at(level)
    return Interval(*map(float, needed("scipy.stats").binomtest(int(hits), int(trials)).proportion_ci(level, method="exact")))


def bootstrap(
    statistic: Callable[..., float], *samples: Array, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """Percentile interval of `statistic(*samples)` when rows are drawn again with replacement, the samples' rows together.

    A statistic that some draw does not have (mean AP without a positive) may return NaN: such draws are left out.
    """
    at(level)
    arrays = [
        array(sample, f"sample {number}", np.ndim(sample) if not hasattr(sample, "dim") else sample.dim())
        for number, sample in enumerate(samples, 1)
    ]
    for other in arrays[1:]:
        paired(arrays[0], other, "rows in every sample")
    if len(arrays[0]) == 1:
        raise ValueError("expected two rows or more to draw from, got one")
    # Drawn here: scipy's `bootstrap` takes no NaN and warns of a BCa interval that nobody asked for when all draws are equal.
    rng, rows = np.random.default_rng(seed), len(arrays[0])
    drawn = np.array(
        [statistic(*(own[chosen] for own in arrays)) for chosen in (rng.integers(0, rows, rows) for _ in range(draws))]
    )
    if not np.isfinite(drawn).any():
        raise ValueError(f"expected a statistic that is finite in some of {draws} draws, got none")
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def at(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
